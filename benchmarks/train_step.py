"""The time of a training step: alone, with our reduction, with torch's DDP on gloo, and without.

    mpirun -n 2 python benchmarks/train_step.py [--models mlp,transformer] [--sizes 4MiB]
        [--peers gloo] [--device cuda] [--json FILE] [--plot FILE]

alone: one process while the others sleep.  no_sync: all ranks at once, without any reduction; what
it takes more than alone is what ranks lose by sharing the memory and the cores.  limit: the same,
and then one planned allreduce of as many bytes in registered memory.  ours: with
ringfold.DataParallel.  ddp: torch.nn.parallel.DistributedDataParallel on gloo.  Every rank has a
batch of its own of the same size, so that alone / ours is the efficiency of weak scaling.

exposed: the time that a step takes more than without reduction.  Bucket by bucket: exposed is the
time that the reducer waits for the bucket, hidden is what the same reduction takes between idle
ranks, less what is exposed.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from harness import Contender, contest, measure, table, verdict, write_json
from options import names, parser_of, read
from peers import gloo
from plots import plot_bars
from torch import Tensor, nn
from training import Alone, Trainer, differing, limited, unsynchronised, wrapped

import ringfold
from ringfold.output import status_of
from ringfold.parallel.hooks import Rounds
from ringfold.workloads.devices import assign, count_gpus
from ringfold.workloads.options import UsageError


@dataclass(frozen=True)
class Model:
    """A model to train: its layers, one rank's batch, and its loss; widths are divided by scale."""

    make: Callable[[int], nn.Module]
    batch: Callable[[int, torch.Generator], tuple[Tensor, Tensor]]
    loss: Callable[[Tensor, Tensor], Tensor]


def mlp(scale: int) -> nn.Module:
    width = 2048 // scale
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, width), nn.ReLU()) for _ in range(3)),
        nn.Linear(width, width),
    )


def mlp_batch(scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    x, y = torch.randn(2, 32, 2048 // scale, generator=generator)
    return x, y


def transformer(scale: int) -> nn.Module:
    width = 256 // scale
    return nn.Sequential(
        nn.Embedding(256, width),
        *(
            nn.TransformerEncoderLayer(
                width, 4, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(6)
        ),
        nn.Linear(width, 256),
    )


def transformer_batch(scale: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    tokens = torch.randint(256, (4, 65), generator=generator)
    return tokens[:, :-1], tokens[:, 1:]


def cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits.flatten(0, 1), target.flatten())


MODELS: Mapping[str, Model] = {
    "mlp": Model(mlp, mlp_batch, nn.functional.mse_loss),
    "transformer": Model(transformer, transformer_batch, cross_entropy),
}


SCALES = (1, 2, 4, 8, 16, 32, 64)
"""Those that leave each of the transformer's four heads a whole width."""


class TimedWork:
    """A Work that notes when it is waited for, and how long."""

    def __init__(self, work: Any, note: Callable[[float], object]) -> None:
        self.receipt = work.receipt
        self._work, self._note = work, note

    def wait(self, timeout: float | None = None) -> Any:
        start = time.perf_counter()
        result = self._work.wait(timeout)
        self._note(time.perf_counter() - start)
        return result


def timed(work: Any, note: Callable[[float], object]) -> Generator[Any, Any, None]:
    yield TimedWork(work, note)


def buckets_of(
    comm: ringfold.Communicator,
    trainer: Trainer,
    x: Tensor,
    y: Tensor,
    steps: int,
) -> list[dict[str, Any]]:
    """Measure the reduction of every bucket, within steps and between idle ranks.

    trainer: of a model that is not wrapped yet.
    """
    seen: list[tuple[int, list[float]]] = []

    def hook(bucket: Any, comm: ringfold.Communicator) -> Any:
        waited: list[float] = []
        seen.append((bucket.flat.nbytes, waited))
        work = comm.allreduce(bucket.flat, "mean", blocking=False)
        return Rounds(timed(work, waited.append))

    if comm.size == 1:
        return []
    wrapped = ringfold.DataParallel(trainer.model, comm, wire=hook)
    trainer = Trainer(wrapped, trainer.loss, trainer.settle)
    for _ in range(3):  # buckets are laid out anew after the first steps
        seen.clear()
        trainer.step(x, y)
    first = [nbytes for nbytes, _ in seen]
    seen.clear()
    for _ in range(steps):
        trainer.step(x, y)
    record = wrapped.last_step
    assert record is not None
    spans = np.array([waited[0] for _, waited in seen]).reshape(steps, len(first))
    exposed = np.median(comm.allreduce(spans, "max"), axis=0)
    found = []
    for place, nbytes in enumerate(first):
        flat = torch.ones(nbytes // 4, device=x.device)
        alone = measure(
            comm,
            together(comm.plan("allreduce", flat, op="mean"), trainer.settle),
            prepare=together(lambda flat=flat: flat.fill_(1.0), trainer.settle),
        ).median
        found.append(
            {
                "nbytes": nbytes,
                "between_idle_ranks_us": alone * 1e6,
                "exposed_us": float(exposed[place]) * 1e6,
                "hidden_us": max(alone - float(exposed[place]), 0.0) * 1e6,
                "started_within_backward": place < record.overlapped,
            }
        )
    return found


def together(first: Callable[[], object], second: Callable[[], object]) -> Callable[[], object]:
    """Return what calls one after the other."""
    return lambda: (first(), second())


def compare(
    comm: ringfold.Communicator, alone: Alone, name: str, arguments: Any, device: torch.device
) -> list[dict[str, Any]]:
    """Run the contest of one model."""
    model = MODELS[name]
    batch = model.batch(arguments.scale, torch.Generator().manual_seed(1000 + comm.rank))
    x, y = (tensor.to(device) for tensor in batch)
    settle = torch.cuda.synchronize if device.type == "cuda" else lambda: None

    def fresh() -> nn.Module:
        torch.manual_seed(0)
        return model.make(arguments.scale).to(device)

    def trainer(module: nn.Module) -> Trainer:
        return Trainer(module, model.loss, settle)

    single = trainer(fresh())
    ours = wrapped(fresh, comm, arguments.sizes, trainer)
    free = trainer(ringfold.DataParallel(fresh(), comm))

    def step() -> None:
        unsynchronised(free, x, y)

    lined = [
        alone.contender(lambda: single.step(x, y)),
        Contender("no_sync", step),
        Contender("limit", limited(step, comm, free)),
        *(
            Contender(
                name,
                lambda trainer=trainer: trainer.step(x, y),  # type: ignore[misc]
                wrong=lambda _, trainer=trainer: differing(comm, trainer.model),  # type: ignore[misc]
            )
            for name, trainer in ours
        ),
    ]
    if "gloo" in arguments.peers:
        ddp = trainer(nn.parallel.DistributedDataParallel(fresh()))
        lined.append(
            Contender("ddp", lambda: ddp.step(x, y), wrong=lambda _: differing(comm, ddp.model))
        )
    outcomes = contest(comm, lined, repeats=arguments.repeats, warmup=4, budget=arguments.budget)
    medians = {outcome.contender.impl: outcome.timing.median for outcome in outcomes}
    rows: list[dict[str, Any]] = []
    for outcome in outcomes:
        impl, median = outcome.contender.impl, outcome.timing.median
        ranks = 1 if impl == "alone" else comm.size
        rows.append(
            {
                "impl": impl,
                "model": name,
                "parameters": sum(p.numel() for p in single.model.parameters()),
                "ranks": comm.size,
                "median_us": median * 1e6,
                "p99_us": outcome.timing.p99 * 1e6,
                "samples_per_second": ranks * len(x) / median,
                "efficiency": medians["alone"] / median,
                "exposed_us": (median - medians["no_sync"]) * 1e6
                if impl not in ("alone", "no_sync")
                else 0.0,
                "wrong": outcome.wrong,
                "repeats": outcome.timing.repeats,
                "device": "cpu" if device.type == "cpu" else torch.cuda.get_device_name(device),
            }
        )
    steps = min(arguments.repeats, 20)
    for row in rows:
        if row["impl"] == "ours":
            row["buckets"] = buckets_of(comm, trainer(fresh()), x, y, steps)
    return rows


COLUMNS = {
    "model": "s",
    "parameters": "d",
    "ranks": "d",
    "impl": "s",
    "median_us": ".0f",
    "p99_us": ".0f",
    "samples_per_second": ".1f",
    "efficiency": ".3f",
    "exposed_us": ".0f",
    "wrong": "d",
}
BUCKET_COLUMNS = {
    "nbytes": "d",
    "between_idle_ranks_us": ".0f",
    "exposed_us": ".0f",
    "hidden_us": ".0f",
    "started_within_backward": "",
}


def device_of(comm: ringfold.Communicator, named: str) -> torch.device:
    """Return where this rank trains; UsageError where a node has no GPU for it."""
    gpus = count_gpus() if named == "cuda" else 0
    return torch.device(assign(comm, gpus)[0])


def main() -> int:
    """Run the benchmark; status 1 where replicas have come to differ."""
    parser = parser_of(__doc__, sizes="", of="bytes of a bucket", peers=True, budget=15.0)
    parser.add_argument(
        "--models",
        type=names(MODELS),
        default=list(MODELS),
        help=f"(default: {','.join(MODELS)})",
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument(
        "--scale",
        type=int,
        default=1,
        choices=SCALES,
        help="divide the models' widths (default: %(default)s)",
    )
    arguments = read(parser)
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    with ringfold.Communicator() as comm:
        try:
            device = device_of(comm, arguments.device)
        except UsageError as error:
            if comm.rank == 0:
                print(f"benchmarks/train_step.py: {error}; nothing was measured", file=sys.stderr)
            return 77
        alone = Alone(comm)
        with gloo(comm) if "gloo" in arguments.peers else nullcontext():
            for name in arguments.models:
                rows += compare(comm, alone, name, arguments, device)
                if comm.rank == 0 and arguments.json:  # whatever becomes of the next model
                    write_json(arguments.json, "train_step", rows)
        alone.close()
        rank = comm.rank
    if rank == 0:
        print("measured; a step is forward, backward and SGD, one thread a rank")
        print(table(rows, COLUMNS))
        for row in rows:
            if row.get("buckets"):
                print(f"\nbuckets of {row['model']}, in the order in which they are reduced")
                print(table(row["buckets"], BUCKET_COLUMNS))
        if arguments.plot:
            for row in rows:
                row["median_ms"] = row["median_us"] / 1e3
            title = f"one training step, {rows[0]['ranks']} ranks"
            plot_bars(
                arguments.plot, rows, "model", "median_ms", "median time of a step, ms", title
            )
    return verdict(rows, speak=rank == 0)


if __name__ == "__main__":
    raise SystemExit(status_of("train_step.py", main))
