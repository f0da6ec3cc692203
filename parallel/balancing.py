"""Choose the stages of a pipeline: by given boundaries, or by what its layers cost."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from .layer_costs import kept_bytes, layer_seconds, parameter_bytes
from .layers import Named
from .messages import broadcast_value
from .partition import balance
from .replicas import check_equal
from .structure import take_apart

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["BALANCES", "balanced_stages"]


@dataclass(frozen=True)
class _Question:
    named: Named
    in_flight: Sequence[int]
    sample: Any


def balanced_stages(
    named: Named, comm: Communicator, by: str, in_flight: Sequence[int], sample: Any = None
) -> tuple[range, ...]:
    """Cut layers into len(in_flight) stages, the most expensive as cheap as can be; none is empty.

    by: "parameters": their number. "time": seconds of a layer's forward and backward, measured.
        "memory": bytes of parameters and gradients, and `in_flight[stage]` times the bytes of
        activations that a micro-batch leaves for its backward, measured; what crosses an edge
        counts on the stage that makes it.
    sample: a micro-batch as the first layer takes it, needed on rank 0 of `comm` for what is
        measured. All ranks measure at once, as they will compute at once, and take the mean.

    Collective over `comm`, whose ranks come to the same stages. ValueError on every rank for
    another word, for no sample, for a layer that raises, and for fewer layers than stages.
    """
    if by not in BALANCES:
        raise ValueError(f"unknown balance {by!r}, expected one of: {', '.join(BALANCES)}")
    cost, measured = BALANCES[by]
    num_stages = len(in_flight)
    balance([0.0] * len(named), num_stages)  # too few layers show before anything is measured
    if not measured:
        return balance(cost(_Question(named, in_flight, None)), num_stages)
    if not comm.broadcast(np.array([sample is not None]), root=0)[0]:
        raise ValueError(f"balance {by!r} measures layers on a micro-batch: give it as sample")

    def taken_apart() -> list[str]:
        if comm.rank == 0:
            take_apart(sample, "sample")
        return []

    check_equal(comm, taken_apart, f"balance {by!r}")
    sample = broadcast_value(comm, sample, 0, "sample")
    costs = np.zeros((num_stages, len(named)))

    def measure() -> list[str]:
        costs[:] = cost(_Question(named, in_flight, sample))
        return []

    check_equal(comm, measure, f"balance {by!r}")
    return balance(comm.allreduce(costs, op="mean").tolist(), num_stages)


def _numbers(question: _Question) -> list[float]:
    return [float(sum(p.numel() for p in layer.parameters())) for _, layer in question.named]


def _seconds(question: _Question) -> list[float]:
    return layer_seconds(question.named, question.sample)


def _bytes(question: _Question) -> list[list[float]]:
    held = np.array(parameter_bytes(question.named))
    kept = np.array(kept_bytes(question.named, question.sample))
    return [(held + count * kept).tolist() for count in question.in_flight]


# What a layer costs, on all stages or on each, and whether that is measured.
BALANCES: Mapping[str, tuple[Callable[[_Question], Any], bool]] = {
    "parameters": (_numbers, False),
    "time": (_seconds, True),
    "memory": (_bytes, True),
}
