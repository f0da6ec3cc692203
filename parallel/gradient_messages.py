"""Carry the gradients of what a stage was handed back to the stage before.

A tensor that the next stage does not use has no gradient, which is not a gradient of zeros: weights
that have none keep their values under weight decay. So a word of a byte for each tensor goes beside
the payload; by the host, which must know it before it begins a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .messages import Edge, Outbox, Received, flatten, start_receive
from .structure import Description, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["Returning", "await_gradients", "send_gradients"]


@dataclass(frozen=True)
class Returning:
    """Gradients on their way back, and which of them there are."""

    received: Received
    there: NDArray[np.uint8]
    work: Work | None

    def wait(self) -> list[Tensor | None]:
        """Return one for each tensor, None where the next stage has not used it."""
        if self.work is not None:
            self.work.wait()
        pairs = zip(self.received.wait(), self.there.tolist(), strict=True)
        return [gradient if there else None for gradient, there in pairs]


def await_gradients(
    channel: Communicator,
    specs: tuple[TensorSpec, ...],
    src: int,
    edge: Edge,
    microbatch: int,
    device: torch.device,
) -> Returning:
    """Begin to receive the gradients of tensors like these over an edge."""
    tag = edge.payload_tag(microbatch, backward=True)
    received = start_receive(channel, Description((), specs), src, tag, device)
    there = np.empty(len(specs), dtype=np.uint8)
    work = channel.irecv(there, src, edge.word_tag(microbatch)) if specs else None
    return Returning(received, there, work)


def send_gradients(
    outbox: Outbox,
    gradients: Sequence[Tensor | None],
    specs: Sequence[TensorSpec],
    dst: int,
    edge: Edge,
    microbatch: int,
    device: torch.device,
) -> None:
    """Send what `await_gradients` awaits; where there is none, zeros take its place."""
    if not specs:
        return
    pairs = zip(gradients, specs, strict=True)
    whole = [
        torch.zeros(s.shape, dtype=s.torch_dtype, device=device) if g is None else g
        for g, s in pairs
    ]
    flat = flatten(whole, device)
    there = np.array([gradient is not None for gradient in gradients], dtype=np.uint8)
    outbox.post(there, dst, edge.word_tag(microbatch))
    if flat.numel():
        outbox.post(flat, dst, edge.payload_tag(microbatch, backward=True))
