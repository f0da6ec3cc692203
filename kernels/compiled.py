"""Compile one kernel for one signature, and keep the machine code on disk.

Numba's on-disk cache has an index per function name, rewritten without a lock.  Two ranks that
compile different variants under one name at the same moment can leave an index entry that points
at the other variant's code.  Here every variant has a name of its own, which also covers what
Numba's freshness check overlooks: the sources of called functions, and nodes with different
processors that share a disk.  Of the ranks that need a kernel at the same moment, one compiles it.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

import llvmlite.binding
import numba
from numba import types
from numba.core.caching import FunctionCache

Kernel = Callable[..., Any]


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    digest.update(llvmlite.binding.get_host_cpu_name().encode())
    digest.update(llvmlite.binding.get_host_cpu_features().flatten().encode())
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def flat(element: Any, *, readonly: bool = False) -> types.Array:
    """Return the Numba type of a contiguous 1-d array of `element`."""
    return types.Array(element, 1, "C", readonly=readonly)


def compile_kernel(name: str, function: Callable[..., Any], *arguments: Any) -> Kernel:
    """Compile `function` for exactly the Numba types `arguments`, releasing the interpreter lock.

    `name` must tell this variant from all others.  Other types of arrays are refused with a
    TypeError; numbers are converted.  Where no cache folder can be written, the kernel is compiled
    for this process alone.
    """
    compiler = functools.partial(numba.njit, [arguments], nogil=True, error_model="numpy")
    kernel = _compile(name, function, compiler)
    if any(isinstance(argument, types.Array) for argument in arguments):
        return cast(Kernel, kernel)
    # Numbers need no choice by type: the compiled function alone takes a third of the time.
    _KEPT.append(kernel)
    return cast(Kernel, kernel.overloads[arguments].entry_point)


def compile_callback(name: str, function: Callable[..., Any]) -> int:
    """Compile `function` as a C function int64 f(int64), and return its address.

    `name` must tell this variant from all others.  The code stays loaded as long as the process.
    """
    cfunc: Any = numba.cfunc  # its annotations leave out options that it takes
    compiler = functools.partial(cfunc, types.int64(types.int64), error_model="numpy")
    compiled = _compile(name, function, compiler)
    _KEPT.append(compiled)
    address: int = compiled.address
    return address


_KEPT: list[Any] = []
"""Compiled functions of which only the code was given away."""


def _compile(name: str, function: Callable[..., Any], compiler: Callable[..., Any]) -> Any:
    function.__name__ = f"{name}_{_fingerprint()}"
    function.__qualname__ = function.__name__
    cache_of: Any = FunctionCache  # untyped
    try:
        folder = Path(cache_of(function).cache_path)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        return compiler(cache=False)(function)
    with _turn(folder, function.__name__):
        return compiler(cache=True)(function)


_PATIENCE = 5.0
"""Seconds that a process waits for another one's kernel: more than any takes."""


@contextmanager
def _turn(folder: Path, name: str) -> Iterator[None]:
    """Let one process compile a kernel, while others wait, and then find it in the cache.

    Who has waited in vain, for a process that stands still, compiles it as well.
    """
    if _kept(folder, name):
        yield
        return
    with ExitStack() as stack:
        with suppress(OSError):  # a disk without locks: then everybody compiles
            file = stack.enter_context((folder / "ringfold.lock").open("ab"))
            _lock(file, zlib.crc32(name.encode()))
        if not _kept(folder, _fingerprint()):
            sys.stderr.write(
                f"ringfold: compiling kernels for this machine, once; they are kept in {folder}\n"
            )
        yield


def _kept(folder: Path, name: str) -> bool:
    """Tell whether there is a kernel whose name ends so."""
    return any(folder.glob(f"*{name}-*.nbi"))


def _lock(file: BinaryIO, place: int) -> None:
    """Lock one byte of a file until it is closed, or the process ends, or patience does."""
    end = time.monotonic() + _PATIENCE
    while True:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, place)
        except BlockingIOError:
            if time.monotonic() > end:
                return
            time.sleep(0.02)
        else:
            return
