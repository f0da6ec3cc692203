"""An exception ends the job also where nobody reads what the rank writes."""

import io
import sys
from dataclasses import dataclass, field
from typing import TextIO

import pytest

from ringfold.comm.guard import Guard


class Broken(io.TextIOWrapper):
    """A pipe whose reader is gone."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())

    def write(self, text: str) -> int:
        raise BrokenPipeError

    def flush(self) -> None:
        raise BrokenPipeError

    def close(self) -> None:
        pass


@dataclass
class Job:
    rank: int = 1
    size: int = 2
    ended: list[int] = field(default_factory=list)

    def abort(self, status: int) -> None:
        self.ended.append(status)


@pytest.mark.parametrize("out, err", [(None, None), (Broken, None), (None, Broken), (Broken,) * 2])
def test_streams_that_are_closed_or_broken(
    out: type[TextIO] | None, err: type[TextIO] | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The hook failed of them, and the job went on without the rank."""
    monkeypatch.setattr(sys, "excepthook", lambda *_: None)
    job = Job()
    guard = Guard(job)
    for name, kind in (("stdout", out), ("stderr", err), ("__stderr__", err)):
        monkeypatch.setattr(sys, name, None if kind is None else kind())
    sys.excepthook(ValueError, ValueError("no such file"), None)
    guard.release()
    monkeypatch.undo()
    assert job.ended == [1]
