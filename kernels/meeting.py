"""Run one rank's program over memory that all ranks map: meet, copy, fold, meet.

Everything a rank knows lies in records of int64 words, so that running a program is one call with
one address, releases the interpreter lock, and can be taken up again where it had to wait.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types

from .bell import ring_bell, set_bell, sleep_by_bell
from .compiled import Kernel, compile_callback, compile_kernel, flat
from .native import call, fence, load, relax, store, try_lock, words_at
from .records import (
    LINE_BYTES,
    NOTE_BYTES,
    ROW_WORDS,
    BoardWord,
    Count,
    Note,
    Outcome,
    Place,
    Row,
    Status,
    Where,
    WorkWord,
)
from .ring import note_end, note_start
from .rows import NOBODY, perform
from .scalars import compiled

_RUNNING, _DONE = np.int64(Status.RUNNING), np.int64(Status.DONE)
_MISMATCH, _OTHERWISE = np.int64(Status.MISMATCH), np.int64(Status.OTHERWISE)
_MEET, _PAUSE = np.int64(Row.MEET), np.int64(Row.PAUSE)
_FLAGS, _NOTES, _BASES = int(BoardWord.FLAGS), int(BoardWord.NOTES), int(BoardWord.BASES)
_RANK, _SIZE, _ARRIVED = int(BoardWord.RANK), int(BoardWord.SIZE), int(BoardWord.ARRIVED)
_TICKETS, _TURN, _YIELD = int(BoardWord.TICKET), int(BoardWord.TURN), int(BoardWord.YIELD)
_BELL, _BELLS, _BOARD_WORDS = int(BoardWord.BELL), int(BoardWord.BELLS), int(BoardWord.WORDS)
_PLACE, _CALL, _HISTORY, _ADDRESS = map(int, (Note.PLACE, Note.CALL, Note.HISTORY, Note.ADDRESS))
_NOTE_WORDS, _PEERS = int(Note.WORDS), int(Where.PEERS)
_PRIVATE = int(Place.PRIVATE)
_ON_BOARD, _STATUS, _TICKET, _ROW = map(
    int, (WorkWord.BOARD, WorkWord.STATUS, WorkWord.TICKET, WorkWord.ROW)
)
_ARRIVED_AT, _NOTED, _ROWS = map(int, (WorkWord.ARRIVED_AT, WorkWord.NOTED, WorkWord.ROWS))
_NUM_ROWS, _LISTS, _LIST_BYTES = map(int, (WorkWord.NUM_ROWS, WorkWord.LISTS, WorkWord.LIST_BYTES))
_NOTE, _WAITING_FOR, _FLYING = map(int, (WorkWord.NOTE, WorkWord.WAITING_FOR, WorkWord.FLYING))
_LOCK, _WORK_WORDS = int(WorkWord.LOCK), int(WorkWord.WORDS)
_SPINS, _YIELDS, _BROKEN = map(int, (BoardWord.SPINS, BoardWord.YIELDS, BoardWord.BROKEN))
_REFUSED = np.int64(Status.REFUSED)
_RING, _COUNTER = int(BoardWord.RING), int(BoardWord.COUNTER)
_COLLECTIVES, _BEFORE, _COUNTS = int(Count.COLLECTIVES), int(Count.HISTORY), int(Count.WORDS)
_CALLED, _ENTRY = int(WorkWord.CALLED), int(WorkWord.ENTRY)
_WELL, _BADLY = int(Outcome.DONE), int(Outcome.FAILED)


@compiled
def _note_start(work: Any, board: Any) -> Any:
    """Note in the rank's ring that a work begins, and for the others what was called before it."""
    counts = words_at(board[_COUNTER], _COUNTS)
    counts[_COLLECTIVES] += 1
    work[_NOTE + _HISTORY] = counts[_BEFORE]
    counts[_BEFORE] = 0
    work[_ENTRY] = note_start(board[_RING], work[_CALLED], counts[_COLLECTIVES])


@compiled
def _note_end(work: Any, board: Any, outcome: Any) -> Any:
    """Note that it has ended."""
    note_end(board[_RING], work[_ENTRY], outcome)


@compiled
def _compare(work: Any, board: Any) -> Any:
    """Read all notes: find each rank's buffer, and tell whether the calls fit together."""
    block = board[_NOTES] + (work[_TICKET] & 1) * board[_SIZE] * NOTE_BYTES
    size = board[_SIZE]
    bases = words_at(board[_BASES], size)
    buffers = words_at(work[_LISTS], size)
    peers = words_at(work[_LISTS] + _PEERS * work[_LIST_BYTES], size)
    first = words_at(block, _NOTE_WORDS)
    private, shared = 0, 0
    for r in range(size):
        note = words_at(block + r * NOTE_BYTES, _NOTE_WORDS)
        for word in range(_CALL, _HISTORY + 1):
            if note[word] != first[word]:
                return _MISMATCH
        place = note[_PLACE]
        peers[r] = note[_ADDRESS]
        if place >= 0:
            shared += 1
            buffers[r] = bases[r] + place
        elif place == _PRIVATE:
            private += 1
    return _OTHERWISE if private > 0 and shared > 0 else _RUNNING


@compiled
def _wake_others(board: Any) -> Any:
    fence()
    bells = words_at(board[_BELLS], board[_SIZE])
    for r in range(board[_SIZE]):
        if r != board[_RANK]:
            ring_bell(board[_BELL], bells[r])


@compiled
def _meet(work: Any, board: Any, awaited: Any) -> Any:
    """Arrive once, then look for the others as long as patience lasts; tell whether all came.

    Where nobody waits for the work there is none at first, as the others may be far from here.
    """
    size = board[_SIZE]
    if work[_ARRIVED_AT] == 0:
        if work[_NOTED] == 0:
            block = board[_NOTES] + (work[_TICKET] & 1) * size * NOTE_BYTES
            note = words_at(block + board[_RANK] * NOTE_BYTES, _NOTE_WORDS)
            for word in range(_NOTE_WORDS):
                note[word] = work[_NOTE + word]
        board[_ARRIVED] += 1
        work[_ARRIVED_AT] = board[_ARRIVED]
        store(board[_FLAGS] + board[_RANK] * LINE_BYTES, board[_ARRIVED])
        _wake_others(board)
    looks, spins = 0, board[_SPINS]
    patience = spins + board[_YIELDS] if awaited or work[_NOTED] != 0 else 0
    for r in range(size):
        flag = board[_FLAGS] + r * LINE_BYTES
        while load(flag) < work[_ARRIVED_AT]:
            looks += 1
            if looks > patience:
                work[_WAITING_FOR] = r
                return False
            if looks > spins:
                call(board[_YIELD], 0)
            else:
                relax()
    work[_ARRIVED_AT] = 0
    return True


@compiled
def _end(work: Any, board: Any, status: Any) -> Any:
    work[_STATUS] = status
    _note_end(work, board, _WELL if status == _DONE else _BADLY)
    work[_FLYING] = 0
    store(work[_ON_BOARD] + 8 * _TURN, work[_TICKET] + 1)
    return status


@compiled
def _advance(record: Any, awaited: Any) -> Any:
    work = words_at(record, _WORK_WORDS)
    if work[_STATUS] != _RUNNING:
        return work[_STATUS]
    board = words_at(work[_ON_BOARD], _BOARD_WORDS)
    if board[_BROKEN] != 0:
        work[_STATUS] = _REFUSED  # its turn never comes, or its group is being closed
        _note_end(work, board, _BADLY)
        work[_FLYING] = 0
        return _REFUSED
    if load(work[_ON_BOARD] + 8 * _TURN) != work[_TICKET]:
        return _RUNNING
    while work[_ROW] < work[_NUM_ROWS]:
        row = work[_ROWS] + work[_ROW] * (8 * ROW_WORDS)
        kind = words_at(row, 1)[0]
        if kind == _MEET:
            if not _meet(work, board, awaited):
                return _RUNNING
            if work[_NOTED] == 0:
                work[_NOTED] = 1
                verdict = _compare(work, board)
                if verdict == _MISMATCH:
                    return _end(work, board, verdict)
                if verdict == _OTHERWISE:
                    work[_STATUS] = verdict
                    return verdict
        elif kind == _PAUSE:
            work[_STATUS] = _OTHERWISE
            return _OTHERWISE
        else:
            unreached = perform(record, row)
            if unreached != NOBODY:
                # Its process ends, or has ended: whoever waits for it will be told.
                work[_WAITING_FOR] = unreached
                return _RUNNING
        work[_ROW] += 1
    return _end(work, board, _DONE)


@compiled
def _advance_alone(record: Any, awaited: Any) -> Any:
    """Go on with a work unless another thread does so right now."""
    if try_lock(record + 8 * _LOCK) == 0:
        return _RUNNING
    status = _advance(record, awaited)
    store(record + 8 * _LOCK, 0)
    return status


@functools.cache
def advance_kernel() -> Kernel:
    """Return the compiled (work record) -> Status that goes on with a work.

    Where it has to wait for a rank too long, it returns RUNNING with the rank in WAITING_FOR.
    """

    def advance_meeting(record: Any) -> Any:
        return _advance_alone(record, True)

    return compile_kernel("advance_meeting", advance_meeting, types.int64)


@functools.cache
def advance_callback() -> int:
    """Return the address of the same as a C function, for `serve_kernel`."""

    def advance_meeting_here(record: Any) -> Any:
        return _advance_alone(record, False)

    return compile_callback("advance_meeting_here", advance_meeting_here)


@functools.cache
def serve_kernel() -> Kernel:
    """Return the compiled (functions, records, turn, expected, bell, sleeps) -> None.

    It goes on with the works, each by its C function of its record, and sleeps in between, until
    one of them has ended, the word at `turn` is not `expected`, or all sleeps are taken.
    """

    def serve_works(
        functions: Any, records: Any, turn: Any, expected: Any, bell: Any, sleeps: Any
    ) -> None:
        for _ in range(sleeps):
            set_bell(bell)
            if load(turn) != expected:
                return
            for k in range(records.size):
                if call(functions[k], records[k]) != _RUNNING:
                    return
            sleep_by_bell(bell)

    word = types.int64
    array = flat(word)
    return compile_kernel("serve_works", serve_works, array, array, word, word, word, word)


@functools.cache
def abandon_kernel() -> Kernel:
    """Return the compiled (work record) that ends a work, when no thread is at it any more."""

    def abandon_meeting(record: Any) -> None:
        while try_lock(record + 8 * _LOCK) == 0:
            relax()
        work = words_at(record, _WORK_WORDS)
        work[_STATUS] = _REFUSED
        _note_end(work, words_at(work[_ON_BOARD], _BOARD_WORDS), _BADLY)
        work[_FLYING] = 0
        store(record + 8 * _LOCK, 0)

    return compile_kernel("abandon_meeting", abandon_meeting, types.int64)


@functools.cache
def launch_kernel() -> Kernel:
    """Return the same, which starts the work anew: it takes the next ticket."""

    def launch_meeting(record: Any) -> Any:
        work = words_at(record, _WORK_WORDS)
        board = words_at(work[_ON_BOARD], _BOARD_WORDS)
        if work[_FLYING] != 0:
            return _REFUSED
        # The background thread may still hold this record from its last run, and look at it.
        while try_lock(record + 8 * _LOCK) == 0:
            relax()
        if board[_BROKEN] != 0:  # behind the lock, for who breaks it, and then takes the lock
            store(record + 8 * _LOCK, 0)
            return _REFUSED
        work[_FLYING] = 1
        work[_STATUS] = _RUNNING
        work[_TICKET] = board[_TICKETS]
        work[_ROW] = 0
        work[_ARRIVED_AT] = 0
        work[_NOTED] = 0
        board[_TICKETS] += 1
        _note_start(work, board)
        status = _advance(record, True)
        store(record + 8 * _LOCK, 0)
        return status

    return compile_kernel("launch_meeting", launch_meeting, types.int64)
