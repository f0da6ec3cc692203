"""Launch a kernel on a stream, with a grid that fits the device."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from .primitives import simulating

BLOCKS_PER_MULTIPROCESSOR = 8
THREADS = 256
"""Of a block, at most."""

BLOCKS = 4
"""Blocks that a multiprocessor has registers for at the same time.

With this, and THREADS, for bounds the assembler leaves the loads of a thread together. Without, it
makes code for blocks of 1024 threads, and to save registers it puts loads behind what is done with
the ones before. On an H200, 4 blocks are enough for all tiles of 16 MiB at once.
"""


@dataclass(frozen=True)
class Launcher:
    """Where kernels run: a device, a stream, and how large a grid may be.

    device: its ordinal. stream: a CUDA stream handle; 1 is the legacy default stream.
    blocks: at most so many; None for BLOCKS_PER_MULTIPROCESSOR times the device's multiprocessors.
    threads: of a block, a power of two up to THREADS.
    """

    device: int = 0
    stream: int = 1
    blocks: int | None = None
    threads: int = THREADS

    def __post_init__(self) -> None:
        if self.threads < 1 or self.threads > THREADS or self.threads & (self.threads - 1):
            raise ValueError(
                f"threads of a block: expected a power of two up to {THREADS}, got {self.threads}"
            )
        if self.blocks is not None and self.blocks < 1:
            raise ValueError(f"blocks: expected at least 1, got {self.blocks}")

    def grid(self, wanted: int) -> int:
        """Return the number of blocks for `wanted` of them: all, or as many as the limit says."""
        return min(wanted, self.max_blocks)

    @property
    def max_blocks(self) -> int:
        """Return the largest grid."""
        if self.blocks is not None:
            return self.blocks
        return BLOCKS_PER_MULTIPROCESSOR * multiprocessors(self.device)

    @property
    def external(self) -> Any:
        """Return the stream as Numba takes it."""
        return _external(self.device, self.stream)

    def launch(self, kernel: Any, wanted: int, *arguments: Any) -> bool:
        """Put a kernel on the stream over `wanted` blocks, and tell whether there was any.

        Zero blocks are nothing to launch: CUDA refuses an empty grid. Returns without waiting.

        Raises: RuntimeError, which names the kernel, where it cannot be compiled or launched.
        """
        return self.prepared(kernel, wanted, *arguments)()

    def prepared(
        self, kernel: Any, wanted: int, *arguments: Any, keeps: object = None
    ) -> Callable[[], bool]:
        """Return what launches a kernel so, each time that it is called.

        keeps: what must live as long, such as the memory that arguments are addresses of.
        """
        if wanted < 0:
            raise ValueError(f"{kernel.__name__}: expected 0 blocks or more, got {wanted}")
        if wanted == 0:
            return lambda: False
        from numba import cuda

        grid, device = self.grid(wanted), cuda.gpus[self.device]
        configured: Any = None

        def launch(_keeps: object = keeps) -> bool:
            nonlocal configured
            try:
                with device:
                    if configured is None:
                        configured = kernel[grid, self.threads, self.external]
                    configured(*arguments)
            except Exception as error:
                if simulating():
                    raise
                raise RuntimeError(
                    f"kernel {kernel.__name__} on cuda:{self.device}, {grid} blocks of "
                    f"{self.threads} threads, stream {self.stream:#x}: {error}"
                ) from error
            return True

        return launch


@functools.cache
def _external(device: int, handle: int) -> Any:
    """Return a stream as Numba takes it: the same each time, for which launches are prepared once.

    The simulator has none.
    """
    if simulating():
        return 0
    from numba import cuda

    with cuda.gpus[device]:
        return cuda.external_stream(handle)


@functools.cache
def multiprocessors(device: int) -> int:
    """Return the number of a device's multiprocessors; 1 in the simulator."""
    if simulating():
        return 1
    from numba import cuda

    return int(cuda.gpus[device].MULTIPROCESSOR_COUNT)


def compile_kernel(name: str, function: Callable[..., Any], blocks: int = BLOCKS) -> Any:
    """Return a CUDA kernel under a name that tells its variant; compiled at its first launch.

    blocks: fewer than BLOCKS where it needs more registers.
    """
    from numba import cuda

    # A small bucket makes a small grid. Not by catch_warnings around a launch: launches come from
    # several threads, and it would restore what another has set.
    warnings.filterwarnings("ignore", message="Grid size .* low occupancy")
    function.__name__ = function.__qualname__ = name
    if simulating():
        kernel = cuda.jit(function)
        kernel.__name__ = name
        return kernel
    # Without optimization at link time, so that the machine code is what the tests have looked at.
    # As a decorator, cuda.jit(...)(function), it would not pass `lto` on (numba-cuda 0.30).
    return cuda.jit(function, launch_bounds=(THREADS, blocks), lto=False)
