"""What `ringfold doctor` tells of GPUs, and of memory there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .comm.texts import gather_texts
from .findings import Finding, State, broken, good, note, ways_table

if TYPE_CHECKING:
    from .comm.communicator import Communicator

_NVIDIA = Path("/proc/driver/nvidia/version")


def gpus(library: str, ranks: int) -> list[Finding]:
    """Tell the cards of this machine, and whether the MPI library sends their memory.

    ranks: of this node.
    """
    try:
        import cupy
    except ImportError as error:
        return _without(f"CuPy cannot be imported ({error})", "pip install cupy-cuda13x")
    runtime = cupy.cuda.runtime
    try:
        count = runtime.getDeviceCount()
        driver, toolkit = runtime.driverGetVersion(), runtime.runtimeGetVersion()
    except Exception as error:  # a missing driver library raises what its loader raises
        return _without(f"CuPy {cupy.__version__}: {error}", "check that nvidia-smi works")
    if not count:
        return _without("the driver shows no card", "look at CUDA_VISIBLE_DEVICES")
    cards = [runtime.getDeviceProperties(index)["name"].decode() for index in range(count)]
    versions = f"CuPy {cupy.__version__}, CUDA {_cuda(toolkit)}, driver for CUDA {_cuda(driver)}"
    found = [good("GPU", f"{count}: {', '.join(cards)}; {versions}")]
    found.append(good("peer access", _peers(runtime, count)))
    if ranks > count:
        found.append(_sharing(runtime, ranks, count))
    return [*found, _kernels(count), _aware(library)]


def has_gpu(findings: Sequence[Finding]) -> bool:
    """Tell whether `gpus` has found one."""
    return any(f.name == "GPU" and f.state is State.GOOD for f in findings)


def gpu_memory(
    comm: Communicator, make: Callable[[], Any], mine: Any, wanted: Any
) -> list[Finding]:
    """Try GPU memory alone, then tell its ways between ranks, and check an allreduce; collective.

    make: return an array in GPU memory, with `set` and `get` as CuPy's have them.  mine, wanted:
    this rank's elements on the host, and the sum of all ranks'.
    """
    from .comm.ways import device_ways

    advice = "train with --device cpu, and report it with this screen"
    x, complaint = _alone(make, mine)
    refused = [f"rank {r}: {text}" for r, text in enumerate(gather_texts(comm, complaint)) if text]
    if refused:
        return [broken("GPU memory", "; ".join(refused[:3]), advice)]
    found = [good("GPU messages", ways_table(device_ways(comm, x)))]
    work = comm.allreduce(x, blocking=False)
    work.wait()
    wrong = np.array([np.count_nonzero(x.get() != wanted)])
    wrong_elements = int(comm.allreduce(wrong)[0])
    text = f"{work.receipt.transport} ({work.receipt.reason})"
    if wrong_elements:
        return [*found, broken("GPU allreduce", f"{wrong_elements} elements wrong: {text}", advice)]
    return [*found, good("GPU allreduce", f"right, {text}")]


def _alone(make: Callable[[], Any], mine: Any) -> tuple[Any, str]:
    """Return an array that holds elements, and why it does not."""
    try:
        x = make()
        x.set(mine)
        right = bool((x.get() == mine).all())
    except Exception as error:  # whatever a driver, a runtime or a library of arrays raises
        return None, " ".join(f"{type(error).__name__}: {error}".split())
    return x, "" if right else "what was copied to the GPU did not come back as it was"


def _without(why: str, advice: str) -> list[Finding]:
    """Say that there is no GPU, with advice only where a driver says that there is one."""
    advised = advice if _NVIDIA.exists() else ""
    return [note("GPU", f"none: {why}; everything else works", advised)]


def _cuda(version: int) -> str:
    return f"{version // 1000}.{version % 1000 // 10}"


def _peers(runtime: Any, count: int) -> str:
    pairs = [(a, b) for a in range(count) for b in range(count) if a != b]
    lacking = [f"{a}-{b}" for a, b in pairs if not runtime.deviceCanAccessPeer(a, b)]
    if not pairs:
        return "one card; ranks that share it open each other's memory"
    return f"not between {', '.join(lacking)}" if lacking else f"between all {count} cards"


def _sharing(runtime: Any, ranks: int, count: int) -> Finding:
    from .comm.transport.device import has_mps

    served = [has_mps(runtime, index) for index in range(count)]
    text = f"{ranks} ranks on {count} card{'s' if count > 1 else ''}"
    if all(served):
        return good("GPU sharing", f"{text}, side by side (MPS)")
    if None in served:
        return note("GPU sharing", f"{text}; this driver does not tell whether MPS serves them")
    return note(
        "GPU sharing",
        f"{text} take turns there, each for a time slice, since MPS does not serve them",
        "start nvidia-cuda-mps-control -d before the ranks",
    )


def _kernels(count: int) -> Finding:
    """Compile and run one on each card, as training does at its start."""
    from .kernels.device.usable import why_not

    reasons = [f"cuda:{index}: {why}" for index in range(count) if (why := why_not(index))]
    if not reasons:
        return good("GPU kernels", "compiled and run")
    return note(
        "GPU kernels",
        f"none, so memory is staged and torch's operations pack gradients: {'; '.join(reasons)}",
        "pip install 'numba-cuda[cu13]', of the driver's version of CUDA",
    )


def _aware(library: str) -> Finding:
    from .comm.transport.gpu_aware import sends_gpu_memory

    found = sends_gpu_memory(library)
    if found.aware:
        return good("GPU-aware MPI", f"yes: {found.reason}")
    return note("GPU-aware MPI", f"no: {found.reason}; device memory passes through host memory")
