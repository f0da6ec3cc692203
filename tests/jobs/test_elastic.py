"""Training goes on without ranks that were killed, and comes to what their absence makes of it."""

import copy
import json
import random
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ringfold import Elastic

TRAINING = """
import hashlib
import torch
from torch import nn
from ringfold import DataParallel
from ringfold.comm.chunks import bounds
from ringfold.parallel.optimizer_state import broadcast_optimizer

STEPS, BATCH = 30, 12

def network():
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 40), nn.Tanh(), nn.Linear(40, 2))

def make():
    model = network()
    return model, torch.optim.AdamW(model.parameters(), lr=0.01)

def one_step(engine, optimizer, comm, step):
    # The same samples whatever the number of ranks; uneven shares count by samples.
    x = torch.randn(BATCH, 6, generator=torch.Generator().manual_seed(step))
    first, end = bounds(BATCH, comm.size, comm.rank)
    optimizer.zero_grad()
    with engine.weighted(end - first):
        engine(x[first:end]).square().mean().backward()
    optimizer.step()

def digest(model):
    data = b"".join(p.detach().numpy().tobytes() for p in model.parameters())
    return hashlib.sha256(data).hexdigest()
"""

ELASTIC = """
import os, signal, sys, time
import ringfold
from training import *

deaths = dict(pair.split(":") for pair in sys.argv[1:])  # rank at the start -> step
began = os.environ["OMPI_COMM_WORLD_RANK"]
with ringfold.Elastic() as world:
    model, optimizer = make()
    engine = DataParallel(model, world.comm, bucket_bytes=500)
    done, lost, finished = 0, None, False
    while not finished:
        try:
            if done == STEPS:
                finished = world.finished()
            else:
                if deaths.get(began) == str(done):
                    os.kill(os.getpid(), signal.SIGKILL)
                one_step(engine, optimizer, world.comm, done)
                done += 1
                if lost is not None:
                    print("went on after", time.time() - lost, flush=True)
                    lost = None
        except ringfold.PeerLost:
            lost = time.time()
            loss = world.recover(done)
            done = loss.done
            engine.detach()
            engine = DataParallel(model, world.comm, bucket_bytes=500, root=loss.root)
            broadcast_optimizer(optimizer, world.comm, root=loss.root)
            print("LOST", *loss.ranks, "AT", done, "LEFT", loss.size, flush=True)
    print("END", digest(model), flush=True)
"""


def expected(sizes: list[int]) -> str:
    """Return the digest of a run whose step i has sizes[i] ranks by schedule."""
    from ringfold import Settings, run_local

    space: dict[str, Any] = {}
    exec(TRAINING, space)
    settings = Settings(shared=False, compiled=False)
    model, optimizer = space["make"]()
    step = 0
    while step < len(sizes):
        start = model, optimizer
        same = next((i for i in range(step, len(sizes)) if sizes[i] != sizes[step]), len(sizes))

        def main(comm: Any, first: int = step, end: int = same, start: Any = start) -> Any:
            own, own_optimizer = copy.deepcopy(start)
            engine = space["DataParallel"](own, comm, bucket_bytes=500)
            for number in range(first, end):
                space["one_step"](engine, own_optimizer, comm, number)
            return own, own_optimizer

        model, optimizer = run_local(sizes[step], main, settings=settings)[0]
        step = same
    return str(space["digest"](model))


@pytest.mark.timeout(3000)
@pytest.mark.slow
@pytest.mark.parametrize("runs", [50])
def test_two_of_four_ranks_die_and_the_weights_are_those_of_the_same_membership(
    job: Callable[..., Any], tmp_path: Any, runs: int
) -> None:
    (tmp_path / "training.py").write_text(TRAINING)
    (tmp_path / "elastic.py").write_text(ELASTIC)
    draw = random.SystemRandom()
    for _ in range(runs):
        first, second = sorted(draw.sample(range(1, 30), 2))
        dying = draw.sample(range(4), 2)
        deaths = [f"{rank}:{step}" for rank, step in zip(dying, (first, second), strict=True)]
        done = job(4, tmp_path / "elastic.py", *deaths, timeout=100, ft=True)
        assert done.returncode == 0 and not done.leftovers, (deaths, done.output)
        lines = done.stdout.splitlines()
        ends = {line for line in lines if line.startswith("END")}
        sizes = [4] * first + [3] * (second - first) + [2] * (30 - second)
        assert ends == {f"END {expected(sizes)}"}, (deaths, done.output)
        assert sum(line.startswith("END") for line in lines) == 2
        assert all(float(line.split()[-1]) < 5 for line in lines if line.startswith("went on"))


def test_without_fault_tolerance_an_error_at_the_start_says_so(job: Callable[..., Any]) -> None:
    done = job(1, "import ringfold; ringfold.Elastic()")
    assert done.returncode != 0 and "mpirun --with-ft ulfm" in done.stderr


STARTING = """
import os, signal, sys
import ringfold
from ringfold.comm.communicator import Communicator

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

if os.environ["OMPI_COMM_WORLD_RANK"] == "1":
    if sys.argv[1] == "before MPI":
        die()
    Communicator.of = die
try:
    ringfold.Elastic()
except ringfold.CommError as error:
    print(error)
    sys.exit(3)
"""


@pytest.mark.parametrize(
    ("moment", "status", "told"),
    [
        # The others may have seen it alive, or not yet.
        ("before MPI", 1, r"for MPI to start, but rank 1 (ended before it did|\(.*\) has died)"),
        ("opening", 3, "a rank has died before all had opened Elastic, which ends the job: "),
    ],
)
def test_a_rank_that_dies_at_the_start_ends_the_job(
    job: Callable[..., Any], moment: str, status: int, told: str
) -> None:
    done = job(3, STARTING, moment, ft=True, timeout=100)
    assert done.returncode == status and not done.leftovers, done.output
    assert re.search(told, done.output), done.output


LEAVING = """
import os, signal, sys
import numpy as np
import ringfold

began = int(os.environ["OMPI_COMM_WORLD_RANK"])
signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
with ringfold.Elastic() as world:
    done = 0
    while done < 9:
        try:
            if done == 3 and began == 1:
                print("told to end")
                os.kill(os.getpid(), signal.SIGTERM)
            if done == 6:
                sys.exit(7)
            world.comm.allreduce(np.ones(3))
            world.commit()
            done += 1
        except ringfold.PeerLost:
            loss = world.recover(done)
            done = loss.done
            print("LOST", *loss.ranks, "AT", done, "LEFT", loss.size, flush=True)
"""


def test_a_rank_that_ends_by_itself_is_lost_and_the_status_is_that_of_who_is_left(
    job: Callable[..., Any],
) -> None:
    done = job(3, LEAVING, ft=True, timeout=100)
    assert not done.leftovers, done.output
    assert done.returncode == 7, done.output
    lines = done.stdout.splitlines()
    assert lines.count("told to end") == 1
    assert lines.count("LOST 1 AT 3 LEFT 2") == 2


JOINING = """
import os, signal, sys
from pathlib import Path
import numpy as np
import ringfold

moment, dying, mark = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])

def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)

def arm(world):  # to die once others have been started
    if moment == "met":
        world._survivors.open = die
    elif moment == "told":
        progress = world._progress
        world._progress = lambda *done: (progress(*done), die())
    else:
        setattr(world, moment, die)

with ringfold.Elastic(command=[sys.executable, *sys.orig_argv[1:]]) as world:
    done = world.losses[-1].done if world.joined else 0
    while done < 4:
        try:
            if done == 2 and world.comm.rank == 1 and not mark.exists():
                mark.touch()
                die()
            world.comm.allreduce(np.ones(3))
            world.commit()
            done += 1
        except ringfold.PeerLost:
            if world.comm.rank == dying and not world.joined and not world.losses:
                arm(world)
            loss = world.recover(done)
            done = loss.done
            print("LOST", *loss.ranks, "JOINED", loss.joined, flush=True)
    for loss in world.losses:
        print("END", world.comm.rank, world.joined, loss.done, loss.joined, flush=True)
"""


@pytest.mark.parametrize(("moment", "dying"), [("met", 2), ("_progress", 0), ("told", 2)])
def test_who_joins_recovers_with_the_others_where_one_dies_meanwhile(
    job: Callable[..., Any], tmp_path: Path, moment: str, dying: int
) -> None:
    """It ended with a word that the job was ended, which went on, and so mpirun's status told.

    Or it waited for ever for one that had gone on to recover.
    """
    done = job(3, JOINING, moment, dying, tmp_path / "died", ft=True, timeout=50)
    assert done.returncode == 0 and not done.leftovers, done.output
    lines = [line for line in done.stdout.splitlines() if line.startswith(("LOST", "END"))]
    assert sorted(lines) == [
        "END 0 False 2 2",
        "END 1 True 2 2",
        "END 2 True 2 2",
        f"LOST 1 {dying} JOINED 2",
    ], done.output


def test_who_joins_when_all_others_have_died_says_that_there_is_nothing_to_go_on_from(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    done = job(2, JOINING, "_progress", 0, tmp_path / "died", ft=True, timeout=50)
    assert done.returncode != 0 and not done.timed_out and not done.leftovers, done.output
    assert "all ranks have died but those started in place of dead ones" in done.stderr


AT_THE_END = """
import os, signal, time
import numpy as np
import ringfold

steps, me = 3, os.environ["OMPI_COMM_WORLD_RANK"]

def step(world, done):
    world.comm.allreduce(np.ones(3))
    world.commit()
    if done == steps - 1 and me == "2":
        time.sleep(1)  # the others ask meanwhile whether all have finished
        os.kill(os.getpid(), signal.SIGKILL)

LOOP
    print("END", done, world.comm.size, *world.losses[0].ranks)
"""


def test_a_rank_dies_behind_the_last_step_of_the_loop_that_the_docstring_shows(
    job: Callable[..., Any],
) -> None:
    """Its end was asked for outside of `try`, so that the loss of a rank there ended the others."""
    lines = (Elastic.__doc__ or "").splitlines()
    loop = textwrap.dedent("\n".join(line for line in lines if line.startswith(" " * 8)))
    loop, steps = re.subn(r"\.\.\. +# one step .*", "step(world, done)", loop)
    assert steps == 1, loop
    done = job(3, AT_THE_END.replace("LOOP", loop), ft=True, timeout=100)
    assert done.returncode == 0 and not done.leftovers, done.output
    assert done.stdout.splitlines().count("END 3 2 2") == 2, done.output


TRAIN = Path(__file__).parents[2] / "train.py"

# Ranks of the first world are killed as by `kill -9` in a step: before it, or with its gradients;
# or between a recovery that has ended and the next step; or before the first.
KILLED = f"""
import os, runpy, signal, sys
import ringfold
from ringfold.workloads import engines, report

deaths, size, *sys.argv[1:] = sys.argv[1:]
deaths = {{tuple(pair.split(":")) for pair in deaths.split(",")}}
# Those that are started later have a world of their own.
me = os.environ["OMPI_COMM_WORLD_RANK"] if os.environ["OMPI_COMM_WORLD_SIZE"] == size else "none"

def dying(cls):
    begin_at, step = cls.begin_at, cls.step

    def begin(self, number):
        self.number, self.begun = number, getattr(self, "begun", 0) + 1
        begin_at(self, number)
        if number and self.begun == 2:  # the last thing of a recovery, and the first of training
            die(self, "dealt")

    def die(self, place):
        if (me, str(self.number), place) in deaths:
            os.kill(os.getpid(), signal.SIGKILL)

    def one(self, x, y):
        die(self, "before")
        loss = step(self, x, y)
        die(self, "after")
        self.number += 1
        return loss

    cls.begin_at, cls.step = begin, one

dying(engines.Replicas)
dying(engines.Stages)

make_engine = engines.make_engine

made_so_far = []

def making(*arguments):
    made = make_engine(*arguments)
    made_so_far.append("again" if made_so_far else "start")
    if (me, made_so_far[-1], "made") in deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return made

engines.make_engine = making

finished, write = ringfold.Elastic.finished, report.write

def agreed(self):
    done = finished(self)
    if done and (me, "end", "agreed") in deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    return done

def writing(*arguments):
    if (me, "end", "writing") in deaths:
        os.kill(os.getpid(), signal.SIGKILL)
    write(*arguments)

ringfold.Elastic.finished, report.write = agreed, writing
sys.argv[0] = {str(TRAIN)!r}
runpy.run_path({str(TRAIN)!r}, run_name="__main__")
"""


@pytest.fixture
def killed(job: Callable[..., Any], tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """Run train.py --elastic on four ranks, some of which die, and return its report."""

    def run(deaths: str, *options: object, env: Any = None) -> dict[str, Any]:
        path = tmp_path / "report.json"
        arguments = (deaths, 4, "--steps", 24, "--report", path, *options)
        done = job(4, KILLED, *arguments, ft=True, timeout=170, env=env)
        assert done.returncode == 0 and not done.leftovers, (deaths, done.output)
        report: dict[str, Any] = json.loads(path.read_text())
        assert len(report["losses"]) == report["steps"] == 24
        return report

    return run


def planned(job: Callable[..., Any], tmp_path: Path, departures: str, *options: object) -> Any:
    """Run train.py with the same membership by schedule, and return its report."""
    path = tmp_path / "planned.json"
    done = job(
        4, TRAIN, "--steps", 24, "--membership", departures, "--report", path, *options, timeout=170
    )
    assert done.returncode == 0 and not done.leftovers, done.output
    return json.loads(path.read_text())


SETTINGS: tuple[dict[str, str], ...] = (
    {},
    {"RINGFOLD_SHARED": "0"},
    {"RINGFOLD_SHARED": "0", "RINGFOLD_COMPILED": "0"},
)


@pytest.mark.timeout(400 * 50)
@pytest.mark.parametrize("runs", [1, pytest.param(50, marks=pytest.mark.slow)])
def test_training_goes_on_without_two_of_four_ranks(
    job: Callable[..., Any], killed: Callable[..., Any], tmp_path: Path, runs: int
) -> None:
    draw = random.SystemRandom()
    for number in range(runs):
        first, second = sorted(draw.sample(range(1, 24), 2))
        one, other = draw.sample(range(4), 2)
        place = draw.choice(("before", "after"))
        deaths = f"{one}:{first}:{place},{other}:{second}:before"
        found = killed(deaths, "--elastic", env=SETTINGS[number % len(SETTINGS)])
        expected = planned(job, tmp_path, f"{one}:{first},{other}:{second}")
        assert found["weights_sha256"] == expected["weights_sha256"], deaths
        assert found["losses"] == expected["losses"], deaths
        shown = [(event["event"], event["rank"], event["step"]) for event in found["events"]]
        assert shown == [("died", one, first), ("died", other, second)]
        assert all(event["host"] and event["seconds"] > 0 for event in found["events"])
        assert found["ranks"] == 2


@pytest.mark.slow
@pytest.mark.timeout(400)
def test_what_a_recovery_has_dealt_out_is_not_lost_with_a_rank_that_dies_before_the_next_step(
    job: Callable[..., Any], killed: Callable[..., Any], tmp_path: Path
) -> None:
    wire = ("--wire", "topk:0.1", "--bucket-mb", 0.05)
    found = killed("1:9:before,2:9:dealt", "--elastic", *wire)
    expected = planned(job, tmp_path, "1:9,2:9", *wire)
    assert found["weights_sha256"] == expected["weights_sha256"]
    assert found["losses"] == expected["losses"]


@pytest.mark.parametrize(
    "place, told",
    [pytest.param("agreed", [], marks=pytest.mark.slow), ("writing", [("died", 0, 24)])],
)
def test_the_report_is_written_whoever_dies_in_the_end(
    killed: Callable[..., dict[str, Any]], place: str, told: list[Any]
) -> None:
    """Of three ranks that had begun, since one has died before, and of which a tree takes two."""
    found = killed(f"3:start:made,0:end:{place}", "--elastic", "--reduction", "tree")
    assert (found["data"], found["pipe"]) == (2, 1)
    assert [(event["event"], event["rank"], event["step"]) for event in found["events"]] == told


@pytest.mark.timeout(250)
def test_a_pipeline_goes_on_from_the_living_replica_and_takes_in_a_new_rank(
    killed: Callable[..., Any],
) -> None:
    """Also in place of one that has died before the first step."""
    # The digest of the weights is refused where replicas differ.
    found = killed("3:start:made,1:7:after", "--pipe", 2, "--elastic", "grow")
    assert (found["ranks"], found["data"], found["pipe"]) == (4, 2, 2)
    shown = [(event["event"], event["rank"], event["step"]) for event in found["events"]]
    assert shown == [("died", 1, 7), ("joined", 4, 7)]


@pytest.mark.slow
@pytest.mark.timeout(250)
def test_ranks_that_join_recover_where_another_dies_meanwhile(killed: Callable[..., Any]) -> None:
    """They ended with a traceback, and were told of as ranks that had died."""
    found = killed("3:7:before,1:again:made", "--elastic", "grow")
    assert (found["ranks"], found["data"]) == (4, 4)
    shown = [(event["event"], event["rank"], event["step"]) for event in found["events"]]
    assert shown == [("died", 3, 7), ("joined", 4, 7), ("died", 1, 7), ("joined", 5, 7)]


@pytest.mark.slow
@pytest.mark.timeout(500)
def test_a_pipeline_goes_on_with_fewer_ranks_or_from_its_checkpoint(
    job: Callable[..., Any], killed: Callable[..., Any], tmp_path: Path
) -> None:
    found = killed("2:7:before", "--pipe", 2, "--elastic")
    expected = planned(job, tmp_path, "2:7", "--pipe", 2)
    assert (found["data"], found["pipe"]) == (1, 2)
    assert found["weights_sha256"] == expected["weights_sha256"]
    # Both replicas of the second stage die: what it held is on the disk only.
    store = ("--checkpoint", tmp_path / "store", "--every", 5)
    found = killed("1:12:before,3:12:before", "--pipe", 2, "--elastic", *store)
    assert (found["data"], found["pipe"]) == (1, 2)
    assert found["events"][0]["lost"] == "all since the checkpoint of step 10"
