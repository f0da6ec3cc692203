"""Find out what CUDA and the MPI library offer to a communicator."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

from ..device_operations import DeviceOperations
from ..device_ways import DeviceWays
from ..errors import CommError
from ..settings import beside_the_job, cache_folder
from .cuda_probe import Verdict, gpu_aware
from .device import device_of, load_cupy

if TYPE_CHECKING:
    from ..communicator import Communicator


def key_of(library: str) -> str:
    """Return what an answer of the probe holds for: MPI library, CUDA driver, CuPy.

    Raises: CommError without a GPU.
    """
    cupy = load_cupy()
    return f"{library} | {cupy.cuda.runtime.driverGetVersion()} | {cupy.__version__}"


def sends_gpu_memory(library: str) -> Verdict:
    """Tell whether an MPI library sends device memory; the first time, a child process tries."""
    try:
        key = key_of(library)
    except CommError as error:
        return Verdict(False, str(error))
    folder = cache_folder()
    return gpu_aware(beside_the_job(), folder and folder / "gpu-aware.json", key)


def cuda_ways(comm: Communicator) -> DeviceWays:
    """Return what prepares a communicator's operations on CUDA memory."""
    staged = DeviceOperations(comm, device_of)
    return DeviceWays(comm, device_of, staged, partial(sends_gpu_memory, comm.library))
