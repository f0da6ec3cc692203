"""On which device a rank trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

from ..comm.errors import CommError
from ..comm.transport.device import load_cupy, ordinal_of
from .options import Options, UsageError

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["assign", "count_gpus", "gpus_for", "lacking"]


def count_gpus() -> int:
    """Return the GPUs of this node that both CuPy and torch can use.

    Raises: UsageError that says why there is none.
    """
    try:
        cupy = load_cupy()
    except CommError as error:
        raise UsageError(str(error)) from None
    import torch

    if not torch.cuda.is_available():
        raise UsageError(f"no GPU can be used: torch {torch.__version__} is built without CUDA")
    return min(int(cupy.cuda.runtime.getDeviceCount()), torch.cuda.device_count())


def lacking(options: Options) -> str:
    """Return which option cannot be used on GPUs yet; empty where all can."""
    found = [
        # Measured before layers are on the GPU.
        f"--balance {options.balance}" if options.balance != "parameters" else "",
        "--elastic" if options.elastic is not None else "",
        "--membership" if options.membership else "",
    ]
    return ", ".join(filter(None, found))


def gpus_for(options: Options, count: Callable[[], int] = count_gpus) -> int:
    """Return the GPUs of this node that the run can use; 0 to train on the host.

    Raises: UsageError for --device cuda where there is none, or where an option needs the host.
    """
    if options.device == "cpu":
        return 0
    try:
        complaint = lacking(options)
        if complaint:
            raise UsageError(f"{complaint}: works on the host only")
        return count()
    except UsageError as error:
        if options.device == "cuda":
            raise UsageError(f"--device cuda: {error}") from None
        return 0


def assign(comm: Communicator, num_gpus: int) -> tuple[str, str]:
    """Return (this rank's device, what to tell about it): a GPU where every node has one.

    Collective. num_gpus: of this node; its ranks go round them.
    """
    if not int(comm.allreduce(np.array([num_gpus]), "min")[0]):
        return "cpu", ""
    import torch

    device = f"cuda:{ordinal_of(comm.node.rank, num_gpus)}"
    torch.cuda.set_device(device)
    shared = f", {comm.node.size} ranks on {num_gpus}" if comm.node.size > num_gpus else ""
    return device, f"training on GPUs{shared}"
