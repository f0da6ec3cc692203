"""Read the memory of the other processes of a machine with one copy: cross-memory attach.

process_vm_readv(2) is allowed where ptrace(2) is: between processes of one user, unless the kernel
(Yama), a container's filter or separate process names forbid it. So the ranks try it once.
"""

from __future__ import annotations

import ctypes
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from .communicator import Communicator

Words = npt.NDArray[np.int64]

_YAMA = Path("/proc/sys/kernel/yama/ptrace_scope")
_PR_SET_PTRACER, _PR_SET_PTRACER_ANY = 0x59616D61, -1
"""Of prctl(2): whoever may by the other rules may also by Yama's (its documentation, scope 1)."""


class _Range(ctypes.Structure):
    """An iovec of readv(2)."""

    _fields_ = (("address", ctypes.c_void_p), ("nbytes", ctypes.c_size_t))


def reading() -> int:
    """Return the address of the C library's process_vm_readv, 0 where it has none."""
    try:
        function = ctypes.CDLL(None).process_vm_readv
    except AttributeError:
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def readable(node: Communicator) -> Words | None:
    """Return the process of each rank of a node, if all can read all others' memory; collective.

    Every rank gets the same answer. That a process answers to a number is not taken for enough:
    what is read has to be what that rank says that it has written there.
    """
    token = np.array([secrets.randbits(62)], np.int64)
    told = node.allgather(np.array([os.getpid(), token.ctypes.data, token[0]], np.int64))
    able = np.array([reading() != 0], np.uint8)
    if able[0]:
        _let_others_read()
    node.barrier()
    for process, address, expected in told.tolist() if able[0] else ():
        able[0] &= _read_word(process, address) == expected
    # Nobody's token goes away before all have read it.
    return told[:, 0].copy() if node.allreduce(able, op="min")[0] else None


def _let_others_read() -> None:
    """Where Yama lets parents alone trace a process, let the user's other processes too."""
    try:
        limited = int(_YAMA.read_text()) == 1
    except (OSError, ValueError):
        return
    if limited:
        ctypes.CDLL(None).prctl(_PR_SET_PTRACER, _PR_SET_PTRACER_ANY, 0, 0, 0)


def _read_word(process: int, address: int) -> int | None:
    word = ctypes.c_int64()
    here = _Range(ctypes.addressof(word), 8)
    there = _Range(address, 8)
    read = ctypes.CDLL(None).process_vm_readv
    read.restype = ctypes.c_ssize_t
    ones = ctypes.c_ulong(1), ctypes.c_ulong(0)
    got = read(process, ctypes.byref(here), ones[0], ctypes.byref(there), ones[0], ones[1])
    return word.value if got == 8 else None
