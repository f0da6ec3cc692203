"""What the parameters of a state are called, in an optimizer's part of a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from .module_names import saved_names

__all__ = ["Names"]


class Names:
    """Know every parameter of a state by its names.

    A parameter's full name is that in its module's state_dict, the same whether a part is wrapped
    or not. If the state has several modules, which may use one name for two parameters, it is
    written with the module's path in front: MODULE:full.name. This depends on the state alone, not
    on what this rank holds of it, so all ranks write the same names.

    The other names find what was written otherwise: of a state with another number of modules,
    before there were paths, or by the name that named_parameters has below a wrapper.
    """

    def __init__(self, state: Mapping[str, Any]) -> None:
        modules = {p: value for p, value in state.items() if hasattr(value, "named_parameters")}
        full: dict[Tensor, str] = {}
        owned: dict[Tensor, list[str]] = {}
        self._places: dict[Tensor, dict[str, str]] = {}
        old: dict[Tensor, list[str]] = {}
        for path, module in modules.items():
            for saved, place, parameter in saved_names(module):
                full[parameter] = saved
                owned.setdefault(parameter, []).append(f"{path}:{saved}")
                if place != saved:
                    self._places.setdefault(parameter, {})[place] = saved
                    old.setdefault(parameter, []).extend((place, f"{path}:{place}"))
        self._all: dict[Tensor, tuple[str, ...]] = {}
        for tensor, name in full.items():
            owners = owned[tensor]
            names = (*sorted(owners), name) if len(modules) > 1 else (name, *owners)
            self._all[tensor] = (*names, *old.get(tensor, ()))

    def of(self, parameter: Tensor) -> tuple[str, ...]:
        """Return the name to write first, then others to look for; none for one in no module."""
        return self._all.get(parameter, ())

    def saved(self, parameter: Tensor, given: str) -> str:
        """Return a name given by hand, or by named_parameters, as a state_dict would have it."""
        for place, saved in self._places.get(parameter, {}).items():
            if f".{given}".endswith(f".{place}"):
                return given.removesuffix(place) + saved
        return given
