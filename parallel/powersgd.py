"""PowerSGD: send every gradient matrix as a product of two thin ones.

Vogels, Karimireddy, Jaggi, "PowerSGD: Practical Low-Rank Gradient Compression for Distributed
Optimization", NeurIPS 2019, Algorithms 1 and 2.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Generator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm.arguments import whole
from .hooks import GradientBucket, Rounds, narrowed
from .tensors import numbers_of

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["PowerSGD", "factor_shapes"]


def factor_shapes(shape: tuple[int, ...], rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the shapes of P (n, r) and Q (m, r) for a gradient seen as a matrix of n x m.

    n is the first dimension, m the product of the others, and r at most either.
    """
    n, m = (shape[0], math.prod(shape[1:])) if shape else (1, 1)
    r = min(rank, n, m)
    return (n, r), (m, r)


@dataclass
class _Memory:
    """What one parameter keeps: its Q of the step before, and what was not sent on this rank."""

    factor: Tensor
    error: Tensor


@dataclass
class PowerSGD:
    """Compress gradients to low rank, with the error carried over to the next step.

    A wire hook. For a matrix M, of gradient and error, and Q of the step before: P = mean(M Q) over
    the ranks, made orthonormal; Q = mean(M^T P); all ranks take P Q^T, and each keeps what its own
    Q leaves out, M - P (M^T P)^T, as its error. Parameters for which the two factors would be no
    smaller are sent as they are.

    rank: of the approximation. start_step: each parameter's first so many steps are sent as they
    are. seed: of the first Q, the same on all ranks.

    Elements on the wire per matrix: r (n + m). Use one object for one model; its state belongs to
    this rank. Half-width gradients are computed and sent in float32; what of the result their dtype
    does not hold stays in the errors, but is an infinity where losses are scaled up. A gradient
    that is not finite comes out as such on every rank, and leaves the state as it was. Errors are
    those of unscaled losses.
    """

    rank: int = 4
    start_step: int = 10
    seed: int = 0
    _steps: dict[str, int] = field(default_factory=dict, repr=False)
    _memory: dict[str, _Memory] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        whole("rank", self.rank, 1)

    def __call__(self, bucket: GradientBucket, comm: Communicator) -> Rounds:
        """Reduce one bucket."""
        return Rounds(self._reduce(bucket, comm))

    def _reduce(self, bucket: GradientBucket, comm: Communicator) -> Generator[Work, Any, None]:
        wide = torch.promote_types(bucket.flat.dtype, torch.float32)
        tensors = bucket.tensors()
        low = [i for i, name in enumerate(bucket.names) if self._is_low(name, bucket.shapes[i])]
        plain = [i for i in range(len(tensors)) if i not in set(low)]
        names = [bucket.names[i] for i in low]
        memory = [
            self._recall(bucket.names[i], bucket.shapes[i], wide, bucket.flat.device) for i in low
        ]
        matrices = [
            # Where there is no gradient the error waits for one.
            tensors[i]
            .to(wide)
            .reshape(m.error.shape)
            .add(m.error, alpha=bucket.loss_scale if bucket.present[i] else 0.0)
            for i, m in zip(low, memory, strict=True)
        ]

        products = [matrix @ m.factor for matrix, m in zip(matrices, memory, strict=True)]
        first = _join([*products, *(tensors[i].to(wide) for i in plain)], bucket.flat.to(wide))
        yield comm.allreduce(first, op="mean", blocking=False)
        parts = _cut(first, [p.shape for p in products] + [tensors[i].shape for i in plain])
        for i, part in zip(plain, parts[len(low) :], strict=True):
            tensors[i].copy_(part)
        if low:
            yield from self._second_round(
                comm,
                names,
                [tensors[i] for i in low],
                [bucket.present[i] for i in low],
                matrices,
                parts[: len(low)],
                bucket.loss_scale,
            )
        for name in bucket.names:
            self._steps[name] = self._steps.get(name, 0) + 1

    def _second_round(
        self,
        comm: Communicator,
        names: list[str],
        targets: list[Tensor],
        present: list[bool],
        matrices: list[Tensor],
        products: list[Tensor],
        loss_scale: float,
    ) -> Generator[Work, Any, None]:
        # The products are equal on all ranks, so all take the same branch.
        finite = numbers_of([product.isfinite().all() for product in products])
        bases = [_orthonormal(p) if ok else p for p, ok in zip(products, finite, strict=True)]
        own = [matrix.T @ basis for matrix, basis in zip(matrices, bases, strict=True)]
        second = _join(own, own[0])
        yield comm.allreduce(second, op="mean", blocking=False)
        factors = _cut(second, [q.shape for q in own])
        results = [basis @ factor.T for basis, factor in zip(bases, factors, strict=True)]
        fine = numbers_of([result.isfinite().all() for result in results])
        narrows = list(results)
        for i, target in enumerate(targets):
            if finite[i] and fine[i]:
                narrows[i] = narrowed(results[i], target.dtype, loss_scale)
            target.copy_(narrows[i].view(target.shape))
        kept = numbers_of([target.isfinite().all() for target in targets])
        alive = numbers_of([factor.any() for factor in factors])
        for i, name in enumerate(names):
            if not kept[i]:
                continue
            memory, result, narrow = self._memory[name], results[i], narrows[i]
            if present[i]:
                memory.error = (matrices[i] - bases[i] @ own[i].T).div_(loss_scale)
            if narrow.dtype != result.dtype:
                # What the gradients' dtype does not hold, which is alike on all ranks.
                memory.error = memory.error + (result - narrow).div_(loss_scale)
            if alive[i]:  # from zeros the iteration would never come back
                memory.factor = factors[i].clone()

    def _is_low(self, name: str, shape: tuple[int, ...]) -> bool:
        (n, r), (m, _) = factor_shapes(shape, self.rank)
        return self._steps.get(name, 0) >= self.start_step and (n + m) * r < n * m

    def _recall(
        self, name: str, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> _Memory:
        memory = self._memory.get(name)
        if memory is None:
            (n, _), (m, r) = factor_shapes(shape, self.rank)
            generator = torch.Generator().manual_seed(self.seed ^ zlib.crc32(name.encode()))
            # Drawn on the host: devices have generators of their own.
            drawn = torch.randn(m, r, generator=generator, dtype=dtype, device="cpu")
            factor = drawn.to(device)
            error = torch.zeros(n, m, dtype=dtype, device=device)
            memory = self._memory[name] = _Memory(factor, error)
        return memory

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return, by parameter name, the steps taken, Q of the last, and this rank's error."""
        return {
            name: {"steps": steps}
            | ({"factor": m.factor, "error": m.error} if (m := self._memory.get(name)) else {})
            for name, steps in self._steps.items()
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Go on from a state; a Q of another rank than this one's is begun anew."""
        self._steps = {name: int(entry["steps"]) for name, entry in state.items()}
        self._memory = {}
        for name, entry in state.items():
            if "error" not in entry:
                continue
            error = entry["error"]
            memory = self._recall(name, tuple(error.shape), error.dtype, error.device)
            memory.error = error
            if entry["factor"].shape == memory.factor.shape:
                memory.factor = entry["factor"]

    def error(self, name: str) -> Tensor | None:
        """Return what this rank has not sent of a parameter's gradients, as a matrix."""
        memory = self._memory.get(name)
        return None if memory is None else memory.error


def _orthonormal(product: Tensor) -> Tensor:
    # In double: the columns may be nearly parallel.
    basis: Tensor = torch.linalg.qr(product.double()).Q
    return basis.to(product.dtype)


def _join(tensors: list[Tensor], like: Tensor) -> Tensor:
    return torch.cat([t.reshape(-1) for t in tensors] or [like[:0]])


def _cut(flat: Tensor, shapes: list[torch.Size]) -> list[Tensor]:
    parts = torch.split(flat, [math.prod(shape) for shape in shapes])
    return [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
