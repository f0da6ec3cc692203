"""Ranks that are threads of one process cannot reduce gradients of one GPU beside backward.

Autograd computes with one thread for each GPU of a process, whoever calls backward, and runs hooks
and what is queued for backward's end in it. A rank that waits there for another one's gradients
keeps that one from computing them.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

from ..comm.texts import gather_texts, shown_ranks

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["check_gpu_threads"]


def check_gpu_threads(comm: Communicator, tensors: Iterable[Tensor]) -> None:
    """Refuse tensors of one GPU on several ranks of `run_local`; collective over these.

    Raises: ValueError on every rank.
    """
    if comm.size == 1 or comm.transport != "local":
        return
    mine = sorted({str(tensor.device) for tensor in tensors if tensor.is_cuda})
    ranks_of: dict[str, list[int]] = {}
    for rank, text in enumerate(gather_texts(comm, " ".join(mine))):
        for device in text.split():
            ranks_of.setdefault(device, []).append(rank)
    for device, ranks in ranks_of.items():
        if len(ranks) > 1:
            raise ValueError(
                f"{shown_ranks(ranks)} are threads of one process and train on "
                f"{device}, where backward of one would wait for that of another: expected one "
                "process for each rank, as mpirun starts them, or a GPU for each"
            )
