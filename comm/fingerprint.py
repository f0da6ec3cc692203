"""What all ranks must ask for alike, folded into the tags of their messages.

Calls that differ have other tags, so that no message of one is ever taken for the other's: ranks
that disagree wait instead of adding what does not belong together, at no cost to those that agree.
What they called is then compared by `comm.inquiry`.

Where each rank only sends, as where each takes itself for the root of a broadcast, nobody waits. So
a tag holds the history of the group's calls, not the call's own fingerprint alone: behind calls
that differ no messages meet either. A meeting on a board compares the history since the last one.
"""

from __future__ import annotations

import zlib
from functools import lru_cache

from .trace import Signature

_MOST_BITS = 30
_WORD, _FACTOR = (1 << 32) - 1, 0x9E3779B1
"""Odd, so that histories that differ do so behind every further call that is alike."""

Shares = tuple[int, int, int]


def agreed(signature: Signature, way: str) -> tuple[str, str, str, int, int, str]:
    """Return what of a collective must be the same on all ranks.

    way: how its messages go, as its algorithm.
    """
    if signature.operation == "scatter":  # the root alone knows what is scattered
        return ("scatter", "", "", 0, signature.peer, way)
    operation, op, dtype, elements, peer = signature
    return (operation, op, dtype, elements, peer, way)


@lru_cache(maxsize=4096)
def fingerprint(signature: Signature, way: str) -> int:
    """Return 32 bits that differ where calls do, but for chance."""
    return zlib.crc32(repr(agreed(signature, way)).encode())


def history_with(history: int, mark: int) -> int:
    """Return the history of calls, 0 before the first, with one more that has this fingerprint."""
    return (history * _FACTOR + mark) & _WORD


def tag_of(sequence: int, mark: int, shares: Shares) -> int:
    """Return the tag of a group's collective number `sequence`.

    mark: the history of calls up to it, or its fingerprint alone.
    shares: of the transport's tags, from `shares_of`.
    """
    away, low, mask = shares
    return (mark >> away) << low | (sequence & mask)


def shares_of(max_tag: int) -> Shares:
    """Return how many bits of a fingerprint are left out, how many count works, and their mask.

    Half of the bits that MPI allows tell works in flight at the same time apart, and half of them
    different calls.
    """
    bits = min(max_tag.bit_length() - (max_tag & (max_tag + 1) != 0), _MOST_BITS)
    low = bits // 2
    return 32 - (bits - low), low, (1 << low) - 1
