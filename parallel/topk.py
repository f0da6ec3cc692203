"""Top-k: send only the largest elements of every gradient, and keep the rest for later steps.

Stich, Cordonnier, Jaggi, "Sparsified SGD with Memory", NeurIPS 2018, Algorithm 1; Lin et al., "Deep
Gradient Compression", ICLR 2018, for the choice per parameter.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from fractions import Fraction
from numbers import Real
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm.arguments import require
from .hooks import GradientBucket, Rounds, narrowed
from .tensors import numbers_of

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["TopK", "num_kept"]

_INDEX = torch.int32


def num_kept(count: int, ratio: float) -> int:
    """Return how many of `count` elements are sent: a ratio of them, rounded up.

    The ratio is what it reads as: the float next to 0.07 is greater, and would be 8 of 100.
    """
    return math.ceil(Fraction(str(ratio)) * count)


@dataclass
class TopK:
    """Send the elements of largest magnitude of gradient and error together; keep the others.

    A wire hook. Every rank chooses its own elements of each parameter, and all ranks add those of
    all ranks in rank order. Sent elements leave the error, the others stay in it.

    ratio: of each parameter's elements, above 0 and at most 1.

    Bytes from each rank per parameter: k times an int32 index and an element in the gradients' own
    dtype; the error is kept in float32 at least. Use one object for one model; its state belongs to
    this rank. A gradient that is not finite is sent as such, and leaves all ranks' errors as they
    were. A sum of gradient and error beyond the range of that dtype is sent as its largest value,
    or as an infinity where losses are scaled up. Errors are those of unscaled losses.
    """

    ratio: float = 0.01
    _errors: dict[str, Tensor] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        require("ratio", self.ratio, Real)
        if not 0 < self.ratio <= 1:
            raise ValueError(f"expected a ratio above 0 and at most 1, got {self.ratio}")

    def __call__(self, bucket: GradientBucket, comm: Communicator) -> Rounds:
        """Reduce one bucket."""
        return Rounds(self._reduce(bucket, comm))

    def _reduce(self, bucket: GradientBucket, comm: Communicator) -> Generator[Work, Any, None]:
        indices, values, rests = self._choose(bucket)
        count = indices.numel()
        # One message: the bytes of the indices, then those of the elements.
        message = torch.cat([indices.view(torch.uint8), values.view(torch.uint8)])
        rows = yield comm.allgather(message, blocking=False)
        cut = count * _INDEX.itemsize
        wide = torch.promote_types(values.dtype, torch.float32)
        total = torch.zeros(bucket.flat.numel(), dtype=wide, device=bucket.flat.device)
        for row in rows:
            # Copies: a row of odd length begins where no element may.
            places = row[:cut].clone().view(_INDEX).long()
            total[places] += row[cut:].clone().view(values.dtype).to(wide)
        bucket.flat.copy_(total.div_(comm.size))
        # Where any rank's gradient is not finite the step is lost, but not what waited for it.
        tensors = dict(zip(bucket.names, bucket.tensors(), strict=True))
        fine = numbers_of([tensors[name].isfinite().all() for name in rests])
        for name, ok in zip(rests, fine, strict=True):
            if ok:
                self._errors[name] = rests[name]

    def _choose(self, bucket: GradientBucket) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Return the chosen elements' indices in the bucket, their values, and the rest by name."""
        if bucket.flat.numel() > torch.iinfo(_INDEX).max:
            raise ValueError(
                f"a bucket of {bucket.flat.numel()} elements is too long for top-k, which has "
                "32-bit indices"
            )
        places = [torch.empty(0, dtype=_INDEX, device=bucket.flat.device)]
        chosen = [bucket.flat[:0]]
        rests = {}
        wholes = []
        for name, tensor, present in zip(
            bucket.names, bucket.tensors(), bucket.present, strict=True
        ):
            whole = tensor.reshape(-1).to(torch.promote_types(tensor.dtype, torch.float32))
            error = self._errors.get(name)
            # Where there is no gradient the error waits for one.
            if error is not None and present:
                whole = whole.add(error, alpha=bucket.loss_scale)
            wholes.append(whole)
        fine = numbers_of([whole.isfinite().all() for whole in wholes])
        for i, (whole, tensor) in enumerate(zip(wholes, bucket.tensors(), strict=True)):
            name, offset = bucket.names[i], bucket.offsets[i]
            where = whole.abs().topk(num_kept(whole.numel(), self.ratio), sorted=False).indices
            sent = whole[where]
            if bucket.present[i] and fine[i]:
                # The error is wider, and may have grown beyond what the gradients' dtype holds.
                sent = narrowed(sent, tensor.dtype, bucket.loss_scale)
                rest = whole.clone()
                rest[where] -= sent.to(rest.dtype)
                rests[name] = rest.div_(bucket.loss_scale)
            places.append((where + offset).to(_INDEX))
            chosen.append(sent.to(tensor.dtype))
        return torch.cat(places), torch.cat(chosen), rests

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return, by parameter name, what this rank has not sent."""
        return {name: {"error": error} for name, error in self._errors.items()}

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state."""
        self._errors = {name: entry["error"] for name, entry in state.items()}

    def error(self, name: str) -> Tensor | None:
        """Return what this rank has not sent of a parameter's gradients, flat."""
        return self._errors.get(name)
