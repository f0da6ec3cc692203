"""What one GPU computes in its own memory: the kernels of `kernels.device`, by address."""

from __future__ import annotations

from typing import Any

from ..device import Stream


class CudaArithmetic:
    """The kernels as the device protocol has them."""

    def __init__(self, cupy: Any, ordinal: int) -> None:
        self._cupy, self._ordinal = cupy, ordinal

    def copy(self, target: int, source: int, nbytes: int, stream: Stream) -> None:
        """Copy within the device."""
        runtime = self._cupy.cuda.runtime
        if nbytes:
            with self._cupy.cuda.Device(self._ordinal):
                runtime.memcpyAsync(target, source, nbytes, runtime.memcpyDeviceToDevice, stream)

    def combine(
        self, op: str, dtype: str, target: int, incoming: int, count: int, stream: Stream
    ) -> None:
        """Let target = target op incoming."""
        from ...kernels.device.combine import combine
        from ...kernels.device.launch import Launcher
        from ...kernels.device.table import Span

        launcher = Launcher(self._ordinal, int(stream))
        combine(op, dtype, Span(target, count), Span(incoming, count), launcher)

    def convert(
        self,
        source: int,
        source_dtype: str,
        target: int,
        target_dtype: str,
        count: int,
        divisor: float,
        stream: Stream,
    ) -> None:
        """Let target = source / divisor."""
        from ...kernels.device.launch import Launcher
        from ...kernels.device.pack import cast
        from ...kernels.device.table import Span

        launcher = Launcher(self._ordinal, int(stream))
        spans = Span(source, count), Span(target, count)
        cast(spans[0], source_dtype, spans[1], target_dtype, launcher, divisor=divisor)
