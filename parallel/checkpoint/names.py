"""What the parameters of a state are called, in an optimizer's part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

__all__ = ["Names", "names_of"]

Names = Mapping[Tensor, tuple[str, ...]]


def names_of(state: Mapping[str, Any]) -> Names:
    """Return every parameter's names: the one to write first, then others to look for.

    The full name within its module. In a state of several modules, which may use one name for two
    parameters, the module's path comes first, as in MODULE:full.name. That hangs on the state and
    not on what this rank holds of it, so that all ranks write alike; what was written of another
    state, or before there were paths, is found under the other names.
    """
    modules = {p: value for p, value in state.items() if hasattr(value, "named_parameters")}
    full: dict[Tensor, str] = {}
    owned: dict[Tensor, list[str]] = {}
    for path, module in modules.items():
        for name, parameter in module.named_parameters():
            full[parameter] = name
            owned.setdefault(parameter, []).append(f"{path}:{name}")
    return {
        parameter: (*sorted(owned[parameter]), name)
        if len(modules) > 1
        else (name, *owned[parameter])
        for parameter, name in full.items()
    }
