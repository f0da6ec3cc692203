"""Copies of layers that share modules or parameters with layers before them.

What one layer shares with another may lie on another rank, so it cannot be one object. The caller's
layers stay as they are: a copy takes their place, of as many modules as need be.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Iterable, Mapping
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from .layers import MODULE_HOOKS
from .sync_batchnorm import SyncBatchNorm

__all__ = ["LayerCopier"]


class LayerCopier:
    """Copy layers of one model over the same memory.

    layers: the whole model, whose modules and tensors are never copied by the way, as where a layer
        keeps others in a list.
    """

    def __init__(self, layers: Iterable[nn.Module]) -> None:
        self._kept: dict[int, Any] = {}
        for layer in layers:
            self._kept |= _by_id((*layer.modules(), *layer.parameters(), *layer.buffers()))

    def copy(
        self,
        name: str,
        layer: nn.Module,
        met: Collection[nn.Module],
        uses: Mapping[nn.Parameter, nn.Parameter],
    ) -> nn.Module:
        """Return the layer with modules of its own for those in `met`, and `uses` for their keys.

        A module that holds neither, directly or below it, stays the same; so do buffers, other
        parameters, and hooks that are no methods of a copied module. TypeError for a layer that
        cannot be copied so.
        """
        copied = [
            module
            for module in layer.modules()
            if any(m in met or uses.keys() & m._parameters.values() for m in module.modules())
        ]
        memo = self._kept.copy()
        for module in copied:
            memo |= _by_id(_kept_attributes(module, copied))
        for module in copied:
            del memo[id(module)]
        memo |= {id(parameter): use for parameter, use in uses.items()}
        what = f"layer {name} shares modules or parameters with a layer before it, and cannot be"
        try:
            made = copy.deepcopy(layer, memo)
        except Exception as error:
            raise TypeError(f"{what} copied: {type(error).__name__}: {error}") from error
        expected = [uses.get(p, p) for p in layer.parameters()], list(layer.buffers())
        if [*map(id, made.parameters())] != [*map(id, expected[0])] or (
            [*map(id, made.buffers())] != [*map(id, expected[1])]
        ):
            raise TypeError(f"{what} copied over the same memory: {type(layer).__name__}")
        for module in copied:
            if isinstance(module, SyncBatchNorm):
                memo[id(module)].channel = module.channel
        return made


def _by_id(values: Iterable[Any]) -> dict[int, Any]:
    return {id(value): value for value in values}


def _kept_attributes(module: nn.Module, copied: Collection[nn.Module]) -> list[Any]:
    """Return what a module's copy shares with it: tensors, generators, and hooks.

    Of a hook that is a module's method, that module, unless it is copied as well.
    """
    values = module.__dict__
    found: list[Any] = [v for v in values.values() if isinstance(v, Tensor | torch.Generator)]
    for kind in MODULE_HOOKS:
        for hook in values.get(kind, {}).values():
            if not isinstance(hook, MethodType):
                found.append(hook)
            elif not any(hook.__self__ is one for one in copied):
                found.append(hook.__self__)
    return found
