"""Load what Numba CUDA makes code with, beside a NumPy that it does not know yet.

NumPy 2.5 has dropped `row_stack`, of which numba-cuda 0.30 registers an implementation when it
compiles its first kernel: the compilation, of any kernel, ends in an AttributeError. Its authors
know (numba-cuda issue 907), and a release for NumPy 2.5 is not announced.
"""

from __future__ import annotations

import threading
from typing import Any

import numpy as np

_LOCK = threading.Lock()


def load_registries() -> None:
    """Import Numba CUDA's implementations of NumPy's functions, which is done once in a process.

    A name that they need and NumPy lacks is there meanwhile, and gone again for the program.
    """
    with _LOCK:
        if hasattr(np, "row_stack"):
            return
        found: Any = np
        found.row_stack = _row_stack
        try:
            import numba.cuda.np.arrayobj  # noqa: F401
        finally:
            del found.row_stack


def _row_stack(_arrays: Any) -> None:
    """Stand for what no kernel calls: Numba refers to its implementation by this function."""
