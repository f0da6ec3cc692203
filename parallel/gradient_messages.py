"""Carry the gradients of what a stage was handed back to the stage before.

A tensor that the next stage does not use has no gradient, which is not a gradient of zeros: weights
that have none keep their values under weight decay. So a word of a byte for each tensor goes with
the payload: as a part of it where that is copied anyhow, or small; beside it elsewhere, and always
on GPUs, since the host must know it before it begins a backward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from .messages import Edge, Outbox, Received, flatten, payload_bytes, start_receive
from .structure import Description, TensorSpec

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["Returning", "await_gradients", "send_gradients"]


_SMALL = 1 << 18
"""Bytes that are copied sooner than another message is sent."""


@dataclass(frozen=True)
class Returning:
    """Gradients on their way back, and which of them there are.

    word: a byte for each tensor, the last of what is received; or a message of its own, `work`.
    """

    received: Received
    word: NDArray[np.uint8]
    work: Work | None

    def wait(self) -> list[Tensor | None]:
        """Return one for each tensor, None where the next stage has not used it."""
        if self.work is not None:
            self.work.wait()
        pairs = zip(self.received.wait(), self.word.tolist(), strict=True)
        return [gradient if used else None for gradient, used in pairs]


def await_gradients(
    channel: Communicator,
    specs: tuple[TensorSpec, ...],
    src: int,
    edge: Edge,
    microbatch: int,
    device: torch.device,
) -> Returning:
    """Begin to receive the gradients of tensors like these over an edge."""
    tag, count = edge.payload_tag(microbatch, backward=True), len(specs)
    within = _goes_within(specs, device)
    behind = count if within else 0
    received = start_receive(channel, Description((), specs), src, tag, device, behind)
    if within:
        return Returning(received, received.flat.numpy()[-count:], None)
    word = np.empty(count, dtype=np.uint8)
    work = channel.irecv(word, src, edge.word_tag(microbatch)) if specs else None
    return Returning(received, word, work)


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
    word = np.array([gradient is not None for gradient in gradients], dtype=np.uint8)
    if _goes_within(specs, device):
        flat = flatten(whole, device, len(word))
        flat.numpy()[-len(word) :] = word
    else:
        outbox.post(word, dst, edge.word_tag(microbatch))
        flat = flatten(whole, device)
    if flat.numel():
        outbox.post(flat, dst, edge.payload_tag(microbatch, backward=True))


def _goes_within(specs: Sequence[TensorSpec], device: torch.device) -> bool:
    """Tell whether the word is a part of the payload, on both sides alike."""
    copied = len(specs) > 1 or (len(specs) == 1 and payload_bytes(specs) <= _SMALL)
    return copied and device.type == "cpu"
