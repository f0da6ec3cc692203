"""Programs whose output nobody reads, or that has no room."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

from ringfold.output import CUT_OFF, UNWRITTEN

ROOT = Path(__file__).parents[2]


def _end(path: Path) -> ast.stmt:
    return ast.parse(path.read_text()).body[-1]


SCRIPTS = [
    path
    for path in (ROOT / "train.py", *sorted((ROOT / "benchmarks").glob("*.py")))
    if isinstance(_end(path), ast.If) and path.name != "gpu_compiles.py"  # which prints one word
]


@pytest.mark.parametrize("full", [False, True])
def test_a_script_ends_as_the_tools_of_a_shell_do(full: bool) -> None:
    """`train.py | head -1`, or with a full disk: a traceback of the first line printed."""
    if full:
        write = os.open("/dev/full", os.O_WRONLY)
    else:
        read, write = os.pipe()
        os.close(read)
    program = "import sys; from ringfold.output import status_of as s; sys.exit(s('x', %s))"
    script = program % "lambda: print('line', flush=True) or 0"
    ended = subprocess.run([sys.executable, "-c", script], stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    told = b"x: the output cannot be written: No space left on device\n"
    assert (ended.returncode, ended.stderr) == ((UNWRITTEN, told) if full else (CUT_OFF, b""))


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: str(path.name))
def test_every_script_ends_so(path: Path) -> None:
    """The scripts that print what they measure had no such end; `ringfold` alone had one."""
    assert f'status_of("{path.name}", ' in ast.unparse(_end(path)).replace("'", '"')
