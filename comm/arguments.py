"""Refuse arguments of the wrong type by their names, before anything is done with them."""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable
from numbers import Real
from types import NoneType
from typing import Any, SupportsFloat

Kinds = type | tuple[type, ...]


def require(name: str, value: object, kinds: Kinds, such_as: str = "") -> None:
    """Raise TypeError for a value that is none of these kinds.

    such_as: an example of what was expected.
    """
    if not isinstance(value, kinds):
        named = kinds if isinstance(kinds, tuple) else (kinds,)
        expected = " or ".join(map(_kind, named))
        hint = f", such as {such_as}" if such_as else ""
        raise TypeError(f"{name}: expected {expected}{hint}, got {shown(value)}")


def require_callable(name: str, value: object) -> None:
    """Raise TypeError for what cannot be called."""
    if not callable(value):
        raise TypeError(f"{name}: expected a function, got {shown(value)}")


def whole(name: str, value: Any, least: int | None = None, such_as: str = "") -> int:
    """Return a whole number; TypeError for what is none, ValueError for less than `least`."""
    try:
        number = operator.index(value)
    except TypeError:
        hint = f", such as {such_as}" if such_as else ""
        raise TypeError(f"{name}: expected a whole number{hint}, got {shown(value)}") from None
    if least is not None and number < least:
        raise ValueError(f"expected {name} >= {least}, got {number}")
    return number


def words(name: str, value: Any) -> tuple[str, ...] | None:
    """Return a command, or None where there is none; TypeError for a text, or what has no words."""
    if value is None:
        return None
    found = tuple(value) if isinstance(value, Iterable) and not isinstance(value, str) else ()
    if not found or not all(isinstance(word, str) for word in found):
        raise TypeError(
            f"{name}: expected the words of a command, such as ['python', 'train.py'], got "
            f"{shown(value)}"
        )
    return found


def seconds(name: str, value: Any, *, positive: bool = True) -> float:
    """Return a time, above 0 s where `positive`; TypeError or ValueError for what is none."""
    if not isinstance(value, SupportsFloat):
        raise TypeError(f"{name}: expected seconds, got {shown(value)}")
    time = float(value)
    if positive and not time > 0:
        raise ValueError(f"{name} must be above 0 s, got {time}")
    if math.isnan(time):
        raise ValueError(f"{name}: expected seconds, got {time}")
    return time


def shown(value: object) -> str:
    """Write a plain value out, and name the kind of another, which may be large."""
    if value is None or isinstance(value, bool | int | float | str):
        return repr(value)
    return _kind(type(value))


_IN_WORDS = {NoneType: "None", Real: "a number", Iterable: "a sequence", type: "a class"}


def _kind(kind: type) -> str:
    if kind in _IN_WORDS:
        return _IN_WORDS[kind]
    return f"a{'n' if kind.__name__[0] in 'aeiouAEIOU' else ''} {kind.__name__}"
