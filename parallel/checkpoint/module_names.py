"""What a module's state_dict calls its tensors, and which of them code of its own loads."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from ..pipeline import Pipeline
from ..transparent import Transparent

__all__ = ["is_extra", "loaded_by_code", "saved_names"]

_KNOWN = ("torch.nn.", "ringfold.")
"""Where a _load_from_state_dict comes from that takes tensors of the sizes alone that there are."""


def is_extra(name: str) -> bool:
    """Tell whether a name is of what get_extra_state gives: a tensor or not, of any size."""
    return name.rpartition(".")[2] == "_extra_state"


def loaded_by_code(module: Any) -> tuple[str, ...]:
    """Return the name prefixes of tensors whose sizes are decided by a module's own loading code.

    These are modules with a _load_from_state_dict of their own, such as torch's observers of
    ranges, or with hooks before loading, as lazy layers have. A prefix covers a module's parts as
    well, which such code may reach.

    module: a module, or an engine around one.
    """
    layers = _layers_of(module)
    return tuple(
        prefix
        for prefix, part in (() if layers is None else _parts(layers, ""))
        if part._load_state_dict_pre_hooks
        or not type(part)._load_from_state_dict.__module__.startswith(_KNOWN)
    )


def saved_names(module: Any) -> Iterator[tuple[str, str, nn.Parameter]]:
    """Yield each parameter once: its name in state_dict, that in named_parameters, and itself.

    The names differ below a wrapper that is a part of the module: enc.weight, enc.module.weight.

    module: a module, or an engine around one.
    """
    layers = _layers_of(module)
    saved: dict[nn.Parameter, str] = {}
    for prefix, part in () if layers is None else _parts(layers, ""):
        for name, parameter in part._parameters.items():
            if parameter is not None:
                saved.setdefault(parameter, prefix + name)
    for name, parameter in module.named_parameters():
        yield saved.get(parameter, name), name, parameter


def _layers_of(module: Any) -> nn.Module | None:
    """Return the module of what is one, or an engine around one; None for another such."""
    layers = module.layers if isinstance(module, Pipeline) else module
    return layers if isinstance(layers, nn.Module) else None


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    """Yield all modules within, and how the names of their tensors begin."""
    yield prefix, module
    for name, child in module._modules.items():
        if child is not None:
            inside = prefix if isinstance(module, Transparent) else f"{prefix}{name}."
            yield from _parts(child, inside)
