"""Carry one message between two ranks through memory that both map.

The sender writes what it sends into a slot of its box for the receiver, in the order of its sends;
the receiver looks for its tag, copies the bytes to their place, and marks the slot as done. Where
the receiver maps the sender's buffer, or has access to its process, it reads them there, else they
pass through a window of the sender's: one as large as the message lets the sender go on at once.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from .bell import ring_bell
from .compiled import Kernel, compile_callback, compile_kernel
from .mailbox_words import ASKED, GIVEN_UP, RUNS, SLOT_BYTES, SLOTS, Kind, Letter, Slot
from .native import (
    access_process,
    call,
    compare_exchange,
    copy_bytes,
    fence,
    load,
    relax,
    store,
    try_lock,
    words_at,
)
from .records import Status
from .scalars import compiled

_RUNNING, _DONE = np.int64(Status.RUNNING), np.int64(Status.DONE)
_MISMATCH, _REFUSED = np.int64(Status.MISMATCH), np.int64(Status.REFUSED)
_FOUND_NOTE, _WANTS_BYTES = np.int64(Status.NOTE), np.int64(Status.BYTES)
_NOTE, _PRIVATE, _ASKED, _GIVEN_UP = int(Kind.NOTE), int(Kind.PRIVATE), int(ASKED), int(GIVEN_UP)
_S_TAG, _S_ORDINAL = int(Slot.TAG), int(Slot.ORDINAL)
_S_NBYTES, _S_PLACE, _S_WINDOW = int(Slot.NBYTES), int(Slot.PLACE), int(Slot.WINDOW)
_S_KIND = int(Slot.KIND)
_S_PRODUCED, _S_CONSUMED, _S_DONE = 8 * Slot.PRODUCED, 8 * Slot.CONSUMED, 8 * Slot.DONE
_S_WORDS = SLOT_BYTES // 8
_STATUS, _LOCK, _SENDS, _BOX = map(int, (Letter.STATUS, Letter.LOCK, Letter.SENDS, Letter.BOX))
_SEQUENCE, _TAG, _ORDINAL = int(Letter.SEQUENCE), int(Letter.TAG), int(Letter.ORDINAL)
_NBYTES, _ADDRESS, _PLACE = int(Letter.NBYTES), int(Letter.ADDRESS), int(Letter.PLACE)
_WINDOW_AT, _WINDOW, _PIECE = int(Letter.WINDOW_AT), int(Letter.WINDOW), int(Letter.PIECE)
_PUBLISHED, _MOVED, _BASE = int(Letter.PUBLISHED), int(Letter.MOVED), int(Letter.BASE)
_LOW, _FOUND, _YIELD = int(Letter.LOW), int(Letter.FOUND), int(Letter.YIELD)
_SPINS, _YIELDS, _WORDS = int(Letter.SPINS), int(Letter.YIELDS), int(Letter.WORDS)
_BELL, _PEER_BELL, _KIND = int(Letter.BELL), int(Letter.PEER_BELL), int(Letter.KIND)
_READ, _PROCESS = int(Letter.READ), int(Letter.PROCESS)


@compiled
def _run_of(letter: Any, sequence: Any) -> Any:
    """Return a receiver's word of the run of slots that a message lies in; see BOX_BYTES."""
    return load(letter[_BOX] + sequence // SLOTS % RUNS * 8)


@compiled
def slot_of(letter: Any, sequence: Any) -> Any:
    if letter[_SENDS] != 0:
        return letter[_BOX]
    return letter[_BASE] + _run_of(letter, sequence) + sequence % SLOTS * SLOT_BYTES


@compiled
def pause(letter: Any, looks: Any) -> Any:
    """Let a moment pass; tell whether patience is not exhausted yet."""
    if looks > letter[_SPINS] + letter[_YIELDS]:
        return False
    if looks > letter[_SPINS]:
        call(letter[_YIELD], 0)
    else:
        relax()
    return True


@compiled
def _tell(letter: Any, at: Any, value: Any) -> Any:
    """Store a word that the other side may wait for."""
    store(at, value)
    if letter[_PEER_BELL] != 0:
        fence()
        ring_bell(letter[_BELL], letter[_PEER_BELL])


@compiled
def describe(letter: Any, at: Any) -> Any:
    """Write to a slot what its message is, before it is told of."""
    slot = words_at(at, _S_WORDS)
    slot[_S_TAG] = letter[_TAG]
    slot[_S_ORDINAL] = letter[_ORDINAL]
    slot[_S_NBYTES] = letter[_NBYTES]
    slot[_S_PLACE] = letter[_PLACE]
    slot[_S_WINDOW] = letter[_WINDOW]
    slot[_S_KIND] = letter[_KIND]
    store(at + _S_CONSUMED, 0)


@compiled
def _publish(letter: Any, at: Any) -> Any:
    describe(letter, at)
    if letter[_WINDOW_AT] == 0:
        store(at + _S_PRODUCED, letter[_NBYTES])
        _tell(letter, at, letter[_SEQUENCE])
    else:
        _fill(letter, at)
    letter[_PUBLISHED] = 1


@compiled
def _fill(letter: Any, at: Any) -> Any:
    """Copy as much as the window takes; the receiver takes it piece by piece meanwhile."""
    room, moved = min(letter[_WINDOW], letter[_NBYTES]), 0
    while True:
        nbytes = min(letter[_PIECE], room - moved)
        copy_bytes(letter[_WINDOW_AT] + moved, letter[_ADDRESS] + moved, nbytes)
        store(at + _S_PRODUCED, moved + nbytes)
        if moved == 0:
            _tell(letter, at, letter[_SEQUENCE])
        moved += nbytes
        if moved >= room:
            break
    letter[_MOVED] = moved


@compiled
def _verdict(letter: Any, consumed: Any) -> Any:
    if consumed >= 0:
        return _DONE
    if consumed == _ASKED:
        return _WANTS_BYTES
    if consumed == _GIVEN_UP:
        return _REFUSED
    letter[_FOUND] = -1 - consumed
    return _MISMATCH


@compiled
def _send(letter: Any) -> Any:
    at = slot_of(letter, letter[_SEQUENCE])
    looks = 0
    if letter[_PUBLISHED] == 0:
        _publish(letter, at)
    if letter[_WINDOW_AT] == 0:
        while load(at + _S_DONE) < letter[_SEQUENCE]:
            looks += 1
            if not pause(letter, looks):
                return _RUNNING
        return _verdict(letter, load(at + _S_CONSUMED))
    while letter[_MOVED] < letter[_NBYTES]:
        moved = letter[_MOVED]
        nbytes = min(letter[_PIECE], letter[_NBYTES] - moved)
        consumed = load(at + _S_CONSUMED)
        if consumed < 0:
            return _verdict(letter, consumed)
        if consumed + letter[_WINDOW] < moved + nbytes:
            looks += 1
            if not pause(letter, looks):
                return _RUNNING
            continue
        looks = 0
        copy_bytes(letter[_WINDOW_AT] + moved % letter[_WINDOW], letter[_ADDRESS] + moved, nbytes)
        letter[_MOVED] = moved + nbytes
        _tell(letter, at + _S_PRODUCED, moved + nbytes)
    return _DONE


@compiled
def find(letter: Any) -> Any:
    """Return the number of the message that this letter waits for, 0 while it is not there."""
    low = load(letter[_LOW])
    sequence = low
    while True:
        run = _run_of(letter, sequence)
        if run == -1 - sequence // SLOTS:
            following = (sequence // SLOTS + 1) * SLOTS
            if sequence == low:
                low = following
                store(letter[_LOW], low)
            sequence = following
            continue
        if run <= 0:  # the sender has not come to it
            break
        at = letter[_BASE] + run + sequence % SLOTS * SLOT_BYTES
        published = load(at)
        if published < sequence:
            break
        # A slot that holds a later message has long been done with this one.
        done = published > sequence or load(at + _S_DONE) >= sequence
        if not done:
            slot = words_at(at, _S_WORDS)
            fits = slot[_S_TAG] == letter[_TAG] and slot[_S_ORDINAL] == letter[_ORDINAL]
            # Another thread may have taken the message meanwhile, and the slot be in use again.
            if fits and load(at) == sequence:
                return sequence
        elif sequence == low:
            low += 1
            store(letter[_LOW], low)
        sequence += 1
    return np.int64(0)


@compiled
def _ask(letter: Any, at: Any) -> Any:
    """Have done with what is there, and ask for the bytes."""
    store(at + _S_CONSUMED, _ASKED)
    _tell(letter, at + _S_DONE, letter[_SEQUENCE])


@compiled
def _end(letter: Any, at: Any) -> Any:
    """Have done with a message, which its sender may have given up while it was taken."""
    given_up = load(at + _S_PRODUCED) < 0
    _tell(letter, at + _S_DONE, letter[_SEQUENCE])
    return _REFUSED if given_up else _DONE


@compiled
def _read(letter: Any, at: Any, source: Any) -> Any:
    """Copy from the sender's own memory; ask for the bytes where that is refused."""
    while letter[_MOVED] < letter[_NBYTES] and load(at + _S_PRODUCED) >= 0:
        moved = letter[_MOVED]
        own, remote, nbytes = letter[_ADDRESS] + moved, source + moved, letter[_NBYTES] - moved
        got = access_process(letter[_READ], letter[_PROCESS], own, remote, nbytes)
        if got <= 0:
            if load(at + _S_PRODUCED) < 0:
                break
            _ask(letter, at)
            return _WANTS_BYTES
        letter[_MOVED] = moved + got
    return _end(letter, at)


@compiled
def _receive(letter: Any) -> Any:
    looks = 0
    while letter[_SEQUENCE] == 0:
        letter[_SEQUENCE] = find(letter)
        if letter[_SEQUENCE] == 0:
            looks += 1
            if not pause(letter, looks):
                return _RUNNING
    at = slot_of(letter, letter[_SEQUENCE])
    slot = words_at(at, _S_WORDS)
    if slot[_S_NBYTES] != letter[_NBYTES]:
        letter[_FOUND] = slot[_S_NBYTES]
        store(at + _S_CONSUMED, -1 - letter[_NBYTES])
        _tell(letter, at + _S_DONE, letter[_SEQUENCE])
        return _MISMATCH
    is_note = slot[_S_KIND] == _NOTE
    if is_note != (letter[_KIND] == _NOTE):
        if is_note:
            _ask(letter, at)
        return _WANTS_BYTES
    if is_note:
        letter[_PLACE] = slot[_S_PLACE]
        return _FOUND_NOTE
    if slot[_S_KIND] == _PRIVATE:
        return _read(letter, at, slot[_S_PLACE])
    source, window = letter[_BASE] + slot[_S_PLACE], slot[_S_WINDOW]
    while letter[_MOVED] < letter[_NBYTES]:
        moved = letter[_MOVED]
        there = load(at + _S_PRODUCED) - moved
        if there == 0:
            looks += 1
            if not pause(letter, looks):
                return _RUNNING
            continue
        if there < 0:  # GIVEN_UP
            break
        looks = 0
        start = moved % window
        nbytes = min(there, window - start)
        copy_bytes(letter[_ADDRESS] + moved, source + start, nbytes)
        letter[_MOVED] = moved + nbytes
        _tell(letter, at + _S_CONSUMED, moved + nbytes)
    return _end(letter, at)


@compiled
def _advance_alone(record: Any) -> Any:
    """Go on with a letter unless another thread does so right now."""
    if try_lock(record + 8 * _LOCK) == 0:
        return _RUNNING
    letter = words_at(record, _WORDS)
    if letter[_STATUS] == _RUNNING:
        letter[_STATUS] = _send(letter) if letter[_SENDS] != 0 else _receive(letter)
    status = letter[_STATUS]
    store(record + 8 * _LOCK, 0)
    return status


@functools.cache
def advance_letter_kernel() -> Kernel:
    """Return the compiled (letter record) -> Status that goes on with a message."""

    def advance_letter(record: Any) -> Any:
        return _advance_alone(record)

    return compile_kernel("advance_letter", advance_letter, types.int64)


@functools.cache
def advance_letter_callback() -> int:
    """Return the address of the same as a C function, for `meeting.serve_kernel`."""

    def advance_letter_here(record: Any) -> Any:
        return _advance_alone(record)

    return compile_callback("advance_letter_here", advance_letter_here)


@functools.cache
def settle_note_kernel() -> Kernel:
    """Return the compiled (letter record, whether it served) that has done with a found note."""

    def settle_note(record: Any, served: Any) -> None:
        letter = words_at(record, _WORDS)
        at = slot_of(letter, letter[_SEQUENCE])
        letter[_STATUS] = _DONE
        if served != 0:
            _tell(letter, at + _S_DONE, letter[_SEQUENCE])
        else:
            _ask(letter, at)

    return compile_kernel("settle_note", settle_note, types.int64, types.int64)


@compiled
def _give_up_asking(letter: Any) -> None:
    """Tell the sender of a message, where its bytes were asked for, that nobody takes them.

    The slot may be in use again by now, for a message that is none of this letter's.
    """
    run, sequence = _run_of(letter, letter[_SEQUENCE]), letter[_SEQUENCE]
    if sequence == 0 or run <= 0:
        return
    at = letter[_BASE] + run + sequence % SLOTS * SLOT_BYTES
    if load(at) == sequence:
        compare_exchange(at + _S_CONSUMED, _ASKED, _GIVEN_UP)


@compiled
def _break_off(letter: Any) -> Any:
    """Give a message up, and tell the other side where that would wait for the rest.

    Returns: whether the message was begun.
    """
    running = letter[_STATUS] == _RUNNING
    if letter[_SENDS] != 0:
        if letter[_PUBLISHED] == 0:
            return False
        # Not to be read behind what its sender may do now, but where a copy holds all of it.
        if running and letter[_KIND] != _NOTE and letter[_MOVED] < letter[_NBYTES]:
            _tell(letter, slot_of(letter, letter[_SEQUENCE]) + _S_PRODUCED, _GIVEN_UP)
        return True
    if not running:
        _give_up_asking(letter)
        return letter[_STATUS] != _FOUND_NOTE  # which is still there
    if letter[_MOVED] == 0:
        return False
    at = slot_of(letter, letter[_SEQUENCE])
    store(at + _S_CONSUMED, _GIVEN_UP)
    _tell(letter, at + _S_DONE, letter[_SEQUENCE])
    return True


@functools.cache
def abandon_letter_kernel() -> Kernel:
    """Return the compiled (letter record) that ends a letter, when no thread is at it any more.

    Returns: whether its receiver may have seen the message, or begun to take it.
    """

    def abandon_letter(record: Any) -> Any:
        while try_lock(record + 8 * _LOCK) == 0:
            relax()
        letter = words_at(record, _WORDS)
        begun = _break_off(letter)
        letter[_STATUS] = _REFUSED
        store(record + 8 * _LOCK, 0)
        return begun

    return compile_kernel("abandon_letter", abandon_letter, types.int64)
