"""Read and write sizes, times and rates as people do."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping

_NUMBER = re.compile(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*([A-Za-z/]*)\s*")

BYTES = {
    "": 1,
    "B": 1,
    **{f"{letter}iB": 1 << (10 * power) for power, letter in enumerate("KMGT", start=1)},
    **{f"{letter}B": 1000**power for power, letter in enumerate(("k", "M", "G", "T"), start=1)},
    "KB": 1000,
}
SECONDS = {"": 1.0, "s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}
MOST_RANKS = 1_000_000
"""Of a schedule that is judged: it takes minutes, and gigabytes, beyond."""
RATES = {
    **{f"{unit}/s": float(factor) for unit, factor in BYTES.items() if unit},
    **{f"{letter}bit/s": 1000**power / 8 for power, letter in enumerate(("", "k", "M", "G", "T"))},
}

BUSBW: Mapping[str, Callable[[int], float]] = {
    "allreduce": lambda size: 2 * (size - 1) / size,
    "reduce_scatter": lambda size: (size - 1) / size,
    "allgather": lambda size: (size - 1) / size,
    "alltoall": lambda size: (size - 1) / size,
    "gather": lambda size: (size - 1) / size,
    "scatter": lambda size: (size - 1) / size,
}


def bus_factor(collective: str, size: int) -> float:
    """Return busbw / algbw, as nccl-tests' doc/PERFORMANCE.md defines it.

    Of gather and scatter as its sources do; 1 for collectives that it does not name.
    """
    factor = BUSBW.get(collective)
    return 1.0 if factor is None else factor(size)


def _read(text: str, units: dict[str, int] | dict[str, float], what: str) -> float:
    found = _NUMBER.fullmatch(text)
    if found is None or found[2] not in units:
        known = ", ".join(unit for unit in units if unit)
        raise ValueError(
            f"expected a {what} such as 5{next(u for u in units if u)}, got {text!r} "
            f"(units: {known})"
        )
    if not math.isfinite(number := float(found[1]) * units[found[2]]):
        raise ValueError(f"expected a {what} that is finite, got {text!r}")
    return number


def read_nbytes(text: str) -> int:
    """Read a number of bytes: 4, 64KiB, 1GiB, 25MB."""
    return round(_read(text, BYTES, "size"))


def read_seconds(text: str) -> float:
    """Read a time in seconds: 5us, 1.5ms, 2e-6s."""
    return _read(text, SECONDS, "time")


def read_rate(text: str) -> float:
    """Read a bandwidth in bytes a second: 25GB/s, 100Gbit/s."""
    return _read(text, RATES, "bandwidth")


def read_sizes(text: str) -> tuple[int, ...]:
    """Read numbers and ranges, ends included: 2-64 or 1,2,5-8; each number once."""
    sizes: dict[int, None] = {}
    for part in text.split(","):
        low, dash, high = part.partition("-")
        try:
            first, last = int(low), int(high if dash else low)
        except ValueError:
            raise ValueError(f"expected sizes such as 2-64 or 1,2,5-8, got {text!r}") from None
        if not 1 <= first <= last <= MOST_RANKS:
            expected = (
                f"sizes of 1 or more, {MOST_RANKS} at the most, the lower end of a range first"
            )
            raise ValueError(f"expected {expected}, got {text!r}")
        sizes.update(dict.fromkeys(range(first, last + 1)))
    return tuple(sizes)


def show_nbytes(nbytes: int) -> str:
    """Write a number of bytes in the largest binary unit that divides it."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        if nbytes and nbytes % BYTES[unit] == 0:
            return f"{nbytes // BYTES[unit]} {unit}"
    return f"{nbytes} B"


def show_seconds(seconds: float) -> str:
    """Write a time with four digits in a unit that suits it."""
    for unit in ("s", "ms", "us"):
        if seconds >= SECONDS[unit]:
            return f"{seconds / SECONDS[unit]:.4g} {unit}"
    return f"{seconds / SECONDS['ns']:.4g} ns"
