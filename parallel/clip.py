"""Clip gradients by the norm over all stages of a pipeline."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor, nn

from .tensors import numbers_of

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["clip_over_stages", "note_stage", "refuse_one_stage"]

# As torch.nn.utils.clip_grad_norm_ has it, so that clipping is that of the unsplit model.
_EPSILON = 1e-6
_OF_ONE_STAGE = "_ringfold_of_one_stage"


def note_stage(parameters: Iterable[Tensor]) -> None:
    """Note that these are one stage's parameters, and that other ranks have other stages."""
    for parameter in parameters:
        setattr(parameter, _OF_ONE_STAGE, True)


def refuse_one_stage(parameters: Iterable[nn.Parameter]) -> None:
    """Raise ValueError if these parameters are one stage's, so that their norm would be its alone.

    An empty list counts as that of a stage without parameters: only there is an optimizer empty.
    """
    given = list(parameters)
    if not given or any(hasattr(parameter, _OF_ONE_STAGE) for parameter in given):
        raise ValueError(
            "this optimizer has one stage of a pipeline, and each stage would be clipped by a norm "
            "of its own: call clip_grad_norm_ of the Pipeline instead, before step, which counts "
            "all stages"
        )


def clip_over_stages(
    parameters: Iterable[nn.Parameter],
    pipe: Communicator,
    max_norm: float,
    norm_type: float,
    counted_elsewhere: Container[nn.Parameter] = (),
) -> Tensor:
    """Scale this stage's gradients by min(1, max_norm / (norm + 1e-6)); return the norm before.

    The norm is that of the gradients of all ranks of `pipe` together, added in float64.

    norm_type: above 0, or infinity.
    counted_elsewhere: parameters that another rank holds as well, and counts.

    Collective over `pipe`; a stage without gradients takes part.
    """
    if not norm_type > 0:
        raise ValueError(f"expected norm_type > 0, got {norm_type}")
    pairs = [(p, p.grad) for p in parameters if p.grad is not None]
    counted = [_values(gradient) for p, gradient in pairs if p not in counted_elsewhere]
    # What raised here would do so on one rank, and leave the others waiting: no elements have no
    # greatest one.
    counted = [gradient for gradient in counted if gradient.numel()]
    norms = numbers_of([torch.linalg.vector_norm(g, norm_type, dtype=_wide(g)) for g in counted])
    if math.isinf(norm_type):
        # Whether the greater of a number and NaN is NaN depends on who compares.
        local = np.array([max(norms, default=0.0), any(map(math.isnan, norms))], np.float64)
        whole = pipe.allreduce(local, op="max")
        norm = math.nan if whole[1] else float(whole[0])
    else:
        local = np.array([sum(_power(norm, norm_type) for norm in norms)], np.float64)
        norm = _power(float(pipe.allreduce(local, op="sum")[0]), 1.0 / norm_type)
    scale = min(1.0, max_norm / (norm + _EPSILON)) if not math.isnan(norm) else math.nan
    if scale != 1.0:
        for parameter, gradient in pairs:
            if gradient.layout == torch.strided:
                gradient.mul_(scale)
            else:  # rows of a sparse one may be the same memory
                parameter.grad = gradient * scale
    return torch.tensor(norm, dtype=torch.float64, device="cpu")


def _power(base: float, exponent: float) -> float:
    """Return a power; infinity beyond the range of a float, where Python raises."""
    try:
        return float(base**exponent)
    except OverflowError:
        return math.inf


def _values(gradient: Tensor) -> Tensor:
    """Return a gradient's elements, each once; of a sparse one, those that it holds."""
    return gradient.coalesce().values() if gradient.layout == torch.sparse_coo else gradient


def _wide(gradient: Tensor) -> torch.dtype:
    return torch.complex128 if gradient.is_complex() else torch.float64
