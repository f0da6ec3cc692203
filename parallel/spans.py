"""Record forward and backward of a module while somebody traces."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..comm.timeline import COMPUTE

if TYPE_CHECKING:
    from ..comm.timeline import Timeline

__all__ = ["record_forward"]


def record_forward(
    timeline: Timeline, module: Callable[..., Any], *args: Any, **kwargs: Any
) -> Any:
    """Call a module; record this, and the backward from its output on, without the loss's part."""
    with timeline.span(COMPUTE, "forward"):
        output = module(*args, **kwargs)
    for tensor in _tensors(output):
        if tensor.requires_grad:
            begins: Any = tensor.register_hook  # torch leaves it without annotations
            begins(lambda gradient: _backward_begins(timeline))
            break
    return output


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, Mapping):
        for member in value.values():
            yield from _tensors(member)
    elif isinstance(value, list | tuple):
        for member in value:
            yield from _tensors(member)


def _backward_begins(timeline: Timeline) -> None:
    start = time.monotonic_ns()
    torch.autograd.Variable._execution_engine.queue_callback(
        lambda: timeline.add(COMPUTE, "backward", start)
    )
