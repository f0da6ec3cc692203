"""Kill ranks of train.py --elastic at random moments, from outside, and judge what becomes of it.

    python tests/soak_elastic.py --kind shrink --first 17 --runs 1

plays run 17 again: kind and number say which ranks are killed, when, and what train.py is asked
for. What is right is a run with the same membership by schedule (--membership), whose weights and
losses must be equal to the last bit. Seconds are counted from the kill, by the killer's clock.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jobs.conftest import MARKER, end_session, launcher, leftovers

TRAIN = Path(__file__).parents[1] / "train.py"
RANKS, STEPS = 4, 60
LIMITS = {"shrink": 5.0, "end": 5.0, "pipe": 5.0, "grow": 40.0}
"""Seconds from a kill until a step is finished without the killed; others have to start Python."""

VAIN = "processes started in place of dead ranks, not all have opened MPI"
"""What ends a run whose newcomer is killed before MPI knows of it."""

PATIENCE = 100.0
"""Seconds that a whole run may take."""

WAYS: tuple[Mapping[str, str], ...] = (
    {},
    {"RINGFOLD_SHARED": "0"},
    {"RINGFOLD_SHARED": "0", "RINGFOLD_COMPILED": "0"},
)

SPLITS = (
    [],
    ["--bucket-mb", "0.05"],  # several, whose order a run finds out on its way
    ["--wire", "bf16"],
    ["--wire", "topk:0.1", "--bucket-mb", "0.05"],
    ["--wire", "powersgd:2"],
)

# Every process tells the killer who it is, what it has finished, and when it has noticed a loss.
NOTING = f"""
import faulthandler, os, runpy, sys, time
from ringfold.workloads.history import History

folder = sys.argv.pop(1)
mine = os.environ.get("OMPI_COMM_WORLD_RANK", "0")
# Those that are started later have a world of their own.
first = os.environ.get("OMPI_COMM_WORLD_SIZE") == "{RANKS}"
name = f"rank-{{mine}}" if first else f"new-{{os.getpid()}}"
file = open(os.path.join(folder, name), "w", buffering=1)

def note(what):
    file.write(f"{{what}} {{time.monotonic()}}\\n")

faulthandler.dump_traceback_later({PATIENCE - 30})  # where it hangs, if it does
went_on, lose = History.went_on, History.lose

def finished(self):
    went_on(self)
    note("step")

def lost(self, *args, **kwargs):
    lose(self, *args, **kwargs)
    note("lost")

History.went_on, History.lose = finished, lost
file.write(f"pid {{os.getpid()}}\\n")
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


@dataclass(frozen=True)
class Kill:
    """One kill.

    name: of the process's note.  step: it has finished so many by then; None: as soon as it says
    who it is.  delay: seconds after that, or after the kill before where `behind`.
    """

    name: str
    step: int | None
    delay: float
    behind: bool = False


@dataclass(frozen=True)
class Case:
    """What one run is; the same for the same kind and number."""

    kind: str
    number: int
    kills: tuple[Kill, ...]
    options: tuple[str, ...]
    elastic: tuple[str, ...]
    ways: Mapping[str, str]
    store: bool = False

    def __str__(self) -> str:
        kills = ", ".join(
            f"{k.name} {'after that' if k.behind else f'after step {k.step}'} + {k.delay:.3f} s"
            for k in self.kills
        )
        return f"{self.kind} {self.number}: {kills}; {' '.join(self.options)} {dict(self.ways)}"


@dataclass
class Outcome:
    """What a run came to.

    killed: when each process was killed.  notes: by name, what each process said, with the time.
    """

    status: int
    output: str
    report: dict[str, Any] | None
    leftovers: tuple[str, ...] = ()
    killed: dict[str, float] = field(default_factory=dict)
    notes: dict[str, list[tuple[str, float]]] = field(default_factory=dict)


def case_of(kind: str, number: int) -> Case:
    """Draw a run."""
    draw = random.Random(f"{kind} {number}")
    ways = WAYS[number % len(WAYS)]
    one, other = draw.sample(range(RANKS), 2)
    first = draw.randrange(1, STEPS)
    kills = [Kill(f"rank-{one}", first, draw.uniform(0, 0.03))]
    moment = draw.choice(("later", "later", "together", "recovering", "at the end"))
    if moment == "later":
        kills.append(Kill(f"rank-{other}", draw.randrange(first, STEPS), draw.uniform(0, 0.03)))
    elif moment == "together":
        kills.append(Kill(f"rank-{other}", None, 0.0, behind=True))
    elif moment == "recovering":
        kills.append(Kill(f"rank-{other}", None, draw.uniform(0, 0.6), behind=True))
    else:
        kills.append(Kill(f"rank-{other}", STEPS, draw.uniform(0, 0.1)))
    options = ["--steps", str(STEPS)]
    store = draw.random() < 0.3
    if kind == "end":
        kills = [Kill(f"rank-{one}", STEPS - draw.randrange(2), draw.uniform(0, 0.06))]
    if kind in ("shrink", "end"):
        options += draw.choice(SPLITS)
        return Case(kind, number, tuple(kills), tuple(options), ("--elastic",), ways, store)
    if kind == "pipe":
        options += ["--pipe", "2"]
        # With one replica left, another death leaves only the disk to go on from.
        return Case(kind, number, tuple(kills), tuple(options), ("--elastic",), ways, True)
    if kind == "grow":
        options += draw.choice(([], ["--pipe", "2"]))
        again = draw.random() < 0.4
        kills = [kills[0]] if not again else [kills[0], Kill("new", draw.choice((None, 2)), 0.0)]
        elastic = ("--elastic", "grow")
        return Case(kind, number, tuple(kills), tuple(options), elastic, ways, store)
    raise ValueError(f"unknown kind {kind!r}, expected one of: {', '.join(LIMITS)}")


def departures(events: Sequence[Mapping[str, Any]]) -> str:
    """Return the --membership that the events of a report come to.

    Where a run went on from a checkpoint, what was before is as if it had not been.
    """
    leaving: dict[int, int] = {}
    for event in events:
        if event["event"] != "died":
            continue
        leaving[event["rank"]] = event["step"]
        found = re.search(r"checkpoint of step (\d+)", event["lost"])
        if found:
            leaving = {rank: min(step, int(found[1])) for rank, step in leaving.items()}
    return ",".join(f"{rank}:{step}" for rank, step in leaving.items())


def complaints(case: Case, found: Outcome, expected: Mapping[str, Any] | None) -> list[str]:
    """Return all that is wrong with a run, given the report of that with the same membership."""
    wrong = []
    newcomer = any(not name.startswith("rank-") for name in found.killed)
    vain = newcomer and VAIN in found.output
    right = (137, 1) if vain else (0, 137) if newcomer else (0,)  # of mpirun, see docs/elastic.md
    if found.status not in right:
        wrong.append(f"it ended with status {found.status}")
    if found.leftovers:
        wrong.append(f"it left processes: {found.leftovers}")
    if vain:
        return wrong
    if found.report is None:
        return [*wrong, "it has written no report"]
    report, seen = found.report, 0
    if len(report["losses"]) != report["steps"] or report["steps"] != STEPS:
        wrong.append(f"it has {len(report['losses'])} losses of {report['steps']} steps")
    died = {event["rank"] for event in report["events"] if event["event"] == "died"}
    for name, when in found.killed.items():
        seconds = recovery_seconds(found, when)
        noticed = name.startswith("rank-") and int(name[5:]) in died
        seen += noticed
        if noticed and seconds is None:
            wrong.append(f"nobody has gone on after the kill of {name}")
        if seconds is not None and seconds >= LIMITS[case.kind]:
            wrong.append(f"it went on {seconds:.2f} s after the kill of {name}")
    strange = {rank for rank in died if rank < RANKS and f"rank-{rank}" not in found.killed}
    if strange:
        wrong.append(f"ranks {sorted(strange)} are said to have died, and were not killed")
    left = RANKS - seen if case.kind != "grow" else RANKS
    if report["ranks"] != left:
        wrong.append(f"it ended with {report['ranks']} ranks, expected {left}")
    if expected is None:
        return [*wrong, "there is nothing to compare it with"]
    if report["weights_sha256"] != expected["weights_sha256"]:
        wrong.append("its weights are not those of the same membership by schedule")
    if report["losses"] != expected["losses"]:
        pairs = enumerate(zip(report["losses"], expected["losses"], strict=False))
        first = next((i for i, (a, b) in pairs if a != b), "after the last")
        wrong.append(f"its losses differ from those of the schedule from step {first} on")
    return wrong


def recovery_seconds(found: Outcome, killed: float) -> float | None:
    """Return how long after a kill the last of the ranks that noticed has finished a step.

    None where nobody has noticed, as after the last step. A spare rank notices, and has no steps.
    """
    noticed, times = False, []
    for name, notes in found.notes.items():
        lost = next((t for what, t in notes if what == "lost" and t > killed), None)
        if lost is None or name in found.killed:
            continue
        noticed = True
        times += [t for what, t in notes if what == "step" and t > lost][:1]
    if not noticed:
        return None
    return max(times) - killed if times else float("inf")


def environment(case: Case, mark: str) -> dict[str, str]:
    own = {
        "OMP_NUM_THREADS": "1",
        "PRTE_MCA_rmaps_default_mapping_policy": ":oversubscribe",
        "PRTE_MCA_hwloc_default_binding_policy": "none",
        "RINGFOLD_TIMEOUT": "60",
    }
    if os.geteuid() == 0:
        own |= {"OMPI_ALLOW_RUN_AS_ROOT": "1", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1"}
    return {**os.environ, **own, **case.ways, MARKER: mark}


def read_notes(folder: Path) -> tuple[dict[str, int], dict[str, list[tuple[str, float]]]]:
    """Return process numbers, and what was noted, by name."""
    pids: dict[str, int] = {}
    notes: dict[str, list[tuple[str, float]]] = {}
    for path in sorted(folder.iterdir()):
        rows = [line.split() for line in path.read_text().splitlines() if line.count(" ") == 1]
        for _, value in (row for row in rows if row[0] == "pid"):
            pids[path.name] = int(value)
        notes[path.name] = [(what, float(value)) for what, value in rows if what != "pid"]
    return pids, notes


def kill_when_due(case: Case, folder: Path) -> Iterator[tuple[str, float] | None]:
    """Yield after every look, with name and time where it has killed somebody."""
    last = 0.0
    for kill in case.kills:
        while True:
            pids, notes = read_notes(folder)
            name = next((n for n in pids if n == kill.name or n.split("-")[0] == kill.name), None)
            steps = sum(what == "step" for what, _ in notes.get(name or "", ()))
            due = name is not None and (kill.step is None or steps >= kill.step)
            if due and (not kill.behind or time.monotonic() >= last + kill.delay):
                break
            yield None
        if not kill.behind:
            time.sleep(kill.delay)
        with contextlib.suppress(ProcessLookupError):
            os.kill(pids[name], signal.SIGKILL)
        last = time.monotonic()
        yield name, last
    while True:
        yield None


def play(case: Case, folder: Path) -> Outcome:
    """Run train.py and kill its ranks."""
    notes, report = folder / "notes", folder / "report.json"
    notes.mkdir(parents=True)
    program = folder / "noting.py"
    program.write_text(NOTING)
    arguments = [str(notes), *case.options, *case.elastic, "--report", str(report)]
    if case.store:
        arguments += ["--checkpoint", str(folder / "store"), "--every", "7"]
    killer = kill_when_due(case, notes)
    killed: dict[str, float] = {}
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with (folder / "output").open("w") as output:
        job = subprocess.Popen(
            [*launcher(RANKS, ft=True), sys.executable, str(program), *arguments],
            env=environment(case, mark),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        end = time.monotonic() + PATIENCE
        while job.poll() is None and time.monotonic() < end:
            done = next(killer)
            if done is not None:
                killed[done[0]] = done[1]
            time.sleep(0.002)
    status = ended(job)
    left = leftovers(mark)
    text = (folder / "output").read_text()
    found = json.loads(report.read_text()) if report.exists() else None
    return Outcome(status, text, found, left, killed, read_notes(notes)[1])


def ended(job: subprocess.Popen[bytes]) -> int:
    """Return a job's status; end it, and return -1, if it still runs."""
    if job.poll() is None:
        end_session(job)
        return -1
    return job.returncode


def by_schedule(case: Case, found: Outcome, folder: Path) -> dict[str, Any] | None:
    """Return the report of the run that has the same membership by schedule."""
    if found.report is None:
        return None
    # Where ranks are replaced at once, no step is done by fewer: as if nobody had died.
    leaving = "" if case.kind == "grow" else departures(found.report["events"])
    report = folder / "planned.json"
    arguments = [*case.options, "--membership", leaving or f"0:{STEPS + 1}"]
    if case.store:
        arguments += ["--checkpoint", str(folder / "planned-store"), "--every", "7"]
    mark = f"{os.getpid()}-{time.monotonic_ns()}"
    with (folder / "planned").open("w") as output:
        job = subprocess.Popen(
            [*launcher(RANKS), sys.executable, str(TRAIN), *arguments, "--report", str(report)],
            env=environment(case, mark),
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        with contextlib.suppress(subprocess.TimeoutExpired):
            job.wait(PATIENCE)
    status = ended(job)
    if leftovers(mark) or status != 0:
        return None
    planned: dict[str, Any] = json.loads(report.read_text())
    return planned


def one(kind: str, number: int, keep: Path | None = None) -> tuple[list[str], str]:
    """Play and judge one run; return what is wrong, and a line about it."""
    case = case_of(kind, number)
    folder = Path(tempfile.mkdtemp(prefix="soak-elastic-"))
    try:
        found = play(case, folder)
        wrong = complaints(case, found, by_schedule(case, found, folder))
        seconds = [recovery_seconds(found, when) for when in found.killed.values()]
        shown = ", ".join("not noticed" if s is None else f"{s:.2f} s" for s in seconds)
        line = f"{case}: went on after {shown or 'no kill'}"
        if wrong and keep is not None:
            shutil.copytree(folder, keep / f"{kind}-{number}", dirs_exist_ok=True)
        return wrong, line
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def main() -> int:
    parser = argparse.ArgumentParser(description="Kill ranks of elastic runs; see the module.")
    parser.add_argument("--kind", choices=list(LIMITS), default="shrink")
    parser.add_argument("--first", type=int, default=0, help="the first run (default: 0)")
    parser.add_argument("--runs", type=int, default=50, help="how many (default: 50)")
    parser.add_argument("--seconds", type=float, help="start no other run after so many")
    parser.add_argument("--keep", type=Path, help="keep what failed runs have left in this folder")
    options = parser.parse_args()
    failed, start, number = 0, time.monotonic(), options.first
    for number in range(options.first, options.first + options.runs):
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            break
        wrong, line = one(options.kind, number, options.keep)
        print(line, *(f"    WRONG: {text}" for text in wrong), sep="\n", flush=True)
        failed += bool(wrong)
    else:
        number += 1
    print(f"{number - options.first} runs of {options.kind} from {options.first}: {failed} wrong")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
