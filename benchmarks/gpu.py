"""Allreduce of GPU memory: staged and ipc, beside gloo with CUDA tensors, and what copies cost.

    mpirun -n 2 python benchmarks/gpu.py [--sizes 1MiB,16MiB,64MiB] [--peers gloo] [--json FILE]

Ranks go round the GPUs of their node; several on one card is what one card can show. A repetition
ends when the device has the result; `in a row` is an eighth of eight allreduces that are waited for
together, as nccl-tests does it. Every result is checked. `registered` is memory from
comm.empty(device="cuda"), which ranks of a node open; the transport says which way was taken. Rows
named copy are of one rank alone: device to device, and between pinned host memory and the device,
each byte counted once. `limit` is what the memory of one card allows: as many copies as ranks.
`host_us` is what rank 0's calls take until they return, without the wait for the device.
mps: whether NVIDIA's MPS lets ranks on one card run side by side; without it they take turns there.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
from gpu_clock import Clock
from harness import Contender, contest, rates, table, verdict, write_json
from options import parser_of, read
from peers import Buffers, gloo, gloo_run

import ringfold
from ringfold.comm.transport.device import has_mps, load_cupy, ordinal_of
from ringfold.output import status_of

COLUMNS = {
    "impl": "",
    "nbytes": "d",
    "microseconds": ".1f",
    "host_us": ".1f",
    "algbw": ".2f",
    "busbw": ".2f",
    "transport": "",
    "wrong": "d",
}
ON_DEVICE = "copy, on the device"
IN_A_ROW = "ours, registered, in a row"
CALLS = 8
"""Of a row: the sums stay exact in float32 on 4 ranks."""


def copies(cupy: Any, clock: Clock, nbytes: int) -> dict[str, float]:
    """Return the device's seconds for copies of nbytes: within it, to it and from it."""
    runtime = cupy.cuda.runtime
    device, other = cupy.zeros(nbytes, cupy.uint8), cupy.zeros(nbytes, cupy.uint8)
    pinned = cupy.cuda.alloc_pinned_memory(max(nbytes, 1))
    here, there, host = device.data.ptr, other.data.ptr, pinned.ptr
    ways = {
        ON_DEVICE: (there, here, runtime.memcpyDeviceToDevice),
        "copy, to the device": (here, host, runtime.memcpyHostToDevice),
        "copy, to the host": (host, here, runtime.memcpyDeviceToHost),
    }
    return {
        name: clock.seconds(lambda t=to, s=source, k=kind: runtime.memcpyAsync(t, s, nbytes, k, 0))
        for name, (to, source, kind) in ways.items()
    }


def contenders(
    comm: ringfold.Communicator, cupy: Any, count: int, torch: Any, asked: dict[str, list[float]]
) -> list[Contender]:
    """Return ours, and gloo where there is a torch for it; the sum is exact in float32.

    asked: takes, by name, the seconds until a call has returned.
    """
    index = cupy.arange(count, dtype=cupy.float32) % 251
    wanted = index * comm.size + comm.size * (comm.size - 1) // 2
    wait = cupy.cuda.runtime.deviceSynchronize

    def contender(
        impl: str, x: Any, call: Callable[[], Any], transport: str, calls: int = 1
    ) -> Contender:
        total = wanted * comm.size ** (calls - 1)

        def prepare() -> None:
            x[...] = index
            x[...] += comm.rank
            wait()

        def run() -> None:
            start = time.perf_counter()
            for _ in range(calls):
                call()
            asked.setdefault(impl, []).append((time.perf_counter() - start) / calls)
            wait()

        return Contender(
            impl, run, prepare, wrong=lambda _: int((x != total).sum()), transport=transport
        )

    found = []
    private = cupy.empty(count, cupy.float32)
    registered = comm.empty(count, np.float32, device="cuda")
    for impl, x in (("ours", private), ("ours, registered", registered)):
        work = comm.allreduce(x, blocking=False)
        work.wait()
        step = comm.plan("allreduce", x)
        found.append(contender(impl, x, step, work.receipt.transport))
    found.append(contender(IN_A_ROW, x, step, work.receipt.transport, CALLS))
    if torch is not None:
        call = gloo_run(comm, "allreduce", Buffers(torch.from_dlpack(private), None), "sum")
        found.append(contender("gloo", private, call, "host"))
    return found


def torch_for_gloo() -> Any:
    """Return torch, or None, with a word of it, where it is built without CUDA."""
    import torch

    if torch.cuda.is_available():
        return torch
    print("benchmarks/gpu.py: torch is built without CUDA; gloo is not measured", file=sys.stderr)
    return None


def main() -> int:
    parser = parser_of(__doc__, sizes="64KiB,1MiB,16MiB,64MiB", peers=True)
    options = read(parser)
    try:
        cupy = load_cupy()
    except ringfold.CommError as error:
        print(f"benchmarks/gpu.py: {error}; nothing was measured", file=sys.stderr)
        return 77
    torch = torch_for_gloo() if "gloo" in options.peers else None
    rows: list[dict[str, Any]] = []
    with ringfold.Communicator() as comm:
        ordinal = ordinal_of(comm.node.rank, cupy.cuda.runtime.getDeviceCount())
        card = cupy.cuda.runtime.getDeviceProperties(ordinal)["name"].decode()
        about = {"card": card, "mps": bool(has_mps(cupy.cuda.runtime, ordinal))}
        with cupy.cuda.Device(ordinal), nullcontext() if torch is None else gloo(comm):
            # Of one rank, while the others leave the card to it.
            clock = Clock(cupy) if comm.rank == 0 else None
            for nbytes in options.sizes:
                if clock is not None:
                    copied = copies(cupy, clock, nbytes)
                    if comm.size > 1 and cupy.cuda.runtime.getDeviceCount() == 1:
                        # Every rank's bytes are read once and written once, on the one card.
                        copied["limit"] = comm.size * copied[ON_DEVICE]
                    for name, seconds in copied.items():
                        rows.append(about | row(comm, name, nbytes, seconds, "-", 0))
                comm.barrier()
                asked: dict[str, list[float]] = {}
                found = contenders(comm, cupy, nbytes // 4, torch, asked)
                outcomes = contest(comm, found, repeats=options.repeats, budget=options.budget)
                for outcome in outcomes:
                    one = outcome.contender
                    seconds = outcome.timing.median / (CALLS if one.impl == IN_A_ROW else 1)
                    found_row = row(comm, one.impl, nbytes, seconds, one.transport, outcome.wrong)
                    found_row["host_us"] = float(np.median(asked[one.impl])) * 1e6
                    rows.append(about | found_row)
                if comm.rank == 0 and options.json:  # whatever becomes of the next size
                    write_json(options.json, "gpu", rows)
        if comm.rank == 0:
            mps = ", under MPS" if about["mps"] else ""
            print(f"{card}, {comm.size} ranks{mps} (measured)")
            print(table(rows, COLUMNS))
        return verdict(rows, speak=comm.rank == 0)


def row(
    comm: ringfold.Communicator,
    impl: str,
    nbytes: int,
    seconds: float,
    transport: str,
    wrong: int,
) -> dict[str, Any]:
    """Return one line of the table; a copy's algbw is its rate."""
    algbw, busbw = rates("allreduce", nbytes, comm.size, seconds)
    copy = impl.startswith("copy")
    return {
        "ranks": 1 if copy else comm.size,
        "impl": impl,
        "nbytes": nbytes,
        "microseconds": seconds * 1e6,
        "host_us": 0.0,
        "algbw": algbw,
        "busbw": algbw if copy else busbw,
        "transport": transport,
        "wrong": wrong,
    }


if __name__ == "__main__":
    raise SystemExit(status_of("gpu.py", main))
