"""What a communicator offers ends in PeerLost where a rank dies, and works on the next one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

SURVIVING = """
import os, signal, sys, time
import numpy as np
import ringfold

me = int(os.environ["OMPI_COMM_WORLD_RANK"])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def use(comm):
    rank, size = comm.rank, comm.size
    x = comm.empty(5000, np.float32)
    x[:] = np.arange(5000) % 7 + rank
    plan = comm.plan("allreduce", x)
    plan()
    assert (x == (np.arange(5000) % 7) * size + size * (size - 1) / 2).all()
    arrays = [np.full(30_000 * (i + 1), rank + i, np.float64) for i in range(3)]
    works = [comm.allreduce(a, blocking=False) for a in arrays]
    end = time.monotonic() + 30
    # Nobody waits for these: the background thread must bring them to their end.
    while not all(work.ended for work in works):
        assert time.monotonic() < end, "the background thread has ended no work"
        time.sleep(0.001)
    for i, array in enumerate(arrays):
        assert (array == size * (size - 1) / 2 + i * size).all()
    got = np.empty(70_000)
    coming = comm.irecv(got, (rank - 1) % size)
    comm.isend(np.full(70_000, float(rank)), (rank + 1) % size).wait()
    coming.wait()
    assert (got == (rank - 1) % size).all()
    part = comm.split(rank % 2)
    assert part.allreduce(np.array([1.0]))[0] == len(range(rank % 2, size, 2))
    return x, plan

def lose(world, dying, in_recovery=()):
    comm = world.comm
    x, plan = use(comm)
    before = x.copy()
    comm.barrier()
    if me in dying:
        time.sleep(0.2)  # the others wait by then
        die()
    started = [comm.allreduce(np.ones(n), blocking=False) for n in (3, 100_000)]
    started.append(comm.irecv(np.empty(4), comm.rank ^ 1 if (comm.rank ^ 1) < comm.size else 0))
    lost = 0
    for work in started:
        try:
            work.wait()
        except ringfold.PeerLost:
            lost += 1
    assert lost >= 1
    if me in in_recovery:
        world._survivors.shrink = die
    loss = world.recover(0)
    assert all(work.ended for work in started)
    for old in (plan, comm.barrier, lambda: comm.allreduce(np.ones(2))):
        try:
            old()
        except ringfold.CommError:
            continue
        raise AssertionError("a communicator that was given up goes on")
    assert (x == before).all()  # what it lay in is still there
    return loss

with ringfold.Elastic() as world:
    for dying, in_recovery in (((0,), ()), ((2, 3), ()), ((1,), (4,))):
        size = world.comm.size
        loss = lose(world, dying, in_recovery)
        assert len(loss.ranks) == len(dying) + len(in_recovery), loss
        assert loss.size == world.comm.size == size - len(loss.ranks)
    use(world.comm)
    print("END", me, world.comm.rank, world.comm.size, flush=True)
"""


@pytest.mark.timeout(200)
@pytest.mark.parametrize(
    "ways",
    [
        pytest.param({}, id="shared"),
        pytest.param({"RINGFOLD_SHARED": "0"}, id="messages", marks=pytest.mark.slow),
        pytest.param(
            {"RINGFOLD_SHARED": "0", "RINGFOLD_COMPILED": "0"}, id="plain", marks=pytest.mark.slow
        ),
    ],
)
def test_memory_plans_works_and_the_thread_outlive_rank_0_two_at_once_and_one_while_recovering(
    job: Callable[..., Any], ways: dict[str, str]
) -> None:
    done = job(7, SURVIVING, ft=True, timeout=150, env=ways)
    assert done.returncode == 0 and not done.leftovers, done.output
    ends = {line for line in done.stdout.splitlines() if line.startswith("END")}
    assert ends == {"END 5 0 2", "END 6 1 2"}, done.output


DYING_AGAIN = """
import os, signal, sys
import ringfold

if "early" in sys.argv and os.environ.get("OMPI_COMM_WORLD_SIZE") != "2":
    os.kill(os.getpid(), signal.SIGKILL)
with ringfold.Elastic(command=[sys.executable, *sys.orig_argv[1:]], attempts=2) as world:
    if world.joined or world.comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while True:
        try:
            world.comm.barrier()
        except ringfold.PeerLost:
            world.recover(7)
"""


@pytest.mark.timeout(200)
def test_what_is_started_in_vain_is_not_started_for_ever(job: Callable[..., Any]) -> None:
    done = job(2, DYING_AGAIN, ft=True, timeout=100)
    assert done.returncode not in (0, -9) and not done.timed_out and not done.leftovers, done.output
    assert "have died 2 times in a row, and nothing was done in between (7 steps" in done.stderr


ELSEWHERE = """
import os, signal, sys
from pathlib import Path
import ringfold

begun = Path.cwd()
Path("elsewhere").mkdir(exist_ok=True)
os.chdir("elsewhere")
with ringfold.Elastic(command=[sys.executable, *sys.orig_argv[1:]]) as world:
    if world.joined:
        print("BEGUN", begun, flush=True)
    elif world.comm.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    while not world.joined and not world.losses:
        try:
            world.comm.barrier()
        except ringfold.PeerLost:
            world.recover(7)
    world.comm.barrier()
"""


def test_who_is_started_begins_where_the_others_began_wherever_these_have_gone(
    job: Callable[..., Any], tmp_path: Path
) -> None:
    """A program that changes its folder, as Hydra does, got newcomers there.

    They did not find a script whose path is relative, and the others waited until time was up.
    """
    (tmp_path / "program.py").write_text(ELSEWHERE)
    done = job(
        2, Path("program.py"), ft=True, timeout=60, env={"RINGFOLD_TIMEOUT": "10"}, cwd=tmp_path
    )
    assert f"BEGUN {tmp_path}\n" in done.stdout and "waited" not in done.stderr, done.output


@pytest.mark.slow
@pytest.mark.timeout(200)
def test_a_process_that_never_opens_mpi_is_not_waited_for_for_ever(job: Callable[..., Any]) -> None:
    done = job(2, DYING_AGAIN, "early", ft=True, timeout=100, env={"RINGFOLD_TIMEOUT": "4"})
    assert done.returncode not in (0, -9) and not done.timed_out and not done.leftovers, done.output
    assert "of 1 processes started in place of dead ranks, not all have opened MPI" in done.stderr
