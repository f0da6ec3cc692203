"""Every kernel for GPU memory beside a copy within the device of the same bytes.

    python benchmarks/gpu_kernels.py [--sizes 1MiB,16MiB,64MiB] [--json FILE]

sizes: of the float32 side. A kernel's bytes are those that it has to read and write, and a copy of
as many reads half of them and writes half; `share` is the kernel's rate over the copy's. Times are
the device's own, of launches one behind the other (`gpu_clock`): what is smaller than the card's
L2 cache (60 MB on an H200), kernel and copy alike, hardly leaves it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from gpu_clock import Clock
from harness import table, write_json
from options import add_sizes, plain_parser, read_alone

import ringfold
from ringfold.comm.transport.device import load_cupy
from ringfold.output import status_of

COLUMNS = {"kernel": "", "nbytes": "d", "microseconds": ".1f", "GB/s": ".1f", "share": ".2f"}
TENSORS = 20


@dataclass(frozen=True)
class Case:
    """One kernel, ready to be launched: nbytes are read and written by a launch."""

    name: str
    nbytes: int
    launch: Callable[[], Any]


def cases(count: int, launcher: Any) -> Iterator[Case]:
    """Yield the kernels over count float32 elements, in memory of Numba's own."""
    from ringfold.kernels.device import combine, fold, masks, pack, table, threshold
    from ringfold.kernels.table import PointerTable

    def room(dtype: str) -> Any:
        return table.place(np.ones(count, dtype), launcher)

    wide, other, half = room("float32"), room("float32"), room("uint16")
    held = (wide, other, half)  # as long as what is yielded may run
    # Lengths and places of gradients that are aligned to the vectors.
    bounds = np.linspace(0, count // 16, TENSORS + 1).astype(np.int64) * 16
    pointers = PointerTable(
        addresses=wide.span.address + 4 * bounds[:-1],
        counts=np.diff(bounds),
        offsets=bounds[:-1],
        itemsize=4,
        owners=held,
    )
    moved = int(bounds[-1])
    for dtype, bucket, size in (("float32", other, 4), ("bfloat16", half, 2)):
        tiles = table.Tiles.of(pointers, "float32", dtype, launcher)
        learned = table.ByProducts.of(launcher)
        span, nbytes = bucket.span, moved * (4 + size)
        yield Case(f"pack {dtype}", nbytes, lambda t=tiles, s=span: pack.pack(t, s, launcher))
        yield Case(
            f"pack {dtype}, measured",
            nbytes,
            lambda t=tiles, s=span, m=learned: pack.pack(t, s, launcher, scale=0.5, learned=m),
        )
        yield Case(f"unpack {dtype}", nbytes, lambda t=tiles, s=span: pack.unpack(t, s, launcher))
    into, out = (wide.span, "float32"), (half.span, "bfloat16")
    for source, target in ((into, out), (out, into)):
        yield Case(
            f"cast {source[1]} to {target[1]}",
            count * 6,
            lambda a=source, b=target: pack.cast(*a, *b, launcher),
        )
    for dtype, span, size in (("float32", wide.span, 4), ("bfloat16", half.span, 2)):
        twin = other.span if size == 4 else table.Span(other.span.address, count)
        yield Case(
            f"combine {dtype}",
            count * size * 3,
            lambda d=dtype, a=span, b=twin: combine.combine("max", d, a, b, launcher),
        )
        peers = fold.Peers.of((span.address, twin.address), launcher)
        yield Case(
            f"fold of 2, {dtype}",
            count * size * 4,
            lambda d=dtype, p=peers: fold.fold("max", d, p, p, count, launcher),
        )
    flags = table.Span(other.span.address, count)
    yield Case("mask", count, lambda: masks.mask(flags, 1, 3, (1, 2), 1 << 30, launcher))
    selection = threshold.Selection.of(launcher)
    wanted = max(1, count // 100)
    # As gradients are: equal ones would all be counted in one place.
    values = np.random.default_rng(5).standard_normal(count, np.float32)
    gradients = table.place(values, launcher)
    yield Case(
        "top-k threshold",
        count * 4 * 3,
        lambda: threshold.threshold(gradients.span, "float32", wanted, selection, launcher),
    )
    import torch

    if torch.cuda.is_available():
        # What `TopK` calls, which also gathers what is above the threshold.
        x = torch.from_numpy(values).cuda()
        yield Case("torch's topk", count * 4 * 3, lambda: x.abs().topk(wanted, sorted=False))


def measure(
    count: int,
    launcher: Any,
    copy: Callable[[int], Callable[[], Any]],
    seconds: Callable[[Callable[[], Any]], float],
) -> list[dict[str, Any]]:
    """Time every kernel, and the copy that moves as many bytes.

    copy: return what copies so many bytes within the device.  seconds: time what launches.
    """
    rows = []
    for case in cases(count, launcher):
        took, copied = seconds(case.launch), seconds(copy(case.nbytes // 2))
        rows.append(
            {
                "kernel": case.name,
                "nbytes": case.nbytes,
                "microseconds": took * 1e6,
                "GB/s": case.nbytes / took / 1e9,
                "share": copied / took,
            }
        )
    return rows


def main() -> int:
    parser = plain_parser(__doc__)
    add_sizes(parser, "--sizes", "1MiB,16MiB,64MiB,256MiB", "bytes of the float32 side")
    options = read_alone(parser)
    try:
        cupy = load_cupy()
    except ringfold.CommError as error:
        print(f"benchmarks/gpu_kernels.py: {error}; nothing was measured", file=sys.stderr)
        return 77
    from ringfold.kernels.device.launch import Launcher

    def copy(nbytes: int) -> Callable[[], Any]:
        source, target = cupy.zeros(nbytes, cupy.uint8), cupy.zeros(nbytes, cupy.uint8)
        return lambda: cupy.copyto(target, source)

    card = cupy.cuda.runtime.getDeviceProperties(0)["name"].decode()
    clock, rows = Clock(cupy), []
    for nbytes in options.sizes:
        found = measure(max(nbytes // 4, 16), Launcher(), copy, clock.seconds)
        rows += [{"card": card, "size": nbytes, **row} for row in found]
        if options.json:  # whatever becomes of the next size
            write_json(options.json, "gpu-kernels", rows)
    print(f"{card} (measured)")
    print(table(rows, COLUMNS))
    return 0


if __name__ == "__main__":
    raise SystemExit(status_of("gpu_kernels.py", main))
