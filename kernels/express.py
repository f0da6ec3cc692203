"""Send or receive a small message again in one call, where nobody has to wait for anything.

Where anything more has to be done, nothing is touched here, and `mailbox` does it. Counting, noting
and copying are all done by the one call, so that a signal's handler, which runs in Python, comes
before all of it or after it.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from .compiled import Kernel, compile_kernel
from .mailbox import describe, find, pause, slot_of
from .mailbox_words import (
    EXPRESS_STRIDE,
    EXPRESS_WINDOWS,
    SLOT_BYTES,
    SLOTS,
    Express,
    Kind,
    Letter,
    Out,
    Slot,
)
from .native import copy_bytes, load, store, words_at
from .records import Count, Outcome, Status
from .ring import note_end, note_start
from .scalars import compiled

_RUNNING, _DONE = np.int64(Status.RUNNING), np.int64(Status.DONE)
_BYTES, _WELL = int(Kind.BYTES), int(Outcome.DONE)
_S_NBYTES, _S_PLACE, _S_WINDOW = int(Slot.NBYTES), int(Slot.PLACE), int(Slot.WINDOW)
_S_KIND, _S_WORDS = int(Slot.KIND), SLOT_BYTES // 8
_S_PRODUCED, _S_DONE = 8 * Slot.PRODUCED, 8 * Slot.DONE
_SENDS, _TAG, _ORDINAL = int(Letter.SENDS), int(Letter.TAG), int(Letter.ORDINAL)
_NBYTES, _ADDRESS, _BASE = int(Letter.NBYTES), int(Letter.ADDRESS), int(Letter.BASE)
_PLACE, _WINDOW = int(Letter.PLACE), int(Letter.WINDOW)
_SENT, _SLOT, _SLOTS, _WINDOWS = map(int, (Out.SENT, Out.SLOT, Out.SLOTS, Out.WINDOWS))
_TAKEN, _USERS, _OUT_WORDS = int(Out.TAKEN), int(Out.USERS), int(Out.WORDS)
_OUT, _COUNTER, _TALLY = int(Express.OUT), int(Express.COUNTER), int(Express.TALLY)
_RING, _CALLED, _WORDS = int(Express.RING), int(Express.CALLED), int(Express.WORDS)
_MESSAGES, _COUNTS = int(Count.MESSAGES), int(Count.WORDS)


@compiled
def _count(express: Any) -> Any:
    """Count and note a message that has ended well."""
    counts, tally = words_at(express[_COUNTER], _COUNTS), words_at(express[_TALLY], 1)
    tally[0] += 1
    counts[_MESSAGES] += 1
    number = note_start(express[_RING], express[_CALLED], counts[_MESSAGES])
    note_end(express[_RING], number, _WELL)


@compiled
def _is_free(out: Any, window: Any) -> Any:
    """Tell whether the last message of a window was received."""
    user, last = out[_USERS + 2 * window], out[_USERS + 2 * window + 1]
    return user == 0 or load(user + _S_DONE) >= last


@compiled
def _send(express: Any, tag: Any, of_tag: Any) -> Any:
    """Copy a message to a window, if there are a slot and a window for it."""
    out = words_at(express[_OUT], _OUT_WORDS)
    sequence, tried = out[_SENT] + 1, 0
    if sequence % SLOTS == 0 or out[_SLOTS] == 0:
        return _RUNNING
    window = out[_TAKEN]  # if it is free; else the first that is, so that few are ever written to
    while not _is_free(out, window):
        if tried == EXPRESS_WINDOWS:
            return _RUNNING
        window, tried = tried, tried + 1
    at = out[_SLOTS] + sequence % SLOTS * SLOT_BYTES
    place, nbytes = out[_WINDOWS] + window * EXPRESS_STRIDE, express[_NBYTES]
    copy_bytes(place, express[_ADDRESS], nbytes)
    of_tag[0] += 1
    express[_TAG], express[_ORDINAL] = tag, of_tag[0]
    express[_PLACE], express[_WINDOW] = place - express[_BASE], nbytes
    describe(express, at)
    store(at + _S_PRODUCED, nbytes)
    store(at, sequence)
    out[_SENT], out[_SLOT], out[_TAKEN] = sequence, at, window
    out[_USERS + 2 * window], out[_USERS + 2 * window + 1] = at, sequence
    return _DONE


@compiled
def _receive(letter: Any, tag: Any, of_tag: Any, patient: Any) -> Any:
    """Copy a message that has come, whole, from where it lies; patient: look for it a while."""
    letter[_TAG], letter[_ORDINAL] = tag, of_tag[0] + 1
    looks, sequence = 0, find(letter)
    while sequence == 0:
        looks += 1
        if patient == 0 or not pause(letter, looks):
            return _RUNNING
        sequence = find(letter)
    at, nbytes = slot_of(letter, sequence), letter[_NBYTES]
    slot = words_at(at, _S_WORDS)
    if slot[_S_KIND] != _BYTES or slot[_S_NBYTES] != nbytes or slot[_S_WINDOW] < nbytes:
        return _RUNNING
    if load(at + _S_PRODUCED) != nbytes:
        return _RUNNING
    copy_bytes(letter[_ADDRESS], letter[_BASE] + slot[_S_PLACE], nbytes)
    of_tag[0] += 1
    store(at + _S_DONE, sequence)
    return _DONE


@functools.cache
def express_kernel() -> Kernel:
    """Return the compiled (record, tag, address of its count, patient) -> Status.

    DONE: the message has been sent, or received.  RUNNING: it has not been begun.
    """

    def express_message(record: Any, tag: Any, count: Any, patient: Any) -> Any:
        express, of_tag = words_at(record, _WORDS), words_at(count, 1)
        if express[_SENDS] != 0:
            status = _send(express, tag, of_tag)
        else:
            status = _receive(express, tag, of_tag, patient)
        if status == _DONE:
            _count(express)
        return status

    word = types.int64
    return compile_kernel("express_message", express_message, word, word, word, word)
