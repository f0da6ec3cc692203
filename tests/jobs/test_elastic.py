"""Training goes on without ranks that were killed, and comes to what their absence makes of it."""

import copy
import random
from collections.abc import Callable
from typing import Any

import pytest

TRAINING = """
import hashlib
import torch
from torch import nn
from ringfold import DataParallel
from ringfold.parallel.optimizer_state import broadcast_optimizer
from ringfold.parallel.sampler import part_bounds

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
    first, end = part_bounds(BATCH, comm.rank, comm.size)
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
    done, lost = 0, None
    while done < STEPS or not world.finished():
        try:
            if done < STEPS:
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


@pytest.mark.timeout(150)
# Not part of make test yet: now and then mpirun ends with status 1 though all survivors ended well.
@pytest.mark.slow
@pytest.mark.parametrize("runs", [1, 50])
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
        done = job(4, tmp_path / "elastic.py", *deaths, timeout=60, ft=True)
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
