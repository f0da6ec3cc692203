"""What the rows of a program do with memory: copy, point, fold, reach into another process."""

from __future__ import annotations

from typing import Any

import numpy as np

from .native import access_process, call, copy_bytes, words_at
from .records import ALL, PAIR, ROW_WORDS, BoardWord, FoldWord, Row, Where, WorkWord
from .scalars import compiled

_COPY, _POINT = np.int64(Row.COPY), np.int64(Row.POINT)
_READ, _WRITE = np.int64(Row.READ), np.int64(Row.WRITE)
_READING, _WRITING = int(BoardWord.READ), int(BoardWord.WRITE)
_SIZE, _PROCESSES = int(BoardWord.SIZE), int(BoardWord.PROCESSES)
_BOARD_WORDS, _WORK_WORDS = int(BoardWord.WORDS), int(WorkWord.WORDS)
_ON_BOARD, _TICKET = int(WorkWord.BOARD), int(WorkWord.TICKET)
_LISTS, _LIST_BYTES = int(WorkWord.LISTS), int(WorkWord.LIST_BYTES)
_FOLD, _FOLD_RECORD = int(WorkWord.FOLD), int(WorkWord.FOLD_RECORD)
_SOURCES, _NUM_SOURCES, _FROM = map(int, (FoldWord.SOURCES, FoldWord.NUM_SOURCES, FoldWord.FROM))
_TARGETS, _NUM_TARGETS, _INTO = map(int, (FoldWord.TARGETS, FoldWord.NUM_TARGETS, FoldWord.INTO))
_COUNT, _FOLD_WORDS = int(FoldWord.COUNT), int(FoldWord.WORDS)
_EAGER = int(Where.EAGER)
_ALL, _PAIR = ALL, PAIR

NOBODY = -1
"""What `perform` returns where it is done."""


@compiled
def perform(record: Any, at: Any) -> Any:
    """Do what a row says that is no meeting; return NOBODY, or whose process it cannot reach.

    record, at: addresses, of the work's words and the row's: arrays would be seven words each in a
    call, which costs a small collective a twentieth of its time.
    """
    work = words_at(record, _WORK_WORDS)
    row = words_at(at, ROW_WORDS)
    kind = row[0]
    if kind == _COPY:
        copy_bytes(_target(work, row), _source(work, row), row[7])
    elif kind == _READ:
        if not _access(work, _READING, row[5], _target(work, row), _source(work, row), row[7]):
            return row[5]
    elif kind == _WRITE:
        if not _access(work, _WRITING, row[2], _source(work, row), _target(work, row), row[7]):
            return row[2]
    elif kind == _POINT:
        words_at(work[_LISTS] + row[1] * work[_LIST_BYTES] + 8 * row[2], 1)[0] = _source(work, row)
    else:
        _fold(record, work, row)
    return NOBODY


@compiled
def _target(work: Any, row: Any) -> Any:
    return _address(work, row[1], row[2], row[3])


@compiled
def _source(work: Any, row: Any) -> Any:
    return _address(work, row[4], row[5], row[6])


@compiled
def _address(work: Any, which: Any, index: Any, offset: Any) -> Any:
    return words_at(_list(work, which) + 8 * index, 1)[0] + offset


@compiled
def _list(work: Any, which: Any) -> Any:
    if which == _EAGER:
        which += work[_TICKET] & 1
    return work[_LISTS] + which * work[_LIST_BYTES]


@compiled
def _access(work: Any, direction: Any, peer: Any, own: Any, remote: Any, nbytes: Any) -> Any:
    """Copy from a peer's own memory, or to it; tell whether that could be done."""
    board = words_at(work[_ON_BOARD], _BOARD_WORDS)
    process = words_at(board[_PROCESSES], board[_SIZE])[peer]
    done = 0
    while done < nbytes:
        got = access_process(board[direction], process, own + done, remote + done, nbytes - done)
        if got <= 0:
            return False
        done += got
    return True


@compiled
def _fold(record: Any, work: Any, row: Any) -> Any:
    size = words_at(work[_ON_BOARD], _BOARD_WORDS)[_SIZE]
    fold = words_at(record + 8 * _FOLD_RECORD, _FOLD_WORDS)
    fold[_SOURCES] = _list(work, row[4])
    fold[_NUM_SOURCES] = size
    fold[_FROM] = row[6]
    entry = 0 if row[2] < 0 else row[2]
    fold[_TARGETS] = work[_LISTS] + row[1] * work[_LIST_BYTES] + 8 * entry
    fold[_NUM_TARGETS] = 1
    if row[2] == _ALL:
        fold[_NUM_TARGETS] = size
    elif row[2] == _PAIR:
        fold[_NUM_TARGETS] = 2
    fold[_INTO] = row[3]
    fold[_COUNT] = row[7]
    call(work[_FOLD], record + 8 * _FOLD_RECORD)
