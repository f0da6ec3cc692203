"""Find the first gradient that is not finite, before a sum spreads it, and tell every rank.

Gradients are looked at before they leave: by the time packing could tell, the bucket is on its way,
and gradients that live in their buckets are not packed at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from ..comm.errors import NotFinite
from ..comm.texts import gather_texts
from .tensors import real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["FiniteCheck", "all_finite"]

_NOBODY = np.iinfo(np.int64).max


@dataclass(frozen=True)
class _Found:
    microbatch: int
    place: int
    name: str
    what: str


class FiniteCheck:
    """Look at gradients of one rank; agree on the first bad one of all ranks.

    step: counts the agreements.  microbatch: of what is looked at now, whoever calls sets it.
    place: of its stage in a backward; 0 has the loss.
    """

    def __init__(self, comm: Communicator, num_places: int = 1) -> None:
        """num_places: stages that a backward goes through, on all ranks."""
        self._comm = comm
        self._num_places = num_places
        self.place = 0
        self._found: _Found | None = None
        self.step = 0
        self.microbatch = 0

    def look(self, names: Sequence[str], gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """Return the gradients, None in place of those that are not finite."""
        if all_finite([gradient for gradient in gradients if gradient is not None]):
            return list(gradients)
        kept: list[Tensor | None] = []
        for name, gradient in zip(names, gradients, strict=True):
            finite = gradient is None or all_finite([gradient])
            kept.append(gradient if finite else None)
            if not finite and gradient is not None and self._found is None:
                self._found = _Found(self.microbatch, self.place, name, _describe(gradient))
        return kept

    def look_at(self, module: nn.Module) -> None:
        """Look at all gradients of a module, after a micro-batch's backward."""
        if self._found is None:
            named = list(module.named_parameters())[::-1]  # about as backward reaches them
            self.look([name for name, _ in named], [parameter.grad for _, parameter in named])

    def forget(self) -> None:
        """Begin the step anew, after a backward that has failed."""
        self._found, self.microbatch = None, 0

    def agree(self) -> None:
        """End a step: raise on every rank where any has found something; collective.

        Raises: NotFinite, the same on every rank: of the first micro-batch, then of the stage
        that backward reaches first, then of the lowest rank.
        """
        found, self._found = self._found, None
        step, self.step, self.microbatch = self.step, self.step + 1, 0
        size, rank = self._comm.size, self._comm.rank
        mine = _NOBODY
        if found is not None:
            mine = (found.microbatch * self._num_places + found.place) * size + rank
        first = int(self._comm.allreduce(np.array([mine], np.int64), op="min")[0])
        if first == _NOBODY:
            return
        when, owner = divmod(first, size)
        microbatch = when // self._num_places
        own = "" if found is None else f"{found.name} {found.what}"
        text = gather_texts(self._comm, own)[owner]
        parameter = text.partition(" ")[0]
        raise NotFinite(
            f"step {step}, micro-batch {microbatch}, rank {owner}: the gradient of {text}; no "
            "other rank has added it: clear the gradients before another step",
            rank=owner,
            parameter=parameter,
            step=step,
            microbatch=microbatch,
        )


def all_finite(tensors: Sequence[Tensor]) -> bool:
    """Tell whether no element is infinite or NaN, in one pass over memory."""
    dense = [_values(tensor) for tensor in tensors]
    dense = [tensor for tensor in dense if tensor.numel()]
    if not dense:
        return True
    # A norm reads as fast as memory gives, `isfinite` far slower; where squares overflow, look
    # again.
    norms = torch.stack([norm.float() for norm in torch._foreach_norm(dense)])
    return bool(norms.isfinite().all()) or all(bool(one.isfinite().all()) for one in dense)


def _values(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout != torch.strided:
        tensor = tensor.coalesce().values()
    return real_view(tensor)


def _describe(gradient: Tensor) -> str:
    values = _values(gradient)
    bad = ~values.isfinite()
    first = bad.nonzero()[0].tolist()
    return (
        f"has {int(bad.sum())} of {values.numel()} elements that are not finite, the first "
        f"{float(values[tuple(first)])} at {first}"
    )
