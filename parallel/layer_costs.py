"""Measure what layers cost, one by one, on a sample micro-batch.

Nothing is left behind: gradients, buffers and torch's random numbers are as before.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .batch import count_rows
from .buffer_copies import BufferCopies
from .generators import GeneratorStates
from .layers import Named
from .random_keys import Samples, show_samples
from .structure import put_together, take_apart

__all__ = ["kept_bytes", "layer_seconds", "parameter_bytes"]

_TRIALS = 3


def parameter_bytes(named: Named) -> list[float]:
    """Return the bytes of every layer's parameters, and of as large gradients where it has any."""
    return [
        float(sum(p.nbytes * (1 + p.requires_grad) for p in layer.parameters()))
        for _, layer in named
    ]


def layer_seconds(
    named: Named, sample: Any, *, clock: Callable[[], float] = time.perf_counter
) -> list[float]:
    """Return the seconds of every layer's forward and backward; the least of some repetitions.

    sample: the first layer's input. ValueError names a layer that raises.
    """
    with _undone(named):
        trials = [list(_seconds_of_each(named, sample, clock)) for _ in range(1 + _TRIALS)]
    # The first trial warms up caches and allocators.
    return [min(column) for column in zip(*trials[1:], strict=True)]


def kept_bytes(named: Named, sample: Any) -> list[float]:
    """Return the bytes that every layer keeps of one micro-batch for its backward.

    Memory that several layers keep, as the one's output and the next one's input, counts where it
    is kept first; that of parameters and buffers does not count.

    sample: the first layer's input. ValueError names a layer that raises.
    """
    seen: set[int] = set()
    kept: list[float] = []
    alive: list[Tensor] = []  # so that no memory is given to a second tensor meanwhile

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in seen:
            seen.add(storage.data_ptr())
            kept[-1] += storage.nbytes()
            alive.append(tensor.detach())
        return tensor

    with _undone(named), torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        for _, layer in named:
            for tensor in (*layer.parameters(), *layer.buffers()):
                seen.add(tensor.untyped_storage().data_ptr())
        value = _entered(sample)
        for name, layer in named:
            kept.append(0.0)
            _show(layer, value)
            with _naming(name, layer):
                value = layer(value)
    return kept


def _seconds_of_each(named: Named, value: Any, clock: Callable[[], float]) -> Iterator[float]:
    for name, layer in named:
        value = _entered(value)
        _show(layer, value)
        begin = clock()
        with _naming(name, layer):
            value = layer(value)
            _backward(value)
        yield clock() - begin


def _entered(value: Any) -> Any:
    """Return a layer's input, at the beginning of a graph of its own."""
    description, tensors = take_apart(value, "sample")
    leaves = [t.detach().requires_grad_(t.requires_grad) for t in tensors]
    # A layer may change its input in place, but no leaf, nor what is to be used again.
    return put_together(description.skeleton, [leaf.clone() for leaf in leaves])


def _backward(output: Any) -> None:
    _, tensors = take_apart(output, "output")
    roots = [tensor for tensor in tensors if tensor.requires_grad]
    if roots:
        torch.autograd.backward(roots, [torch.ones_like(root) for root in roots])


def _show(layer: nn.Module, value: Any) -> None:
    try:
        rows = count_rows(value, "sample")
    except ValueError:
        return
    show_samples(layer, Samples(0, 0, rows))


@contextmanager
def _naming(name: str, layer: nn.Module) -> Iterator[None]:
    try:
        yield
    except Exception as error:
        kind = type(layer).__name__
        raise ValueError(f"layer {name} ({kind}) on the sample: {error}") from error


@contextmanager
def _undone(named: Named) -> Iterator[None]:
    parameters = [p for _, layer in named for p in layer.parameters()]
    gradients = [parameter.grad for parameter in parameters]
    buffers = BufferCopies(module for _, layer in named for module in layer.modules())
    for parameter in parameters:
        parameter.grad = None
    generators = GeneratorStates(parameters)
    try:
        with torch.enable_grad(), buffers.in_place():
            yield
    finally:
        generators.restore()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        for _, layer in named:
            show_samples(layer, None)
