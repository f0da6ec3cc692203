"""What the ranks of a pipeline have to agree on, checked before anything of it is made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..comm.arguments import require, require_callable, whole
from ..comm.communicator import Communicator
from .hooks import WireFormat, WireHook, wire_format
from .layers import Named, named_layers
from .loss_scale import LossScaler
from .mesh import Mesh
from .plan import CheckedPlans, PlanFunction, plan_function
from .plan_check import num_stages_of
from .replicas import check_equal, describe
from .shared_weights import refuse_gradient_hooks
from .tensors import device_of

__all__ = ["Choices", "Outline"]

_LOSS_REDUCTIONS = ("mean", "sum")
_REDUCTIONS = ("bucket", "tree")


@dataclass(frozen=True)
class Choices:
    """What a Pipeline is asked for, as far as it must be equal on all ranks; see there."""

    microbatches: int
    has_loss: bool
    loss_reduction: str
    reduction: str
    boundaries: Sequence[int] | None
    balance: str
    recompute: bool | Collection[int]
    bucket_bytes: int
    wire_dtype: WireFormat | WireHook | None
    broadcast_buffers: bool
    check_finite: bool
    scales_loss: bool
    device: torch.device | str | None

    def check(self) -> None:
        """Raise ValueError or TypeError for what no rank can do."""
        if whole("microbatches", self.microbatches) < 1:
            raise ValueError(f"expected at least 1 micro-batch, got {self.microbatches}")
        _check_word("loss_reduction", self.loss_reduction, _LOSS_REDUCTIONS)
        _check_word("reduction", self.reduction, _REDUCTIONS)
        if self.reduction == "tree" and self.wire_dtype is not None:
            raise ValueError(
                f"reduction 'tree' adds gradients as they are, not as {self.wire_dtype}"
            )
        whole("bucket_bytes", self.bucket_bytes, 1)
        if self.boundaries is not None:
            require("boundaries", self.boundaries, Iterable, "[2, 5]")
        require("recompute", self.recompute, (bool, Iterable))
        wire_format(self.wire_dtype)

    def lines(self, layers: nn.Module) -> list[str]:
        """Describe them in words."""
        device = device_of(layers) if self.device is None else torch.device(self.device)
        boundaries = None if self.boundaries is None else list(map(index, self.boundaries))
        return [
            f"loss_fn {'given' if self.has_loss else 'none'} on last stages",
            f"loss_reduction {self.loss_reduction}",
            f"reduction {self.reduction}",
            f"boundaries {boundaries}",
            f"balance {self.balance}",
            f"bucket_bytes {self.bucket_bytes}",
            f"wire_dtype {wire_format(self.wire_dtype)}",
            f"broadcast_buffers {self.broadcast_buffers}",
            f"check_finite {self.check_finite}",
            f"loss_scaler {'given' if self.scales_loss else 'none'}",
            f"device {device.type}",
        ]


@dataclass(frozen=True)
class Outline:
    """What a pipeline is made of, the same on all its ranks.

    named: its layers by name.  plans: by number of micro-batches.
    again: the stages that recompute.
    """

    named: Named
    plans: CheckedPlans
    num_stages: int
    again: tuple[int, ...]

    @classmethod
    def agreed(
        cls,
        layers: nn.Sequential | nn.ModuleList | Sequence[nn.Module],
        mesh: Mesh,
        choices: Choices,
        schedule: str | PlanFunction,
        stages_per_rank: int | None,
        loss_fn: Any,
        loss_scaler: Any,
    ) -> Outline:
        """Work it out on every rank, and compare; collective over mesh.comm.

        ValueError or TypeError on every rank for what one cannot do, or where ranks differ.
        """
        found: list[Outline] = []

        def described() -> list[str]:
            plans = CheckedPlans(plan_function(schedule, stages_per_rank), mesh.pipe.size)
            _check_scaler(loss_scaler, mesh.pipe)
            choices.check()
            _check_loss(loss_fn, mesh.data.size)
            named = named_layers(layers)
            num_stages = num_stages_of(plans(choices.microbatches))
            refuse_gradient_hooks(named)
            again = _chosen_stages(choices.recompute, num_stages)
            found.append(cls(named, plans, num_stages, again))
            return found[0]._lines(choices)

        check_equal(mesh.comm, described, "settings, parameters or buffers of the pipeline")
        return found[0]

    @property
    def whole(self) -> nn.Sequential:
        """Return the unsplit model."""
        return nn.Sequential(OrderedDict(self.named))

    def _lines(self, choices: Choices) -> list[str]:
        """Describe what must be equal on all ranks, a line for each thing."""
        plan = enumerate(self.plans(choices.microbatches))
        return [
            *(f"plan of rank {r}: {' '.join(a.placed for a in row)}" for r, row in plan),
            *choices.lines(self.whole),
            f"recompute {self.again}",
            f"layers {' '.join(name for name, _ in self.named)}",
            *describe(self.whole.named_parameters()),
            *describe(self.whole.named_buffers()),
        ]


def _check_word(what: str, word: str, known: Collection[str]) -> None:
    if word not in known:
        raise ValueError(f"unknown {what} {word!r}, expected one of: {', '.join(known)}")


def _chosen_stages(chosen: bool | Collection[int], num_stages: int) -> tuple[int, ...]:
    """Return the stages that are chosen, all if True; ValueError for one that is not there."""
    if isinstance(chosen, bool):
        return tuple(range(num_stages)) if chosen else ()
    if strange := sorted(set(chosen) - set(range(num_stages))):
        raise ValueError(f"expected stages 0 to {num_stages - 1}, got {strange}")
    return tuple(sorted(set(chosen)))


def _check_scaler(given: object, comm: Communicator) -> None:
    require("loss_scaler", given, (LossScaler, NoneType))
    if isinstance(given, LossScaler):
        given.require(comm)


def _check_loss(loss_fn: Any, num_replicas: int) -> None:
    if loss_fn is not None:
        require_callable("loss_fn", loss_fn)
    learned = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()
    if num_replicas > 1 and any(parameter.requires_grad for parameter in learned):
        raise TypeError(
            "loss_fn has parameters, whose gradients nobody reduces over the replicas: put "
            "them into the last layer, or freeze them"
        )
