"""Training runs spoilt at random moments; and the judge of tests/soak.py, who must say no."""

import dataclasses
from pathlib import Path

import pytest
from soak import Case, Seen, case_of, judge, play

FIRST = 0
RUNS = 20

QUICK = """
import sys, time
import numpy as np
import ringfold

comm = ringfold.Communicator()
weights = comm.empty(1000, np.float64)
weights[:] = 1
for step in range(40):
    weights += comm.rank
    comm.allreduce(weights, op="mean")
    time.sleep(0.002)
comm.close()
"""


def test_runs_in_a_row_have_each_fault_at_each_moment() -> None:
    cases = [case_of(number) for number in range(56)]
    kinds = {(case.fault, case.moment.rstrip("0123456789")) for case in cases}
    assert len({fault for fault, _ in kinds}) == 7 and len(kinds) >= 7 * 7
    assert cases == [case_of(number) for number in range(56)]
    assert {case.ranks for case in cases} == {2, 3, 4} and {case.pipe for case in cases} > {1, 2}


KILLED = dataclasses.replace(case_of(0), fault="kill", victim=1)
HANDLED = "\n\nDuring handling of the above exception, another exception occurred:"
FINE = Seen(137, fault=5.0, returned=None, ended=5.5, stderr="process rank 1 ... was killed")


@pytest.mark.parametrize(
    "change, complaint",
    [
        ({}, None),
        ({"status": None}, "did not end"),
        ({"status": 0}, "status 0"),
        ({"status": 0, "returned": 5.1}, "status 0"),
        ({"status": 0, "returned": 4.9, "stderr": ""}, None),
        ({"fault": None}, "without a fault"),
        ({"stderr": "process rank 2 ... was killed"}, "no word of rank 1"),
        ({"stderr": "rank 1\nMismatchError: the ranks' calls differ"}, "another kind"),
        ({"stderr": "PeerLost: rank 1 (process 7 on here) has died"}, None),
        ({"stderr": f"KeyError: 'x'{HANDLED}\n\nPeerLost: rank 1 (process 7) has died"}, None),
        ({"stderr": f"PeerLost: rank 1 has died{HANDLED}\n\nKeyError: 'x'"}, "another kind"),
        ({"processes": ("7: python train.py",)}, "a process is left"),
        ({"files": ("/dev/shm/x",)}, "a file is left"),
    ],
)
def test_the_judge_says_no(change: dict[str, object], complaint: str | None) -> None:
    wrong = judge(KILLED, dataclasses.replace(FINE, **change))  # type: ignore[arg-type]
    assert bool(wrong) == (complaint is not None)
    assert complaint is None or complaint in wrong[0]


@pytest.mark.parametrize(
    "doctored, complaint",
    [
        ("try: time.sleep(60)\nexcept BaseException: sys.exit(0)", "status 0"),
        (
            "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN); time.sleep(60)",
            "did not end",
        ),
        (
            "import subprocess\nopen('/dev/shm/doctored', 'w').close()\n"
            "quiet = dict.fromkeys(('stdin', 'stdout', 'stderr'), subprocess.DEVNULL)\n"
            "subprocess.Popen(['sleep', '60'], start_new_session=True, **quiet)\ntime.sleep(60)",
            "a file is left",
        ),
    ],
    ids=["ends well", "hangs", "leaves things"],
)
def test_the_judge_says_no_to_doctored_jobs(tmp_path: Path, doctored: str, complaint: str) -> None:
    program = tmp_path / "program.py"
    program.write_text("import sys, time\n" + doctored + "\n")
    case = dataclasses.replace(
        case_of(0), fault="interrupt", ranks=1, victim=0, moment="start", delay=1.0, arguments=()
    )
    try:
        wrong = judge(case, play(case, tmp_path, [str(program)], limit=1))
    finally:
        Path("/dev/shm/doctored").unlink(missing_ok=True)
    assert any(complaint in line for line in wrong), wrong
    assert complaint != "a file is left" or any("a process is left" in line for line in wrong)


def quick(number: int) -> Case:
    """Return run `number` on 2 ranks of a program that trains without torch."""
    case = case_of(number)
    moment = "opened" if case.moment[-1].isdigit() else case.moment
    return dataclasses.replace(
        case, ranks=2, pipe=1, victim=case.victim % 2, moment=moment, cold=False, arguments=()
    )


@pytest.mark.parametrize("number", range(FIRST, FIRST + RUNS))
def test_a_spoilt_run_ends_and_says_why(tmp_path: Path, number: int) -> None:
    program = tmp_path / "program.py"
    program.write_text(QUICK)
    case = quick(number)
    seen = play(case, tmp_path, [str(program)])
    assert judge(case, seen) == [], (str(case), seen.stderr)
