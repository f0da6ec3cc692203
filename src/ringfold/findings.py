"""What `ringfold doctor` has found, and how it is told on one screen; pure."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

WIDTH = 100
_NAME = 16


class State(Enum):
    """How a finding is to be taken: as it should be, worth knowing, or to be repaired."""

    GOOD = "ok"
    NOTE = "--"
    BROKEN = "!!"


@dataclass(frozen=True)
class Finding:
    """One line of the screen.

    advice: what to do; empty where nothing has to be done.
    """

    name: str
    value: str
    state: State = State.GOOD
    advice: str = ""


def good(name: str, value: str) -> Finding:
    """Return a finding that is as it should be."""
    return Finding(name, value)


def note(name: str, value: str, advice: str = "") -> Finding:
    """Return a finding that limits something, and breaks nothing."""
    return Finding(name, value, State.NOTE, advice)


def broken(name: str, value: str, advice: str) -> Finding:
    """Return a finding that has to be repaired."""
    return Finding(name, value, State.BROKEN, advice)


def status(findings: Sequence[Finding]) -> int:
    """Return the exit status: 1 where something is broken."""
    return int(any(finding.state is State.BROKEN for finding in findings))


def screen(findings: Sequence[Finding]) -> str:
    """Return the text of all findings, and a last line that sums them up."""
    lines: list[str] = []
    for finding in findings:
        head = f"{finding.state.value} {finding.name:<{_NAME}} "
        lines += _wrapped(head, finding.value)
        if finding.advice:
            lines += _wrapped(" " * len(head) + "-> ", finding.advice)
    wrong = [finding.name for finding in findings if finding.state is State.BROKEN]
    lines.append(f"broken: {', '.join(wrong)}" if wrong else "everything that is here works")
    return "\n".join(lines)


def _wrapped(head: str, text: str) -> list[str]:
    lines: list[str] = []
    for part in text.splitlines() or [""]:
        lines += textwrap.wrap(
            part, WIDTH - len(head), break_on_hyphens=False, drop_whitespace=False
        ) or [""]
    blank = " " * len(head)
    return [(head if at == 0 else blank) + line.rstrip() for at, line in enumerate(lines)]


def ways_table(ways: Sequence[Sequence[str]], most: int = 16) -> str:
    """Return which way each pair of ranks takes: one line where all take the same, else a table.

    ways[a][b]: the name of the way from rank a to rank b; the diagonal is not read.
    most: ranks that a table is written for; above, the pairs are counted.
    """
    size = len(ways)
    pairs = [(a, b) for a in range(size) for b in range(a + 1, size)]
    names = list(dict.fromkeys(ways[a][b] for a, b in pairs))
    if not names:
        return "one rank, no pairs"
    counts = {name: sum(ways[a][b] == name for a, b in pairs) for name in names}
    if len(names) == 1:
        return f"{names[0]}, for all {len(pairs)} pairs of ranks"
    told = ", ".join(f"{name}: {count} pairs" for name, count in counts.items())
    if size > most:
        return told
    letters = {name: chr(ord("a") + at) for at, name in enumerate(names)}
    rows = ["rank " + " ".join(f"{b:>2}" for b in range(size))]
    for a in range(size):
        cells = (" ." if a == b else f" {letters[ways[a][b]]}" for b in range(size))
        rows.append(f"{a:>4} " + " ".join(cells))
    key = ", ".join(f"{letter} {name}" for name, letter in letters.items())
    return "\n".join([told, f"({key})", *rows])
