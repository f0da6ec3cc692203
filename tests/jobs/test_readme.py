"""Python blocks of README and docs, command lines, and the examples do what they say."""

import re
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "README.md").read_text()
DOCS = "".join(path.read_text() for path in sorted((ROOT / "docs").glob("*.md")))
# Whole programs; what else stands in docs is parts of such.
BLOCKS = re.findall(r"```python\n(import .*?)```", TEXT + DOCS, re.DOTALL)
COMMANDS = re.findall(r"^ringfold .*$", TEXT, re.MULTILINE)


EACH = "import runpy, sys\nfor path in sys.argv[1:]:\n    runpy.run_path(path, run_name='__main__')"


def test_python_blocks(job: Callable[..., Any], tmp_path: Path) -> None:
    """Each by itself, but in one job, since to start one takes longer than they do."""
    paths = [tmp_path / f"block{number}.py" for number in range(len(BLOCKS))]
    for path, block in zip(paths, BLOCKS, strict=True):
        path.write_text(block)
    done = job(2, EACH, *paths, timeout=120)
    assert done.returncode == 0, done.output
    assert not done.leftovers


@pytest.mark.parametrize("command", COMMANDS)
def test_command(job: Callable[..., Any], command: str) -> None:
    _, *arguments = shlex.split(command)
    done = job(0, ["-m", "ringfold"], *arguments, cwd=ROOT)
    assert done.returncode == 0, done.output


@pytest.mark.parametrize("example", sorted((ROOT / "examples").glob("*.py")), ids=lambda p: p.name)
@pytest.mark.parametrize("ranks", [1, 3])
def test_example(job: Callable[..., Any], example: Path, ranks: int) -> None:
    done = job(ranks, example, timeout=60)
    assert done.returncode == 0, done.output


def test_there_is_something_to_run() -> None:
    assert len(BLOCKS) >= 6 and len(COMMANDS) >= 2
