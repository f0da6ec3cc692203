"""Take instances of classes apart, and make equal ones, where that needs no code of the class.

That is so for tuples and dicts of other classes, such as named tuples, for dataclasses, and for
UserDicts, as tokenizers return: their instances are nothing but items and attributes. As with
pickle, `__init__` does not run again, and the class is found by its name.
"""

from __future__ import annotations

from collections import OrderedDict, UserDict, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import is_dataclass
from importlib import import_module
from types import MemberDescriptorType
from typing import Any

__all__ = ["ITSELF", "attributes_of", "class_at", "is_known", "items_of", "make", "place_of"]

ITSELF = object()
"""Stands among the attributes that `make` is given for what it makes."""


def is_known(value: Any) -> bool:
    """Tell whether `make` can make a value of this one's items and attributes."""
    kind = type(value)
    if isinstance(value, tuple):
        return _made_by_call(kind) or _holds_no_more_than(tuple, kind)
    if isinstance(value, dict):
        # The function of a defaultdict is nowhere to be seen.
        return not isinstance(value, defaultdict)
    # A UserDict has its items in an attribute.
    return (is_dataclass(kind) or isinstance(value, UserDict)) and _holds_no_more_than(object, kind)


def place_of(kind: type) -> str:
    """Return where a class is; TypeError where it is not found there, as within a function."""
    place = f"{kind.__module__}:{kind.__qualname__}"
    try:
        found = class_at(place)
    except (ImportError, AttributeError, ValueError):
        found = None
    if found is not kind:
        raise TypeError(
            f"the class {kind.__module__}.{kind.__qualname__} is not found by its name: define it "
            "at the top of a module"
        )
    return place


def class_at(place: str) -> type:
    """Return the class at a place, as `place_of` has it."""
    module, _, names = place.partition(":")
    found: Any = import_module(module)
    for name in names.split("."):
        found = getattr(found, name)
    kind: type = found
    return kind


def items_of(value: Any) -> tuple[Any, ...] | dict[Any, Any] | None:
    """Return the items of a tuple or dict of any class, None of what is neither."""
    if isinstance(value, tuple):
        return tuple(tuple.__iter__(value))
    if isinstance(value, dict):
        return dict(_dict_of(type(value)).items(value))
    return None


def attributes_of(value: Any) -> dict[str, Any]:
    """Return all attributes that are the instance's own.

    A dict whose items are its attributes, by `self.__dict__ = self`, has one, `__dict__`.
    """
    if getattr(value, "__dict__", None) is value:
        return {"__dict__": value}
    state: Any = object.__getstate__(value)
    parts = state if isinstance(state, tuple) else (state,)
    return {name: own for part in parts if part for name, own in part.items()}


def make(
    kind: type, items: Sequence[Any] | Mapping[Any, Any] | None, attributes: Mapping[str, Any]
) -> Any:
    """Return an instance of these items and attributes."""
    made: Any
    if issubclass(kind, tuple):
        assert items is not None
        made = kind(items) if _made_by_call(kind) else tuple.__new__(kind, items)
    elif issubclass(kind, dict):
        assert isinstance(items, Mapping)
        base = _dict_of(kind)
        made = base.__new__(kind)
        for key, item in items.items():
            base.__setitem__(made, key, item)
    else:
        made = object.__new__(kind)
    for name, own in attributes.items():
        if name == "__dict__" or isinstance(getattr(kind, name, None), MemberDescriptorType):
            object.__setattr__(made, name, made if own is ITSELF else own)  # a slot
        else:
            vars(made)[name] = made if own is ITSELF else own
    return made


def _dict_of(kind: type) -> Any:
    # Which keeps its order apart from what is in it.
    return OrderedDict if issubclass(kind, OrderedDict) else dict


def _made_by_call(kind: type) -> bool:
    """Tell whether a class of tuples is made in C: torch.Size, and what torch.max returns."""
    return kind.__module__ in ("torch", "torch.return_types")


def _holds_no_more_than(base: Any, kind: type) -> bool:
    """Tell whether instances are of a built-in class, with nothing but attributes added."""
    try:
        base.__new__(kind)
    except TypeError:
        return False
    return True
