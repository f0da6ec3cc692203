"""Sleep until another rank has done something, and wake those that sleep: a bell for each rank.

A thread that has nothing to do sets its rank's bell, looks once more, and sleeps on it in the
kernel. Who stores what others may wait for rings the bells that are set. Looking again and again,
with naps between, costs a computing rank of the same core about 20 us a nap on a virtual machine.
"""

from __future__ import annotations

from typing import Any

from .native import fence, load, store, system_call, words_at
from .records import BellWord
from .scalars import compiled

_FUTEX_WAIT, _FUTEX_WAKE, _ALL = 0, 1, 0x7FFFFFFF
"""Operations of futex(2), on memory that processes share."""


_OWN, _SYSTEM_CALL, _FUTEX = int(BellWord.OWN), int(BellWord.SYSTEM_CALL), int(BellWord.FUTEX)
_SECONDS, _WORDS = int(BellWord.SECONDS), int(BellWord.WORDS)


@compiled
def ring_bell(record: Any, bell: Any) -> Any:
    """Wake the threads that sleep by a bell; a `fence` must be between it and what was stored."""
    if load(bell) != 0:
        store(bell, 0)
        words = words_at(record, _WORDS)
        system_call(words[_SYSTEM_CALL], words[_FUTEX], bell, _FUTEX_WAKE, _ALL, 0)


@compiled
def set_bell(record: Any) -> Any:
    """Announce that this thread is about to sleep; it must look once more before it does."""
    store(words_at(record, _WORDS)[_OWN], 1)
    fence()


@compiled
def sleep_by_bell(record: Any) -> Any:
    """Sleep until somebody rings the bell, a moment at most; at once if it was rung since set."""
    words = words_at(record, _WORDS)
    system_call(
        words[_SYSTEM_CALL], words[_FUTEX], words[_OWN], _FUTEX_WAIT, 1, record + 8 * _SECONDS
    )
