"""What waits for processes that MPI believes to live does not wait for ever."""

import subprocess
import sys

import pytest

WAITING = """
import sys, time
from ringfold.comm.transport.mpi_survivors import _NOT_ALL, Patience, Survivors

class Stuck:
    def Agree(self, flags):
        time.sleep(60)

    Shrink = lambda self: self.Agree(0)

survivors = object.__new__(Survivors)
survivors._base, survivors._patience = Stuck(), Patience(0.2, _NOT_ALL)
survivors.agree(1) if sys.argv[1] == "agree" else survivors.shrink()
"""


@pytest.mark.parametrize("what", ["agree", "shrink"])
def test_agreements_end_with_a_word_where_a_process_never_comes(what: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", WAITING, what], capture_output=True, text=True, timeout=50
    )
    assert ended.returncode == 1, ended.stderr
    assert "waited 0.2 s: of the ranks that live, not all have come to agree" in ended.stderr
