"""Write what was measured beside what was to be reached: benchmarks/results/README.md.

    python benchmarks/report.py [FOLDER]

Reads every JSON file of the folder, as `make bench` leaves them there. Where a goal spans several
sizes or numbers of ranks, the worst of them counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from goals import GOALS, GPU_GOALS, Goal, Row

from ringfold.output import status_of


def lines(rows: Sequence[Row], goals: Sequence[Goal] = GOALS) -> Iterator[str]:
    """Lay the table out in Markdown."""
    yield "| what | goal | measured | worst at | |"
    yield "|---|---|---|---|---|"
    for goal in goals:
        limit = f"{'at most' if goal.at_most else 'at least'} {goal.least:g}{goal.unit}"
        if goal.aim is not None:
            limit += f" (aim {goal.aim:g})"
        worst = goal.worst(rows)
        if worst is None:
            yield f"| {goal.what} | {limit} | - | - | not measured |"
            continue
        verdict = "reached" if goal.reached(worst.value) else "**missed**"
        found = f"{worst.value:.3g}{goal.unit}"
        yield f"| {goal.what} | {limit} | {found} | {worst.where} | {verdict} |"


def origin(machine: Mapping[str, Any]) -> str:
    """Say on what machine, and in what environment, a file was measured."""
    return (
        f"- {machine['cpu']}, {machine['cores']} cores; {machine['mpi']}; "
        f"Python {machine['python']}, NumPy {machine['numpy']}; "
        f"{machine.get('malloc') or 'malloc as it is'}; "
        f"commit {machine['commit']}, {machine['date']}"
    )


def cards(rows: Sequence[Row]) -> Iterator[str]:
    """Lay out what each GPU has reached; nothing where none was measured."""
    for card in dict.fromkeys(row["card"] for row in rows if "card" in row):
        yield f"On one {card}:"
        yield ""
        yield from lines([row for row in rows if row.get("card") == card], GPU_GOALS)
        yield ""


def document(records: Iterable[Mapping[str, Any]]) -> str:
    """Return the whole README of the results."""
    records = list(records)
    rows = [row for record in records for row in record["rows"]]
    machines = dict.fromkeys(origin(record["machine"]) for record in records)
    wrong = sum(row.get("wrong", 0) for row in rows)
    return "\n".join(
        (
            "# Measured",
            "",
            "Written by benchmarks/report.py from the JSON files of this folder, which make bench",
            "leaves here. Everything is measured, nothing simulated: medians of the slowest rank's",
            "time, all implementations in one run, in turn. A goal that spans sizes or numbers of",
            "ranks is decided by the worst of them.",
            "",
            *lines(rows),
            "",
            *cards(rows),
            f"Elements that were wrong in all checked results: {wrong}.",
            "",
            "## Where",
            "",
            *machines,
            "",
        )
    )


class Unreadable(ValueError):
    """Say which file is no result of a benchmark, and why."""


ORIGIN = ("cpu", "cores", "mpi", "python", "numpy", "commit", "date")


def read(path: Path) -> Mapping[str, Any]:
    """Return what a benchmark has left in a file, or raise Unreadable."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise Unreadable(f"{path}: {error}") from None
    if not isinstance(record, dict) or not {"machine", "rows"} <= record.keys():
        raise Unreadable(f"{path} is no result of a benchmark: expected a machine and rows")
    machine, rows = record["machine"], record["rows"]
    if not isinstance(machine, dict) or (missing := [key for key in ORIGIN if key not in machine]):
        told = ", ".join(missing) if isinstance(machine, dict) else "all"
        raise Unreadable(f"{path} does not tell where it was measured: lacks {told}")
    if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise Unreadable(f"{path} is no result of a benchmark: its rows are none")
    return record


def main() -> int:
    """Read the results and write their README; status 2 where a file cannot be read."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path(__file__).parent / "results")
    folder = parser.parse_args().folder
    try:
        records = [read(path) for path in sorted(folder.glob("*.json"))]
        if not records:
            raise Unreadable(f"{folder} has no results: make bench writes them")
    except Unreadable as error:
        print(f"{parser.prog}: error: {error}", file=sys.stderr)
        return 2
    text = document(records)
    limits = folder / "limits.md"  # what holds back figures that miss or come near, in words
    if limits.exists():
        text += "\n" + limits.read_text()
    (folder / "README.md").write_text(text)
    print(text)
    return 0


if __name__ == "__main__":
    raise SystemExit(status_of("report.py", main))
