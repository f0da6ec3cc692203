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
from traceback import walk_tb
from typing import Any, BinaryIO, cast

import llvmlite.binding
import numba
from numba import types
from numba.core import caching

from .handlers import of_a_signal
from .say import say

Kernel = Callable[..., Any]


@functools.cache
def _fingerprint() -> str:
    digest = hashlib.sha256(numba.__version__.encode())
    # Numba has an index for each Python, all in one folder where several share a checkout.
    digest.update(f"{sys.implementation.cache_tag}{sys.abiflags}".encode())
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

    Raises: RuntimeError where Numba's compiler is switched off.
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
    config: Any = numba.config  # its attributes come from the environment
    if config.DISABLE_JIT:
        raise RuntimeError(
            "kernels need Numba's compiler, which NUMBA_DISABLE_JIT=1 switches off: unset it"
        )
    function.__name__ = f"{name}_{_fingerprint()}"
    function.__qualname__ = function.__name__
    cache_of: Any = caching.FunctionCache  # untyped
    try:
        folder = Path(cache_of(function).cache_path)
    except RuntimeError as error:
        if "cannot cache function" not in str(error):
            raise
        _not_kept("no folder to keep them in can be written")
        return compiler(cache=False)(function)
    with _turn(folder, function.__name__):
        try:
            return compiler(cache=True)(function)
        except Exception as error:
            if of_a_signal(error) or not _of_the_cache(error):
                raise
            _not_kept(
                f"{folder} does not keep them ({type(error).__name__}: {error}); make room there, "
                "or remove it where it is damaged"
            )
            return compiler(cache=False)(function)


def _of_the_cache(error: Exception) -> bool:
    """Tell whether Numba's cache has failed, for which it raises what the disk and pickle raise.

    A disk may be full; a file of it may be damaged, or another user's.
    """
    files = (frame.f_code.co_filename for frame, _ in walk_tb(error.__traceback__))
    return caching.__file__ in files


def _not_kept(why: str) -> None:
    """Say, once, why every start takes so long."""
    if not _NOT_KEPT:
        _NOT_KEPT.append(why)
        say(
            f"kernels are compiled anew by every start: {why}; NUMBA_CACHE_DIR names another folder"
        )


_NOT_KEPT: list[str] = []

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
            say(f"compiling kernels for this machine, once; they are kept in {folder}")
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
