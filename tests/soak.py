"""Spoil training runs at random moments, and see that each one ends, soon, with the right words.

    python tests/soak.py --first 17 --runs 1

replays one run, which a complaint names. A run trains on 2 to 4 ranks; somewhere between its first
line and its end one rank is killed, crashes, leaves, fails, is interrupted or stopped. Then the job
must end within a limit, with a status other than 0, its words must name that rank, and nothing of
it may be left among the processes and in shared memory.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from jobs.conftest import MARKER, end_session, launcher, launcher_environment, leftovers, members

ROOT = Path(__file__).parents[1]
STEPS = 24
OPTIONS = ("--steps", str(STEPS), "--every", "6", "--batch-size", "48", "--microbatches", "4")
TIMEOUT = 20.0
"""RINGFOLD_TIMEOUT of the jobs: cold compilation on a busy machine must fit."""

LIMIT = 20.0
"""Seconds from a fault to the end of the job; beside a stopped rank, TIMEOUT comes on top."""

PATIENCE = 100.0
"""Seconds that a run has to come to its fault, and to its end without one."""


# -- what is done --------------------------------------------------------------------------


@dataclass(frozen=True)
class Fault:
    """A way to spoil a job. number: of the signal, None for what the rank does to itself.

    whole: the signal goes to mpirun's group.  words: one of these must be in the job's words.
    """

    number: signal.Signals | None
    words: str = r"rank {rank}\b"
    whole: bool = False


FAULTS = {
    "kill": Fault(signal.SIGKILL),
    "segfault": Fault(signal.SIGSEGV),
    "exit": Fault(None),
    "exception": Fault(None, r"SpoiltError: rank {rank} fails on purpose"),
    "interrupt": Fault(signal.SIGINT, r"rank {rank}\b"),
    "interrupt all": Fault(signal.SIGINT, "", whole=True),
    "stop": Fault(signal.SIGSTOP, r"rank {rank}\b.*is stopped|CommTimeout:.*\brank {rank}\b"),
}

GRIDS = ((2, 1), (2, 2), (3, 1), (3, 3), (4, 1), (4, 2), (4, 4))
"""(ranks, pipe)"""


@dataclass(frozen=True)
class Case:
    """One run. delay: seconds after the victim's moment.  cold: kernels are compiled anew."""

    number: int
    fault: str
    ranks: int
    pipe: int
    victim: int
    moment: str
    delay: float
    cold: bool
    arguments: tuple[str, ...]

    def __str__(self) -> str:
        grid = f"data {self.ranks // self.pipe} x pipe {self.pipe}"
        cold = ", cold" if self.cold else ""
        when = f"{self.delay * 1e3:.0f} ms after {self.moment}"
        return f"#{self.number}: {self.fault} at rank {self.victim}, {when}, {grid}{cold}"


def case_of(number: int) -> Case:
    """Return run `number`, always the same; seven in a row have seven faults."""
    rng = random.Random(f"soak {number}")
    fault = list(FAULTS)[number % len(FAULTS)]
    moments = (
        ("start", 1.2),
        ("opening", 0.4),
        ("opened", 1.5),
        (f"step{rng.randint(1, STEPS)}", 0.05),
        (f"checkpoint{rng.randint(1, STEPS // 6)}", 0.03),
        (f"step{STEPS}", 0.4),
        ("closing1", 0.1),
        ("returned", 0.05),
    )
    # 7 and 8 have no common divisor: 56 runs in a row have each fault at each moment.
    moment, within = moments[number % len(moments)]
    ranks, pipe = rng.choice(GRIDS)
    return Case(
        number,
        fault,
        ranks,
        pipe,
        victim=rng.randrange(ranks),
        moment=moment,
        delay=rng.uniform(0, within),
        cold=moment == "opened" and rng.random() < 0.5,
        arguments=(*OPTIONS, "--pipe", str(pipe)),
    )


# -- what is seen --------------------------------------------------------------------------


@dataclass(frozen=True)
class Seen:
    """What became of a run. Times are seconds of CLOCK_MONOTONIC, None for what never was.

    status: of mpirun, None where it had to be ended.  returned: when the victim's program ended.
    """

    status: int | None
    fault: float | None
    returned: float | None
    ended: float
    stderr: str
    processes: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @property
    def spoilt(self) -> bool:
        """Tell whether the fault came before the victim's program had ended."""
        return self.fault is not None and (self.returned is None or self.fault < self.returned)


def judge(case: Case, seen: Seen) -> list[str]:
    """Return what is wrong with how a run ended."""
    wrong = []
    if seen.status is None:
        after = "without a fault" if seen.fault is None else f"{seen.ended - seen.fault:.0f} s"
        wrong.append(f"it did not end: {after}")
    if seen.spoilt and seen.status == 0 and not swallowed(case, seen):
        wrong.append("status 0, though the fault came before the program's end")
    if seen.fault is None and seen.status:
        wrong.append(f"status {seen.status} without a fault")
    if seen.spoilt and seen.status != 0:
        fault = FAULTS[case.fault]
        words = fault.words.format(rank=case.victim)
        if not re.search(words, seen.stderr) and not silent(fault, seen):
            wrong.append(f"no word of rank {case.victim}: nothing like {words!r} on stderr")
    wrong += [f"an error of another kind: {line}" for line in strange_errors(case, seen.stderr)]
    wrong += [f"a process is left: {process}" for process in seen.processes]
    wrong += [f"a file is left: {file}" for file in seen.files]
    return wrong


def silent(fault: Fault, seen: Seen) -> bool:
    """Tell whether the launcher has ended all others at once, and said it by its status alone.

    Open MPI's leaves its words out now and then.
    """
    killed = fault.number is not None and seen.status == 128 + fault.number
    return killed and not seen.stderr.strip() and seen.ended - (seen.fault or 0) < 2


def swallowed(case: Case, seen: Seen) -> bool:
    """Tell whether Python threw the exception away, as it does in finalizers and callbacks."""
    return case.fault in ("exception", "interrupt") and "Exception ignored in" in seen.stderr


_ERROR = re.compile(r"^([\w.]*(?:Error|Exception|Lost|Timeout|Interrupt|Finite))(?=:|$).*", re.M)
_HANDLED = "\n\nDuring handling of the above exception, another exception occurred:"
_DUE = ("PeerLost", "CommTimeout")
_OWN = {
    "exception": ("SpoiltError", "StageError"),
    "interrupt": ("KeyboardInterrupt", "StageError"),
}


def strange_errors(case: Case, stderr: str) -> list[str]:
    """Return the lines of errors that a fault of this kind does not explain.

    An error that was being handled when another came, as an interrupt may at any moment, is none.
    """
    due = (*_DUE, *_OWN.get(case.fault.removesuffix(" all"), ()))
    return [
        found[0]
        for found in _ERROR.finditer(stderr)
        if found[1].rpartition(".")[2] not in due and not stderr.startswith(_HANDLED, found.end())
    ]


# -- running -------------------------------------------------------------------------------


def play(case: Case, folder: Path, program: list[str], limit: float = LIMIT) -> Seen:
    """Run a case with its files in an empty folder, and return what became of it."""
    mark = uuid.uuid4().hex
    memory = Path(tempfile.mkdtemp(prefix="soak-", dir="/dev/shm"))
    inside = FAULTS[case.fault].number is None
    fault = [case.victim, case.moment, case.delay, case.fault] if inside else None
    rank = [sys.executable, str(ROOT / "tests" / "soak_rank.py"), str(folder), json.dumps(fault)]
    environment = {
        **launcher_environment(),
        MARKER: mark,
        "RINGFOLD_TIMEOUT": str(TIMEOUT),
        "OMPI_MCA_btl_sm_backing_directory": str(memory),
        **({"NUMBA_CACHE_DIR": str(folder / "cache")} if case.cold else {}),
    }
    before = set(os.listdir("/dev/shm"))
    err = folder / "stderr"
    with (folder / "stdout").open("wb") as stdout, err.open("wb") as stderr:
        process = subprocess.Popen(
            [*launcher(case.ranks), *rank, *program, *case.arguments],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=stderr,
            start_new_session=True,
        )
        notes = folder / f"rank{case.victim}"
        stuck = ""
        fault_at = spoil(case, process, notes)
        patience = PATIENCE
        if fault_at is not None:
            patience = limit + (TIMEOUT if case.fault == "stop" else 0)
        try:
            status: int | None = process.wait(patience)
        except subprocess.TimeoutExpired:
            status = None
            moments = read(notes)
            if case.fault == "stop" and alone(mark, process.pid, moments):
                os.kill(int(moments["pid"]), signal.SIGCONT)
                status = process.wait(LIMIT)
            else:
                stuck = ask(mark)
        ended = time.monotonic()
        if status is None:
            end_session(process)
    left = leftovers(mark)
    files = remains(memory, before)
    moments = read(notes)
    returned = moments.get("returned")
    return Seen(
        status,
        moments.get("fault", fault_at),
        returned,
        ended,
        err.read_text(errors="replace") + stuck,
        left if status is not None else (),
        files,
    )


def spoil(case: Case, process: subprocess.Popen[bytes], notes: Path) -> float | None:
    """Wait for the victim's moment, do what is to be done from outside, and return when it was.

    Faults from within are left to the rank; it notes them itself.
    """
    fault = FAULTS[case.fault]
    end = time.monotonic() + PATIENCE
    while time.monotonic() < end and process.poll() is None:
        moments = read(notes)
        if case.moment in moments:
            break
        time.sleep(0.002)
    else:
        return None
    pid = int(moments["pid"])
    time.sleep(max(0, moments[case.moment] + case.delay - time.monotonic()))
    if fault.number is None:
        return time.monotonic()
    if not alive(pid):
        return None
    try:
        at = time.monotonic()
        if fault.whole:
            os.killpg(process.pid, fault.number)
        else:
            os.kill(pid, fault.number)
    except ProcessLookupError:
        return None
    return at


def read(notes: Path) -> dict[str, float]:
    """Return the moments that a rank has noted, in seconds, and its `pid`."""
    found: dict[str, float] = {}
    if notes.exists():
        for line in notes.read_text().splitlines():
            words = line.split()
            if len(words) == 3:
                found.setdefault(words[0], int(words[1]) / 1e9)
                found["pid"] = int(words[2])
    return found


def alone(mark: str, launcher_pid: int, moments: Mapping[str, float]) -> bool:
    """Tell whether a stopped rank had ended its program, and no other rank is there any more.

    Its job has ended but for the launcher, which waits for the process as long as it stands still.
    """
    return "returned" in moments and set(members(mark)) == {launcher_pid, int(moments["pid"])}


def alive(pid: int) -> bool:
    """Tell whether a process is there and no zombie."""
    try:
        return stat(pid)[0] not in "ZX"
    except OSError:
        return False


def ask(mark: str) -> str:
    """Return the processes of a job that hangs, after letting its ranks say where they are."""
    found = []
    for pid, name in members(mark).items():
        try:
            state = stat(pid)[0]
            waits = Path(f"/proc/{pid}/wchan").read_text()
        except OSError:
            continue
        found.append(f"process {pid}: {state} {waits} {name[:150]}\n")
        try:
            status = Path(f"/proc/{pid}/status").read_text()
            caught = int(re.findall(r"SigCgt:\s*(\w+)", status)[0], 16)
            if caught >> (signal.SIGUSR1 - 1) & 1 and "soak_rank" in command(pid):
                os.kill(pid, signal.SIGUSR1)
        except (OSError, IndexError):
            continue
    time.sleep(3)
    return "".join(found)


def stat(pid: int) -> list[str]:
    """Return the fields of /proc/PID/stat from the state on."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()


def command(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")


def remains(memory: Path, before: set[str]) -> tuple[str, ...]:
    """Return what a job has left in /dev/shm, and remove its folder there.

    Files of MPI's usual names belong to other jobs of this machine: this one's are in `memory`.
    """
    end = time.monotonic() + 3
    while True:
        own = [str(path) for path in memory.iterdir()]
        new = set(os.listdir("/dev/shm")) - before - {memory.name}
        others = ("sm_segment.", "mpich_shm_", "soak-")
        files = (*own, *(f"/dev/shm/{name}" for name in sorted(new) if not name.startswith(others)))
        if not files or time.monotonic() > end:
            break
        time.sleep(0.05)
    for path in memory.iterdir():
        path.unlink()
    memory.rmdir()
    return files


# -- the command line ----------------------------------------------------------------------


def main() -> int:
    parser = argparse.ArgumentParser(description="Spoil training runs; see the module.")
    parser.add_argument("--first", type=int, default=0, help="number of the first run (default: 0)")
    parser.add_argument("--runs", type=int, default=200, help="how many (default: 200)")
    parser.add_argument("--seconds", type=float, help="begin no run after so many seconds")
    parser.add_argument("--verbose", action="store_true", help="print what every job has said")
    options = parser.parse_args()
    start = time.monotonic()
    tally: Counter[str] = Counter()
    bad = []
    for number in range(options.first, options.first + options.runs):
        if options.seconds is not None and time.monotonic() - start > options.seconds:
            print(f"{number - options.first} runs in time; the next is --first {number}")
            break
        case = case_of(number)
        with tempfile.TemporaryDirectory(prefix="soak-") as name:
            folder = Path(name)
            train = [str(ROOT / "train.py"), "--checkpoint", str(folder / "checkpoints")]
            seen = play(case, folder, train)
        wrong = judge(case, seen)
        outcome = "spoilt" if seen.spoilt else "ended before"
        tally[outcome] += 1
        took = f"{seen.ended - seen.fault:.1f} s after" if seen.fault is not None else "no fault"
        print(f"{case}: {outcome}, status {seen.status}, {took}", flush=True)
        if wrong or options.verbose:
            print(*(f"    {line}" for line in (*wrong, *seen.stderr.splitlines())), sep="\n")
        if wrong:
            bad.append(number)
    shown = ", ".join(f"{count} {outcome}" for outcome, count in sorted(tally.items()))
    print(f"{shown}; {len(bad)} went wrong{': ' + ', '.join(map(str, bad)) if bad else ''}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
