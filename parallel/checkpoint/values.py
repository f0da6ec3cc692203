"""Plain values as JSON that gives the same types back, with tensors by reference."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .errors import CheckpointError

__all__ = ["decode", "encode", "references"]

_TUPLE, _FLOAT, _TENSOR, _KEYS = "tuple", "float", "tensor", "mapping"
_COUNTER, _ARRAY, _DTYPE = "counter", "array", "dtype"

_BITS = 14_000
"""Of an int at most: Python writes and reads no more than 4300 digits."""


def encode(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    """Return JSON for a nesting of dict, list, tuple, str, int, float, bool, None and tensors.

    And of Counter, by which torch's MultiStepLR has its milestones, torch's dtypes, and NumPy's
    arrays of numbers. What comes from one of these classes comes back as it: a named tuple as a
    tuple, and NumPy's single bool, int or float as Python's.
    Tensors are put into `tensors` under their path. CheckpointError names the path of anything
    else, and the places of two tensors whose keys make one path.
    """
    places: dict[str, str] = {}

    def put(tensor: Tensor, path: str, place: str) -> None:
        if path in tensors:
            other = places.get(path, "another tensor of the state")
            raise CheckpointError(f"{place} and {other} would both be kept as {path}")
        tensors[path], places[path] = tensor, place

    return _encode(value, path, path, put)


def _encode(value: Any, path: str, place: str, put: Callable[[Tensor, str, str], None]) -> Any:
    """Encode what lies at a place, such as v['a']['b'], under a path, such as v/a/b."""

    def inside(key: Any, inner: Any) -> Any:
        return _encode(inner, f"{path}/{key}", f"{place}[{key!r}]", put)

    match value:
        case Tensor():
            put(value, path, place)
            return {_TENSOR: path}
        case None | bool() | str():
            return value
        case int() if value.bit_length() > _BITS:
            raise CheckpointError(f"{path}: a number of {value.bit_length()} bits cannot be kept")
        case int():
            return int(value)
        case float():
            return float(value) if math.isfinite(value) else {_FLOAT: repr(float(value))}
        case tuple():
            return {_TUPLE: [inside(i, v) for i, v in enumerate(value)]}
        case list():
            return [inside(i, v) for i, v in enumerate(value)]
        case Mapping():
            kind = _COUNTER if isinstance(value, Counter) else _KEYS
            # As pairs: JSON's own keys are text only.
            return {kind: [[_key(k, path), inside(k, v)] for k, v in value.items()]}
        case torch.dtype():
            return {_DTYPE: str(value).removeprefix("torch.")}
        case np.ma.MaskedArray():  # before arrays, which it is one of
            raise CheckpointError(
                f"{path}: a masked array cannot be kept; keep its data and its mask"
            )
        case np.ndarray():
            put(_tensor_of(value, path), path, place)
            return {_ARRAY: path}
        case _ if _is_scalar(value) and isinstance(plain := value.item(), (bool, int, float)):
            return _encode(plain, path, place, put)
    kind = type(value).__name__
    if hasattr(value, "state_dict") and hasattr(value, "load_state_dict"):
        raise CheckpointError(
            f"{path}: a {kind} is not kept within another value: give it a name of its own in the "
            f'state, as in {{"{path.replace("/", "_")}": ...}}'
        )
    raise CheckpointError(f"{path}: a {kind} cannot be kept without pickle")


def decode(value: Any, tensor: Callable[[str], Any]) -> Any:
    """Return what `encode` was given; `tensor` looks up a tensor by its path."""
    if isinstance(value, list):
        return [decode(v, tensor) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    table: Mapping[str, Callable[[], Any]] = {
        _TENSOR: lambda: tensor(inner),
        _ARRAY: lambda: _array_of(tensor(inner)),
        _DTYPE: lambda: getattr(torch, inner),
        _FLOAT: lambda: float(inner),
        _TUPLE: lambda: tuple(decode(v, tensor) for v in inner),
        _KEYS: lambda: {k: decode(v, tensor) for k, v in inner},
        _COUNTER: lambda: Counter({k: decode(v, tensor) for k, v in inner}),
    }
    return table[kind]()


def references(value: Any) -> list[str]:
    """Return the paths of all tensors in an encoded value."""
    found: list[str] = []

    def note(path: str) -> Any:
        found.append(path)

    decode(value, note)
    return found


def _tensor_of(array: np.ndarray[Any, Any], path: str) -> Tensor:
    try:
        return torch.from_numpy(np.array(array, order="C"))
    except (TypeError, ValueError):  # of text, objects, dates, or another machine's byte order
        raise CheckpointError(f"{path}: an array of {array.dtype} cannot be kept") from None


def _is_scalar(value: Any) -> bool:
    """Tell whether a value is a single bool, int or float of NumPy or CuPy.

    A date is none, although its `item` may be an int, of nanoseconds.
    """
    kind = getattr(getattr(value, "dtype", None), "kind", "")
    return kind in ("b", "i", "u", "f") and getattr(value, "shape", None) == ()


def _array_of(found: Any) -> Any:
    """Return the array of a tensor; what else the looking up has brought as it is."""
    return found.numpy() if isinstance(found, Tensor) else found


def _key(key: Any, path: str) -> str | int:
    if not isinstance(key, (str, int)):
        kind = type(key).__name__
        raise CheckpointError(f"{path}: a {kind} as a key cannot be kept without pickle")
    return key
