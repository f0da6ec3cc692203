"""Move elements between tensors and a bucket, or between two spans, and learn of them on the way.

One launch moves a whole bucket: blocks take tiles in turn, and within a tile threads take vectors
(`move`). Squares are added in an order that depends on the grid alone, so equal launches give equal
norms. What uses `cuda` is in the kernels' own module, since the simulator gives it to that alone.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
from numba import cuda, types

from ..storage import FLOATS, HALVES, change_by, check_divisor, storage
from ..table import check_dtypes
from .launch import Launcher, compile_kernel
from .move import moved_at_once, mover
from .primitives import Function, element, primitives
from .table import ROW_WORDS, ByProducts, Span, Tiles


@functools.cache
def _settler(threads: int) -> Function:
    """Return the device function by which all blocks of a grid agree on what they learned.

    Every block leaves its sum; the last to take a ticket adds all of them, by block. All threads of
    a block must call it, since it waits for them.
    """
    p = primitives()
    load_fresh, store, atomic_add = p.load_fresh, p.store, p.atomic_add

    def sum_of_block(square: Any, broken: Any) -> Any:
        squares = cuda.shared.array(threads, types.float64)
        breaks = cuda.shared.array(threads, types.int64)
        me = cuda.threadIdx.x
        squares[me] = square
        breaks[me] = broken
        cuda.syncthreads()
        width = threads // 2
        while width > 0:
            if me < width:
                squares[me] += squares[me + width]
                breaks[me] |= breaks[me + width]
            cuda.syncthreads()
            width //= 2
        whole, any_broken = squares[0], breaks[0]
        cuda.syncthreads()
        return whole, any_broken

    sum_of_block = p.compiled(sum_of_block)

    def settle(square: Any, broken: Any, learned: Any) -> Any:
        ticket = cuda.shared.array(1, types.int64)
        me = cuda.threadIdx.x
        whole, any_broken = sum_of_block(square, broken)
        if me == 0:
            mine = learned + 32 + cuda.blockIdx.x * 16
            store(mine, np.float64(whole))
            store(mine + 8, np.float64(any_broken))
            cuda.threadfence()
            ticket[0] = atomic_add(learned + 16, np.int64(1))
        cuda.syncthreads()
        if ticket[0] == cuda.gridDim.x - 1:
            # The same branch for all threads of the block: its barriers are reached by all.
            cuda.threadfence()
            square, broken = 0.0, 0
            block = me
            while block < cuda.gridDim.x:
                square += load_fresh(learned + 32 + block * 16, np.float64)
                broken |= int(load_fresh(learned + 40 + block * 16, np.float64))
                block += threads
            whole, any_broken = sum_of_block(square, broken)
            if me == 0:
                store(learned, np.float64(whole))
                store(learned + 8, np.float64(1.0 if any_broken == 0 else 0.0))
                store(learned + 16, np.int64(0))

    return p.compiled(settle)


@functools.cache
def _ender(measure: bool, threads: int) -> Function:
    """Return the device function (square, broken, by-products) -> None at the end of a kernel.

    measure: whether by-products are wanted; without, nothing of that is compiled in.
    """
    if measure:
        return _settler(threads)

    def nothing(_square: Any, _broken: Any, _learned: Any) -> Any:
        return None

    return primitives().compiled(nothing)


def _real(first: str, second: str) -> Any:
    return np.float64 if "float64" in (first, second) else np.float32


@functools.cache
def transfer_kernel(
    tensor_dtype: str, bucket_dtype: str, way: str, change: str, threads: int, measure: bool
) -> Any:
    """Return the kernel (rows, tiles, bucket, factor, by-products) that moves tiles.

    way: "pack" or "unpack".  change: "multiply" or "divide" by the factor, or "add".
    """
    into = way == "pack"
    tensor, bucket_kind = element(tensor_dtype), element(bucket_dtype)
    kinds = (tensor, bucket_kind) if into else (bucket_kind, tensor)
    move = mover(*kinds, _real(tensor_dtype, bucket_dtype), change)
    end, load = _ender(measure, threads), primitives().load
    size, row_bytes = bucket_kind.size, 8 * ROW_WORDS

    def transfer(rows: Any, num_tiles: Any, bucket: Any, factor: Any, learned: Any) -> None:
        square, broken = 0.0, 0
        tile = np.int64(cuda.blockIdx.x)
        while tile < num_tiles:
            row = rows + tile * row_bytes
            tensor_at = load(row, np.int64)
            bucket_at = bucket + load(row + 8, np.int64) * size
            count = load(row + 16, np.int64)
            source, target = (tensor_at, bucket_at) if into else (bucket_at, tensor_at)
            thread = np.int64(cuda.threadIdx.x)
            more, wrong = move(
                source,
                target,
                count,
                thread,
                np.int64(threads),
                np.int64(0),
                np.int64(1),
                factor,
            )
            square += more
            broken |= wrong
            tile += cuda.gridDim.x
        end(square, broken, learned)

    name = f"{way}_{change}_{tensor_dtype}_{bucket_dtype}_{threads}"
    return compile_kernel(f"{name}_measured" if measure else name, transfer)


@functools.cache
def span_kernel(
    source_dtype: str, target_dtype: str, change: str, threads: int, measure: bool
) -> Any:
    """Return the kernel (source, target, count, factor, by-products) that moves one span."""
    real = _real(source_dtype, target_dtype)
    move = mover(element(source_dtype), element(target_dtype), real, change)
    end = _ender(measure, threads)

    def span(source: Any, target: Any, count: Any, factor: Any, learned: Any) -> None:
        thread, block = np.int64(cuda.threadIdx.x), np.int64(cuda.blockIdx.x)
        blocks = np.int64(cuda.gridDim.x)
        square, broken = move(
            source, target, count, thread, np.int64(threads), block, blocks, factor
        )
        end(square, broken, learned)

    name = f"cast_{change}_{source_dtype}_{target_dtype}_{threads}"
    return compile_kernel(f"{name}_measured" if measure else name, span)


def _run(
    tiles: Tiles,
    bucket: Span,
    launcher: Launcher,
    way: str,
    change: tuple[str, float],
    learned: ByProducts | None,
) -> bool:
    tiles.check_bucket(bucket)
    operation, factor = change
    dtypes = tiles.tensor_dtype, tiles.bucket_dtype
    real = _real(*dtypes)
    kernel = transfer_kernel(*dtypes, way, operation, launcher.threads, learned is not None)
    return _launch(
        launcher,
        learned,
        kernel,
        tiles.num_tiles,
        np.int64(tiles.rows.span.address),
        np.int64(tiles.num_tiles),
        np.int64(bucket.address),
        real(factor),
    )


def _launch(
    launcher: Launcher, learned: ByProducts | None, kernel: Any, wanted: int, *arguments: Any
) -> bool:
    if learned is not None and launcher.max_blocks > learned.max_blocks:
        raise ValueError(
            f"by-products of {learned.max_blocks} blocks for a grid of {launcher.max_blocks}"
        )
    address = 0 if learned is None else learned.memory.span.address
    launched = launcher.launch(kernel, wanted, *arguments, np.int64(address))
    if learned is not None and not launched:
        learned.clear(launcher)
    return launched


def pack(
    tiles: Tiles,
    bucket: Span,
    launcher: Launcher,
    *,
    scale: float = 1.0,
    learned: ByProducts | None = None,
) -> bool:
    """Write every tensor of the table, times `scale`, to its place in the bucket: `pack.pack`.

    `learned` takes finite and square norm. Ordered on the launcher's stream; returns at once, and
    whether there was anything to launch. Tensors and bucket must not share memory.

    Raises: ValueError for a bucket too small, before anything is launched.
    """
    return _run(tiles, bucket, launcher, "pack", ("multiply", scale), learned)


def unpack(
    tiles: Tiles,
    bucket: Span,
    launcher: Launcher,
    *,
    divisor: float = 1.0,
    learned: ByProducts | None = None,
) -> bool:
    """Write every tensor of the table from its place in the bucket, over `divisor`: `pack.unpack`.

    As `pack`. Raises: ValueError also for a divisor of zero.
    """
    check_divisor(divisor)
    return _run(tiles, bucket, launcher, "unpack", change_by(divisor), learned)


def pack_add(
    tiles: Tiles, bucket: Span, launcher: Launcher, *, learned: ByProducts | None = None
) -> bool:
    """Add every tensor of the table to its place in the bucket.

    PowerSGD's packing: a bucket of the errors of the step before becomes the matrices to compress
    (Vogels et al. 2019, Algorithm 2, line 5). As `pack`.
    """
    return _run(tiles, bucket, launcher, "pack", ("add", 1.0), learned)


def cast(
    source: Span,
    source_dtype: str,
    target: Span,
    target_dtype: str,
    launcher: Launcher,
    *,
    divisor: float = 1.0,
    learned: ByProducts | None = None,
) -> bool:
    """Write a span over `divisor` into another of the same number of elements.

    `cast.widen` and `cast.narrow` in one, and `reduce.divide` where both are the same span; spans
    must not overlap otherwise. With `learned`, and source as target, also the norm of a buffer.
    """
    check_divisor(divisor)
    for dtype in (source_dtype, target_dtype):
        storage(dtype, (*FLOATS, *HALVES))
    check_dtypes(*_pair(source_dtype, target_dtype))
    source.check(source_dtype, "source")
    target.check(target_dtype, "target")
    if source.count != target.count:
        raise ValueError(
            f"source has {source.count} elements and target has {target.count}; "
            "expected equal sizes"
        )
    change, factor = change_by(divisor)
    measure = learned is not None
    kernel = span_kernel(source_dtype, target_dtype, change, launcher.threads, measure)
    at_once = moved_at_once(element(source_dtype), element(target_dtype), change)
    return _launch(
        launcher,
        learned,
        kernel,
        -(-source.count // (at_once * launcher.threads)),
        np.int64(source.address),
        np.int64(target.address),
        np.int64(source.count),
        _real(source_dtype, target_dtype)(factor),
    )


def _pair(first: str, second: str) -> tuple[str, str]:
    wide = max(first, second, key=lambda dtype: storage(dtype).itemsize)
    return wide, second if wide == first else first
