"""Run one rank's program over MPI messages in compiled code, without the interpreter lock.

The compiled twin of `comm.executor.execute`: the same segments, in the same order, a window of them
in flight. Everything it knows lies in records of int64 words (`message_words`), so that a run is a
call with one address, allocates nothing, and is taken up again where it had to wait.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import types
from numba.np.numpy_support import carray

from .compiled import Kernel, compile_kernel
from .foreign import call_get_count, call_post, call_test
from .message_words import Op, Slot, Status, Word
from .native import call, words_at
from .records import Outcome
from .ring import note_end, note_start
from .scalars import compiled, pointer_to

SPINS = 50
"""Looks in vain before the core is yielded between two of them."""

ROW_WORDS = 5
_SEND_OP, _RECV_OP, _REDUCE_OP, _WIDEN_OP = map(int, (Op.SEND, Op.RECV, Op.RECV_REDUCE, Op.WIDEN))
_RUNNING, _DONE = int(Status.RUNNING), int(Status.DONE)
_WRONG_SIZE, _REFUSED = int(Status.WRONG_SIZE), int(Status.REFUSED)
_ISEND, _IRECV, _TEST, _GET_COUNT = map(int, (Word.ISEND, Word.IRECV, Word.TEST, Word.GET_COUNT))
_YIELD, _COMM, _BYTE = map(int, (Word.YIELD, Word.COMM, Word.BYTE))
_ROWS, _NUM_ROWS, _FIRST, _END = map(int, (Word.ROWS, Word.NUM_ROWS, Word.FIRST, Word.END))
_SOURCE, _TARGET, _ITEM_BYTES = map(int, (Word.SOURCE, Word.TARGET, Word.ITEM_BYTES))
_TOTAL, _TOTAL_BYTES = int(Word.TOTAL), int(Word.TOTAL_BYTES)
_SCRATCH, _SLOT_BYTES, _SEGMENT = map(int, (Word.SCRATCH, Word.SLOT_BYTES, Word.SEGMENT))
_ADD, _WIDEN, _NARROW = map(int, (Word.ADD, Word.WIDEN, Word.NARROW))
_BEFORE, _AFTER, _PIECE = map(int, (Word.BEFORE, Word.AFTER, Word.PIECE))
_WINDOW, _SLOTS, _STATUS_AT = map(int, (Word.WINDOW, Word.SLOTS, Word.STATUS_AT))
_ADDING, _LIMIT = int(Word.ADDING), int(Word.LIMIT)
_TAG, _HEAD, _TAIL, _FLAG = map(int, (Word.TAG, Word.HEAD, Word.TAIL, Word.FLAG))
_SEND_ROW, _SEND_LOW = int(Word.SEND_ROW), int(Word.SEND_LOW)
_RECV_ROW, _RECV_LOW = int(Word.RECV_ROW), int(Word.RECV_LOW)
_FAILED_PEER, _FAILED_CODE = int(Word.FAILED_PEER), int(Word.FAILED_CODE)
_FAILED_WANTED, _FAILED_GOT = int(Word.FAILED_WANTED), int(Word.FAILED_GOT)
_RING, _CALLED, _SEQUENCE, _ENTRY = map(int, (Word.RING, Word.CALLED, Word.SEQUENCE, Word.ENTRY))
_WELL = int(Outcome.DONE)
_WORDS = int(Word.WORDS)
_SEND, _RECV, _SENDING, _RECEIVING = map(int, (Slot.SEND, Slot.RECV, Slot.SENDING, Slot.RECEIVING))
_DST, _SRC = int(Slot.DST), int(Slot.SRC)
_ARRIVES, _COUNT, _INTO, _SLOT_WORDS = map(int, (Slot.ARRIVES, Slot.COUNT, Slot.INTO, Slot.WORDS))


@compiled
def _slot_at(work: Any, number: Any) -> Any:
    return work[_SLOTS] + number % work[_WINDOW] * (8 * _SLOT_WORDS)


@compiled
def _compute(record: Any, function: Any, target: Any, source: Any, count: Any, divisor: Any) -> Any:
    piece = words_at(record + 8 * _PIECE, 4)
    piece[0], piece[1], piece[2], piece[3] = target, source, count, divisor
    call(function, record + 8 * _PIECE)


@compiled
def _seek(rows: Any, row: Any, end: Any, sends: Any) -> Any:
    """Return the next row that sends, or that receives, and has elements."""
    while row < end:
        op = rows[row * ROW_WORDS + 1]
        if rows[row * ROW_WORDS + 4] > 0:
            if sends and op == _SEND_OP:
                break
            if not sends and op in (_RECV_OP, _REDUCE_OP):
                break
        row += 1
    return row


@compiled
def _open_round(record: Any, work: Any, rows: Any) -> Any:
    """Find the next round's rows, and do what needs no peer."""
    first = work[_END]
    end = first
    item, wide = work[_ITEM_BYTES], work[_TOTAL_BYTES]
    work[_LIMIT] = work[_WINDOW]
    while end < work[_NUM_ROWS] and rows[end * ROW_WORDS] == rows[first * ROW_WORDS]:
        op = rows[end * ROW_WORDS + 1]
        offset, count = rows[end * ROW_WORDS + 3], rows[end * ROW_WORDS + 4]
        if op == _REDUCE_OP:
            work[_LIMIT] = work[_ADDING]
        if op >= _WIDEN_OP:
            narrow_at = work[_TARGET] + offset * item
            wide_at = work[_TOTAL] + offset * wide
            if op == _WIDEN_OP:
                _compute(record, work[_WIDEN], wide_at, narrow_at, count, work[_BEFORE])
            else:
                _compute(record, work[_NARROW], narrow_at, wide_at, count, work[_AFTER])
        end += 1
    work[_FIRST], work[_END] = first, end
    work[_SEND_ROW], work[_SEND_LOW] = _seek(rows, first, end, True), 0
    work[_RECV_ROW], work[_RECV_LOW] = _seek(rows, first, end, False), 0


@compiled
def _refuse(work: Any, peer: Any, code: Any, wanted: Any) -> Any:
    work[_FAILED_PEER], work[_FAILED_CODE], work[_FAILED_WANTED] = peer, code, wanted
    return _REFUSED


@compiled
def _post_receive(work: Any, rows: Any, slot: Any, at: Any) -> Any:
    row, low = work[_RECV_ROW], work[_RECV_LOW]
    op, peer = rows[row * ROW_WORDS + 1], rows[row * ROW_WORDS + 2]
    offset, length = rows[row * ROW_WORDS + 3] + low, rows[row * ROW_WORDS + 4]
    count = min(work[_SEGMENT], length - low)
    slot[_SRC], slot[_COUNT] = peer, count
    slot[_ARRIVES] = work[_TARGET] + offset * work[_ITEM_BYTES]
    if op == _REDUCE_OP:
        slot[_INTO] = work[_TOTAL] + offset * work[_TOTAL_BYTES]
        slot[_ARRIVES] = work[_SCRATCH] + work[_HEAD] % work[_ADDING] * work[_SLOT_BYTES]
    nbytes = count * work[_ITEM_BYTES]
    code = call_post(
        work[_IRECV],
        slot[_ARRIVES],
        nbytes,
        work[_BYTE],
        peer,
        work[_TAG],
        work[_COMM],
        at + 8 * _RECV,
    )
    if code != 0:
        return _refuse(work, peer, code, nbytes)
    slot[_RECEIVING] = 1
    work[_RECV_LOW] = low + count
    if low + count >= length:
        work[_RECV_ROW], work[_RECV_LOW] = _seek(rows, row + 1, work[_END], False), 0
    return _RUNNING


@compiled
def _post_send(work: Any, rows: Any, slot: Any, at: Any) -> Any:
    row, low = work[_SEND_ROW], work[_SEND_LOW]
    peer = rows[row * ROW_WORDS + 2]
    offset, length = rows[row * ROW_WORDS + 3] + low, rows[row * ROW_WORDS + 4]
    count = min(work[_SEGMENT], length - low)
    slot[_DST] = peer
    code = call_post(
        work[_ISEND],
        work[_SOURCE] + offset * work[_ITEM_BYTES],
        count * work[_ITEM_BYTES],
        work[_BYTE],
        peer,
        work[_TAG],
        work[_COMM],
        at + 8 * _SEND,
    )
    if code != 0:
        return _refuse(work, peer, code, -1)
    slot[_SENDING] = 1
    work[_SEND_LOW] = low + count
    if low + count >= length:
        work[_SEND_ROW], work[_SEND_LOW] = _seek(rows, row + 1, work[_END], True), 0
    return _RUNNING


@compiled
def _test(record: Any, work: Any, request: Any) -> Any:
    """Return MPI's error code; the int at FLAG tells whether the request is complete."""
    work[_FLAG] = 0
    return call_test(work[_TEST], request, record + 8 * _FLAG, work[_STATUS_AT])


@compiled
def _flag(record: Any) -> Any:
    return carray(pointer_to(record + 8 * _FLAG, np.int32), 1)[0]


@compiled
def _look(record: Any, work: Any, slot: Any, at: Any) -> Any:
    """Ask MPI about the messages of a slot; return RUNNING, or why one failed."""
    if slot[_RECEIVING]:
        wanted = slot[_COUNT] * work[_ITEM_BYTES]
        code = _test(record, work, at + 8 * _RECV)
        if code != 0:
            return _refuse(work, slot[_SRC], code, wanted)
        if _flag(record):
            slot[_RECEIVING] = 0
            work[_FLAG] = 0
            call_get_count(work[_GET_COUNT], work[_STATUS_AT], work[_BYTE], record + 8 * _FLAG)
            if _flag(record) != wanted:
                work[_FAILED_PEER], work[_FAILED_WANTED] = slot[_SRC], wanted
                work[_FAILED_GOT] = _flag(record)
                return _WRONG_SIZE
    if slot[_SENDING]:
        code = _test(record, work, at + 8 * _SEND)
        if code != 0:
            return _refuse(work, slot[_DST], code, -1)
        if _flag(record):
            slot[_SENDING] = 0
    return _RUNNING


@compiled
def _finish_tail(record: Any, work: Any, looks: Any) -> Any:
    """Look for the oldest slot's messages up to `looks` times; add what came once both are done.

    Only then: a rank may be sending the very memory that it adds to.
    """
    at = _slot_at(work, work[_TAIL])
    slot = words_at(at, _SLOT_WORDS)
    for look in range(looks):
        status = _look(record, work, slot, at)
        if status != _RUNNING:
            return status
        if slot[_RECEIVING] == 0 and slot[_SENDING] == 0:
            if slot[_INTO] != 0:
                _compute(
                    record, work[_ADD], slot[_INTO], slot[_ARRIVES], slot[_COUNT], work[_BEFORE]
                )
            work[_TAIL] += 1
            return _DONE
        if look >= SPINS:
            call(work[_YIELD], 0)
    return _RUNNING


@compiled
def _advance(record: Any, looks: Any) -> Any:
    work = words_at(record, _WORDS)
    rows = words_at(work[_ROWS], work[_NUM_ROWS] * ROW_WORDS)
    while True:
        end = work[_END]
        more = work[_SEND_ROW] < end or work[_RECV_ROW] < end
        if more and work[_HEAD] - work[_TAIL] < work[_LIMIT]:
            at = _slot_at(work, work[_HEAD])
            slot = words_at(at, _SLOT_WORDS)
            slot[_SENDING], slot[_RECEIVING], slot[_INTO] = 0, 0, 0
            work[_HEAD] += 1
            status = _RUNNING
            if work[_RECV_ROW] < end:
                status = _post_receive(work, rows, slot, at)
            if status == _RUNNING and work[_SEND_ROW] < end:
                status = _post_send(work, rows, slot, at)
            if status != _RUNNING:
                return status
        elif work[_HEAD] > work[_TAIL]:
            status = _finish_tail(record, work, looks)
            if status != _DONE:
                return status
        elif end < work[_NUM_ROWS]:
            _open_round(record, work, rows)
        else:
            return _DONE


@functools.cache
def advance_kernel() -> Kernel:
    """Return the compiled (record, tag, looks) -> Status that goes on with a program.

    tag: start anew with this tag; -1 to go on.  looks: how often to look for one message before
    returning RUNNING. The slots from TAIL to HEAD are then in flight; so they are after a failure,
    which the caller notes.
    """

    def advance_messages(record: Any, tag: Any, looks: Any) -> Any:
        work = words_at(record, _WORDS)
        if tag >= 0:
            work[_TAG] = tag
            work[_FIRST], work[_END], work[_HEAD], work[_TAIL] = 0, 0, 0, 0
            work[_SEND_ROW], work[_RECV_ROW] = 0, 0
            if work[_RING] != 0:
                work[_ENTRY] = note_start(work[_RING], work[_CALLED], work[_SEQUENCE])
        status = _advance(record, looks)
        if status == _DONE and work[_ENTRY] != 0:
            note_end(work[_RING], work[_ENTRY], _WELL)
        return status

    return compile_kernel(
        "advance_messages", advance_messages, types.int64, types.int64, types.int64
    )
