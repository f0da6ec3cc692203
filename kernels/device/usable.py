"""Whether kernels can be used on a GPU: one is compiled and run there, once in a process.

An import tells little: a compiler that is missing or too new for the driver, or a NumPy that it
does not know, shows when the first kernel is made.
"""

from __future__ import annotations

import threading
from functools import cache

import numpy as np

_LOCK = threading.Lock()
_ELEMENTS = 5


def why_not(device: int) -> str:
    """Return why kernels cannot be used on a device; empty where one has done what it should."""
    with _LOCK:  # who comes second takes the first one's answer
        return _tried(device)


@cache
def _tried(device: int) -> str:
    try:
        right = _run_one(device)
    except Exception as error:  # whatever a compiler, a driver or their libraries raise
        said = str(error).strip().splitlines() or ["no reason given"]
        return f"{type(error).__name__}: {said[0]}"
    return "" if right else "a kernel has added 1 and 2 wrongly"


def _run_one(device: int) -> bool:
    from numba import cuda

    from .combine import combine
    from .launch import Launcher
    from .table import place

    launcher = Launcher(device)
    target, incoming = (place(np.full(_ELEMENTS, x, np.float32), launcher) for x in (1, 2))
    combine("sum", "float32", target.span, incoming.span, launcher)
    with cuda.gpus[device]:
        return bool((target.read() == 3).all())
