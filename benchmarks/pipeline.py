"""Every pipeline plan: throughput, and the bubble beside the plan's own, and torch's pipelines.

    mpirun -n 2 python benchmarks/pipeline.py [--microbatches 8] [--width 1024] [--peers gloo]
        [--json FILE] [--plot FILE]

As many equal stages as ranks, each of some square layers; by the interleaved plan twice as many of
half the layers, if these are an even number. A step is a batch's forward and backward.
alone: one process with the whole model, one micro-batch after the other, while the others sleep.
busy: every rank runs its stage for all micro-batches at once with all others, and nobody waits for
anybody.  ours: ringfold.Pipeline by each plan of ringfold.parallel.PLANS.  torch: the same plans of
torch.distributed.pipelining, on gloo.

The measured bubble is the share of a step in which a rank is not busy, 1 - busy / step; messages
are part of it.  The simulated one is that of the plan, with messages that take no time and a
backward twice as long as a forward.  Losses and gradients are compared with the unsplit model's.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from harness import Contender, contest, table, verdict, write_json
from options import parser_of, read
from peers import gloo
from plots import plot_pipelines
from torch import Tensor, nn
from training import Alone

import ringfold
from ringfold.output import status_of
from ringfold.parallel import PLANS
from ringfold.parallel.plan import whole_plan
from ringfold.parallel.plan_check import check_plan, num_stages_of
from ringfold.workloads.numbers import whole

TORCH = {"gpipe": "ScheduleGPipe", "1f1b": "Schedule1F1B"}
"""Plan -> the class of torch.distributed.pipelining that follows it with one stage a rank."""

BACKWARD_COST = 2.0
"""Of a forward: a backward multiplies twice, for the input's and for the weight's gradient."""

loss_fn = nn.functional.mse_loss


def stages_per_rank(plan: str) -> int:
    """Return how many stages a rank has by this plan."""
    return num_stages_of(whole_plan(PLANS[plan], 1, 1))


class Work:
    """The model, its batch, and what its loss and gradients are; the same on every rank."""

    def __init__(self, num_stages: int, arguments: argparse.Namespace) -> None:
        self.microbatches, self.per_stage = arguments.microbatches, arguments.layers
        self.num_stages = num_stages
        self.rows = arguments.rows * self.microbatches
        self.arguments = arguments
        generator = torch.Generator().manual_seed(1)
        self.x, self.y = torch.randn(2, self.rows, arguments.width, generator=generator)
        self.whole = self.fresh()
        loss = loss_fn(self.whole(self.x), self.y)
        loss.backward()
        self.loss = float(loss.detach())
        self.gradients = {
            name: parameter.grad.clone() for name, parameter in self.whole.named_parameters()
        }

    def fresh(self) -> nn.Sequential:
        torch.manual_seed(0)
        width = self.arguments.width
        count = self.per_stage * self.num_stages
        return nn.Sequential(
            *(nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(count))
        )

    def boundaries(self, stages_per_rank: int) -> list[int]:
        """Return the first layer of every stage but the first."""
        per_stage = self.per_stage // stages_per_rank
        return [stage * per_stage for stage in range(1, self.num_stages * stages_per_rank)]

    def plans(self) -> list[str]:
        """Return the names of the plans into whose equal stages the layers can be cut."""
        return [plan for plan in PLANS if self.per_stage % stages_per_rank(plan) == 0]

    def stage(self, index: int) -> nn.Sequential:
        """Return the layers of one stage, under their names in the whole model."""
        first = index * self.per_stage
        named = list(self.fresh().named_children())[first : first + self.per_stage]
        stage = nn.Sequential()
        for name, layer in named:
            stage.add_module(name, layer)
        return stage

    def wrong(self, named: Any, loss: float | None) -> int:
        """Count the gradients that are not those of the whole model, and a loss that is not."""
        count = int(loss is not None and abs(loss - self.loss) > 1e-5 * abs(self.loss))
        for name, parameter in named:
            right = self.gradients[name]
            scale = float(right.abs().max())
            near = torch.isclose(parameter.grad, right, rtol=1e-3, atol=1e-4 * scale)
            count += int((~near).sum())
        return count


def in_turn(model: nn.Module, x: Tensor, y: Tensor, microbatches: int) -> None:
    """Forward and backward of one micro-batch after the other."""
    for part, target in zip(x.chunk(microbatches), y.chunk(microbatches), strict=True):
        (loss_fn(model(part), target) / microbatches).backward()


def ours(mesh: ringfold.Mesh, work: Work, plan: str) -> Contender:
    """Line up ringfold.Pipeline by one plan."""
    engine = ringfold.Pipeline(
        work.fresh(),
        mesh,
        loss_fn=loss_fn,
        microbatches=work.microbatches,
        schedule=plan,
        boundaries=work.boundaries(stages_per_rank(plan)),
    )
    return Contender(
        "ours",
        lambda: float(engine.step(work.x, work.y)),
        prepare=engine.zero_grad,
        wrong=lambda loss: work.wrong(engine.named_parameters(), loss),
        algorithm=plan,
    )


def torchs(comm: ringfold.Communicator, work: Work, plan: str) -> Contender:
    """Line up torch's own pipeline by one plan."""
    from torch.distributed import pipelining

    module = work.stage(comm.rank)
    last = comm.rank == comm.size - 1
    stage = pipelining.PipelineStage(module, comm.rank, comm.size, torch.device("cpu"))
    schedule = getattr(pipelining, TORCH[plan])(stage, work.microbatches, loss_fn=loss_fn)

    def run() -> float | None:
        losses: list[Tensor] = []
        # A middle stage has neither.
        inputs = (work.x,) if comm.rank == 0 else ()
        targets: Mapping[str, Any] = {"target": work.y, "losses": losses} if last else {}
        schedule.step(*inputs, **targets)
        return float(torch.stack(losses).mean().detach()) if last else None

    return Contender(
        "torch",
        run,
        prepare=module.zero_grad,
        wrong=lambda loss: work.wrong(module.named_parameters(), loss),
        algorithm=plan,
    )


def compare(
    comm: ringfold.Communicator, alone: Alone, arguments: argparse.Namespace
) -> list[dict[str, Any]]:
    """Run the contest of all plans."""
    work = Work(comm.size, arguments)
    mesh = ringfold.Mesh(comm, data=1, pipe=comm.size)
    stage = work.stage(comm.rank)
    count = work.microbatches
    inputs = work.x.clone().requires_grad_(comm.rank > 0)
    lined = [
        alone.contender(lambda: in_turn(work.whole, work.x, work.y, count)),
        Contender("busy", lambda: in_turn(stage, inputs, work.y, count), prepare=stage.zero_grad),
        *(ours(mesh, work, plan) for plan in work.plans()),
    ]
    if "gloo" in arguments.peers and comm.size > 1:
        lined += [torchs(comm, work, plan) for plan in TORCH if plan in PLANS]
    outcomes = contest(comm, lined, repeats=arguments.repeats, budget=arguments.budget)
    busy = next(o.timing.median for o in outcomes if o.contender.impl == "busy")
    rows = []
    for outcome in outcomes:
        timing, plan = outcome.timing, outcome.contender.algorithm
        is_plan = plan in PLANS
        rows.append(
            {
                "impl": outcome.contender.impl,
                "plan": plan,
                "ranks": comm.size,
                "microbatches": count,
                "width": arguments.width,
                "rows": work.rows,
                "median_us": timing.median * 1e6,
                "p99_us": timing.p99 * 1e6,
                "samples_per_second": work.rows / timing.median,
                "bubble": 1 - busy / timing.median if is_plan else 0.0,
                "simulated_bubble": simulated_bubble(plan, comm.size, count) if is_plan else 0.0,
                "wrong": outcome.wrong,
                "repeats": timing.repeats,
            }
        )
    mesh.close()
    return rows


def simulated_bubble(plan: str, num_stages: int, microbatches: int) -> float:
    """Return the idle share of a plan, by its own arithmetic."""
    stages = whole_plan(PLANS[plan], num_stages, microbatches)
    return check_plan(stages, microbatches, backward_cost=BACKWARD_COST).bubble


COLUMNS = {
    "impl": "s",
    "plan": "s",
    "ranks": "d",
    "microbatches": "d",
    "rows": "d",
    "median_us": ".0f",
    "p99_us": ".0f",
    "samples_per_second": ".0f",
    "bubble": ".3f",
    "simulated_bubble": ".3f",
    "wrong": "d",
}


def main() -> int:
    """Run the benchmark; status 1 where a loss or a gradient was wrong."""
    parser = parser_of(__doc__, peers=True, budget=15.0)
    parser.add_argument("--microbatches", type=whole(1), default=8)
    parser.add_argument("--width", type=whole(1), default=1024, help="of the layers")
    parser.add_argument("--layers", type=whole(1), default=2, help="of a stage")
    parser.add_argument("--rows", type=whole(1), default=256, help="of a micro-batch")
    arguments = read(parser)
    torch.set_num_threads(1)
    with ringfold.Communicator() as comm:
        alone = Alone(comm)
        with gloo(comm) if "gloo" in arguments.peers else nullcontext():
            rows = compare(comm, alone, arguments)
        alone.close()
        rank = comm.rank
    if rank == 0:
        print("times and bubble measured, simulated_bubble simulated; one thread a rank")
        print(table(rows, COLUMNS))
        if arguments.json:
            write_json(arguments.json, "pipeline", rows)
        if arguments.plot:
            plot_pipelines(arguments.plot, rows)
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("pipeline.py", main))
