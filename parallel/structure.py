"""Take nested values apart into tensors and a skeleton, and put them together again.

What one pipeline stage hands to the next is any nesting of tuples, lists, dicts and dataclasses
over tensors, None and plain values. The skeleton says where the tensors go; it has a text form, so
that it travels as bytes and is read back without running any code of the sender's.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .instances import ITSELF, attributes_of, class_at, is_known, items_of, make, place_of
from .tensors import dtype_name

__all__ = ["Description", "TensorSpec", "put_together", "take_apart"]

# ("tensor", position), ("tuple" | "list", children), ("dict", pairs), ("plain", kind, text),
# ("instance", place of its class, skeleton of its items, pairs of its attributes), in which
# ("item", key) stands for what is an item as well, and ("itself",) for the instance
Skeleton = tuple[Any, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Describe a tensor that travels; `needs_grad`: a gradient for it is to come back."""

    dtype: str
    shape: tuple[int, ...]
    needs_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> TensorSpec:
        """Describe this tensor."""
        return cls(dtype_name(tensor.dtype), tuple(tensor.shape), tensor.requires_grad)

    @property
    def torch_dtype(self) -> torch.dtype:
        """Return the dtype as torch has it."""
        dtype = getattr(torch, self.dtype)
        assert isinstance(dtype, torch.dtype)
        return dtype


@dataclass(frozen=True, slots=True)
class Description:
    """Describe a nested value without its elements; hashable, equal for equal structure."""

    skeleton: Skeleton
    tensors: tuple[TensorSpec, ...]

    def without_gradients(self) -> Description:
        """Return the same description with no tensor needing a gradient."""
        return Description(
            self.skeleton, tuple(TensorSpec(s.dtype, s.shape, False) for s in self.tensors)
        )

    def to_bytes(self) -> bytes:
        """Return the text form."""
        specs = [[spec.dtype, spec.shape, spec.needs_grad] for spec in self.tensors]
        return json.dumps([self.skeleton, specs]).encode()

    @classmethod
    def from_bytes(cls, text: bytes) -> Description:
        """Read the text form back."""
        skeleton, specs = json.loads(text)
        tensors = (TensorSpec(dtype, tuple(shape), needs) for dtype, shape, needs in specs)
        return cls(_as_tuples(skeleton), tuple(tensors))


def take_apart(value: Any, where: str) -> tuple[Description, list[Tensor]]:
    """Return a value's description and its tensors, in order.

    TypeError names the place within the value, beginning with `where`, and the type of anything
    that is no tensor, tuple, list, dict, None, bool, int, float or str.
    """
    tensors: list[Tensor] = []
    skeleton = _take(value, where, tensors)
    return Description(skeleton, tuple(map(TensorSpec.of, tensors))), tensors


def put_together(skeleton: Skeleton, tensors: Sequence[Any]) -> Any:
    """Return the value of this skeleton with these in place of its tensors, in order."""
    return _PUT[skeleton[0]](skeleton, tensors)


def _take(value: Any, where: str, tensors: list[Tensor]) -> Skeleton:
    if isinstance(value, Tensor):
        if value.layout != torch.strided:
            raise TypeError(f"{where}: a tensor of layout {value.layout} cannot be handed on")
        tensors.append(value)
        return ("tensor", len(tensors) - 1)
    # A value of another class, such as of a list's subclass, would come out as another type.
    take = _TAKE.get(type(value))
    if take is not None:
        return take(value, where, tensors)
    if is_known(value):
        return _take_instance(value, where, tensors)
    raise TypeError(
        f"{where}: a {type(value).__name__} cannot be handed on, expected a tensor, tuple, list, "
        "dict, named tuple, dataclass, None, bool, int, float or str"
    )


def _take_instance(value: Any, where: str, tensors: list[Tensor]) -> Skeleton:
    try:
        place = place_of(type(value))
    except TypeError as error:
        raise TypeError(f"{where}: a {type(value).__name__} cannot be handed on: {error}") from None
    items = items_of(value)
    named = items if isinstance(items, dict) else {}

    def own(name: str, child: Any) -> Skeleton:
        if child is value:
            return ("itself",)
        if name in named and named[name] is child:
            return ("item", name)
        return _take(child, f"{where}.{name}", tensors)

    taken = _take(items, where, tensors)
    pairs = ((name, own(name, child)) for name, child in attributes_of(value).items())
    return ("instance", place, taken, tuple(pairs))


def _put_instance(skeleton: Skeleton, tensors: Sequence[Any]) -> Any:
    _, place, inner, attributes = skeleton
    items = put_together(inner, tensors)

    def own(child: Skeleton) -> Any:
        if child[0] == "itself":
            return ITSELF
        return items[child[1]] if child[0] == "item" else put_together(child, tensors)

    return make(class_at(place), items, {name: own(child) for name, child in attributes})


def _take_sequence(value: Sequence[Any], where: str, tensors: list[Tensor]) -> Skeleton:
    children = (_take(child, f"{where}[{i}]", tensors) for i, child in enumerate(value))
    return (type(value).__name__, tuple(children))


def _take_dict(value: Mapping[Any, Any], where: str, tensors: list[Tensor]) -> Skeleton:
    pairs = []
    for key, child in value.items():
        if type(key) not in _PLAIN:
            raise TypeError(
                f"{where}: a dict key of type {type(key).__name__} cannot be handed on, "
                "expected None, bool, int, float or str"
            )
        pairs.append((_take_plain(key, where, tensors), _take(child, f"{where}[{key!r}]", tensors)))
    return ("dict", tuple(pairs))


def _take_plain(value: Any, where: str, tensors: list[Tensor]) -> Skeleton:
    # As text: 1, 1.0 and True are equal values, but not the same value.
    kind = type(value).__name__
    return ("plain", kind, value.hex() if kind == "float" else str(value))


_PLAIN: Mapping[type, Callable[[str], Any]] = {
    type(None): lambda text: None,
    bool: lambda text: text == "True",
    int: int,
    float: float.fromhex,
    str: str,
}
_READ = {kind.__name__: read for kind, read in _PLAIN.items()}

_TAKE: Mapping[type, Callable[[Any, str, list[Tensor]], Skeleton]] = {
    tuple: _take_sequence,
    list: _take_sequence,
    dict: _take_dict,
    **dict.fromkeys(_PLAIN, _take_plain),
}


def _children(skeleton: Skeleton, tensors: Sequence[Any]) -> Iterator[Any]:
    return (put_together(child, tensors) for child in skeleton[1])


_PUT: Mapping[str, Callable[[Skeleton, Sequence[Any]], Any]] = {
    "tensor": lambda skeleton, tensors: tensors[skeleton[1]],
    "tuple": lambda skeleton, tensors: tuple(_children(skeleton, tensors)),
    "list": lambda skeleton, tensors: list(_children(skeleton, tensors)),
    "dict": lambda skeleton, tensors: {
        put_together(key, tensors): put_together(child, tensors) for key, child in skeleton[1]
    },
    "instance": _put_instance,
    "plain": lambda skeleton, tensors: _READ[skeleton[1]](skeleton[2]),
}


def _as_tuples(value: Any) -> Any:
    return tuple(map(_as_tuples, value)) if isinstance(value, list) else value
