"""Which reducing operation is defined on which dtype."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

from .storage import PARTS, STORAGE, listed

_ALL = tuple(STORAGE)
_NUMBERS = tuple(name for name in STORAGE if name != "bool")
_REALS = tuple(name for name in _NUMBERS if name not in PARTS)
_ORDERED = (*_REALS, "bool")

# On bool, min is "all" and max is "any"; sums and products of bool have no agreed meaning.
ALLOWED: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {"sum": _NUMBERS, "prod": _REALS, "min": _ORDERED, "max": _ORDERED}
)


def check_operation(op: str, dtype: str, among: tuple[str, ...] = _ALL) -> None:
    """Refuse a pair outside ALLOWED, or a dtype not `among` those that the caller serves."""
    if op not in ALLOWED:
        raise TypeError(f"op {op!r} on dtype {dtype!r}: expected op to be one of {listed(ALLOWED)}")
    dtypes = [name for name in ALLOWED[op] if name in among]
    if dtype not in dtypes:
        raise TypeError(
            f"op {op!r} on dtype {dtype!r}: expected dtype to be one of {listed(dtypes)}"
        )
