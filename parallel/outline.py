"""What the ranks of a pipeline have to agree on, checked before anything of it is made."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from operator import index
from types import NoneType
from typing import Any

import torch
from torch import nn

from ..comm.arguments import require, require_callable, whole
from ..comm.communicator import Communicator
from .actions import Action
from .hooks import WireFormat, WireHook, wire_format
from .layers import Named, named_layers
from .loss_scale import LossScaler
from .mesh import Mesh
from .plan_check import num_stages_of
from .replicas import describe
from .shared_weights import refuse_gradient_hooks
from .tensors import device_of

__all__ = ["Choices", "Outline", "require_mesh", "require_scaler"]

_LOSS_REDUCTIONS = ("mean", "sum")
_REDUCTIONS = ("bucket", "tree")


def require_mesh(given: object) -> None:
    """Raise TypeError for what is no Mesh."""
    require("mesh", given, Mesh, "Mesh(comm, pipe=2)")


def require_scaler(given: object, comm: Communicator) -> None:
    """Raise TypeError for what is no LossScaler, nor None; ValueError for one of other ranks."""
    require("loss_scaler", given, (LossScaler, NoneType))
    if isinstance(given, LossScaler):
        given.require(comm)


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
    """The layers of a pipeline by name, its plan, its stages and those that recompute."""

    named: Named
    plan: Sequence[Sequence[Action]]
    num_stages: int
    again: tuple[int, ...]

    @classmethod
    def of(
        cls,
        layers: nn.Sequential | nn.ModuleList | Sequence[nn.Module],
        mesh: Mesh,
        choices: Choices,
        plan_of: Callable[[int], Sequence[Sequence[Action]]],
        loss_fn: Any,
    ) -> Outline:
        """Find out; ValueError or TypeError for what this rank cannot do.

        plan_of: returns the plan of a number of micro-batches.
        """
        choices.check()
        if loss_fn is not None:
            require_callable("loss_fn", loss_fn)
        learned = loss_fn.parameters() if isinstance(loss_fn, nn.Module) else ()
        if mesh.data.size > 1 and any(parameter.requires_grad for parameter in learned):
            raise TypeError(
                "loss_fn has parameters, whose gradients nobody reduces over the replicas: put "
                "them into the last layer, or freeze them"
            )
        named = named_layers(layers)
        plan = plan_of(choices.microbatches)
        num_stages = num_stages_of(plan)
        refuse_gradient_hooks(named)
        return cls(named, plan, num_stages, _chosen_stages(choices.recompute, num_stages))

    @property
    def whole(self) -> nn.Sequential:
        """Return the unsplit model."""
        return nn.Sequential(OrderedDict(self.named))

    def lines(self, choices: Choices) -> list[str]:
        """Describe what must be equal on all ranks, a line for each thing."""
        plan = enumerate(self.plan)
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
