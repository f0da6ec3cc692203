"""Read and write the memory of other processes of a machine with one copy: cross-memory attach.

process_vm_readv(2) and process_vm_writev(2) are allowed where ptrace(2) is: between processes of
one user, unless the kernel (Yama), a container's filter or separate process names forbid it. So the
ranks try both once.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .communicator import Communicator

Words = npt.NDArray[np.int64]

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, -1
"""For prctl(2): Yama then allows what all other rules allow (its documentation, scope 1)."""


class _Range(ctypes.Structure):
    """An iovec of readv(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def access() -> tuple[int, int]:
    """Return the addresses of the C library's process_vm_readv and process_vm_writev, or 0."""
    try:
        functions = _library().process_vm_readv, _library().process_vm_writev
    except AttributeError:
        return 0, 0
    read, write = (ctypes.cast(one, ctypes.c_void_p).value or 0 for one in functions)
    return read, write


def accessible(node: Communicator) -> Words | None:
    """Return the process of each rank of a node, if all have access to all others' memory.

    Collective. Every rank gets the same answer. That a process answers to a number is not taken for
    enough: what is read has to be what that rank says that it has written there, and what is
    written has to arrive.
    """
    token = np.array([secrets.randbits(62)], np.int64)
    marks = np.zeros(node.size, np.int64)
    addresses = token.ctypes.data, marks.ctypes.data
    told = node.allgather(np.array([os.getpid(), *addresses, token[0]], np.int64))
    able = np.array([all(access())], np.uint8)
    if able[0]:
        _let_others_in()
    node.barrier()
    for process, source, target, expected in told.tolist() if able[0] else ():
        able[0] &= _read_word(process, source) == expected
        able[0] &= _write_word(process, target + marks.itemsize * node.rank, expected)
    # Nobody's token goes away before all have read it; all marks are there when one looks.
    node.barrier()
    able[0] &= (marks == token).all()
    return told[:, 0].copy() if node.allreduce(able, op="min")[0] else None


def _let_others_in() -> None:
    """Where Yama lets parents alone trace a process, let the user's other processes too."""
    try:
        limited = int(_YAMA.read_text()) == 1
    except (OSError, ValueError):
        return
    if limited:
        _library().prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _read_word(process: int, address: int) -> int | None:
    word = ctypes.c_int64()
    return word.value if _copy_word(_library().process_vm_readv, process, word, address) else None


def _write_word(process: int, address: int, value: int) -> bool:
    return _copy_word(_library().process_vm_writev, process, ctypes.c_int64(value), address)


def _copy_word(function: Any, process: int, word: ctypes.c_int64, address: int) -> bool:
    here = _Range(ctypes.addressof(word), ctypes.sizeof(word))
    there = _Range(address, ctypes.sizeof(word))
    function.restype = ctypes.c_ssize_t
    ones = ctypes.c_ulong(1), ctypes.c_ulong(0)
    moved = function(process, ctypes.byref(here), ones[0], ctypes.byref(there), ones[0], ones[1])
    return bool(moved == ctypes.sizeof(word))


def _library() -> ctypes.CDLL:
    return ctypes.CDLL(None)
