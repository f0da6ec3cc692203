"""Carry nested values between neighbouring stages, as one message of bytes each.

The tensors of a value travel as one flat payload. A short header goes ahead of it, on a stream of
its own, and with it the value's description if the receiver does not know that yet: shapes may
change from one micro-batch to the next. Gradients need no header (`gradient_messages`), since their
receiver has sent the tensors that they belong to.

Payloads are tagged by (micro-batch, edge, direction); a buffer lives until its request is done.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from .structure import Description, TensorSpec, put_together, take_apart
from .tensors import flat_bytes

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["Edge", "Inbox", "Outbox", "Received", "broadcast_value"]

# Beyond any alignment that an element needs.
_ALIGN = 64
# Of descriptions that both ends of an edge remember.
_MEMORY = 64
_HEADER = 3
# Stands for the number of a description, of a value that will not come.
_LOST = -1

# Values of an edge that are received before they are asked for.
_AHEAD = 2

_HOST = torch.device("cpu")


@dataclass(frozen=True)
class Edge:
    """Name the tags of one edge of the pipeline, from stage `index` to the next."""

    index: int
    num_edges: int

    @property
    def header_tag(self) -> int:
        """Return the tag of the headers, which go forward only."""
        return self.index

    def payload_tag(self, microbatch: int, *, backward: bool) -> int:
        """Return the tag of one payload."""
        return self.num_edges * (1 + 3 * microbatch + backward) + self.index

    def word_tag(self, microbatch: int) -> int:
        """Return the tag of the message that says which gradients there are."""
        return self.num_edges * (3 + 3 * microbatch) + self.index


class Outbox:
    """Keep what is being sent until it has been."""

    def __init__(self, channel: Communicator) -> None:
        self._channel = channel
        self._works: list[Work] = []

    def post(self, flat: Any, dst: int, tag: int) -> None:
        """Start to send a flat array, which nobody may change any more."""
        self._works = [work for work in self._works if not work.done()]
        self._works.append(self._channel.isend(_array(flat), dst, tag))

    def drain(self) -> None:
        """Wait until everything has been sent."""
        while self._works:
            self._works.pop(0).wait()


class HeaderWriter:
    """Write one edge's stream of headers: a number for every description, the text on first use."""

    def __init__(self, outbox: Outbox, dst: int, edge: Edge) -> None:
        self._outbox = outbox
        self._dst = dst
        self._edge = edge
        self._numbers: dict[Description, int] = {}

    def write(self, microbatch: int, description: Description) -> None:
        """Announce the payload of a micro-batch."""
        number = self._numbers.get(description)
        text = b""
        if number is None:
            if len(self._numbers) == _MEMORY:
                self._numbers.clear()
            number = self._numbers[description] = len(self._numbers)
            text = description.to_bytes()
        self._post(microbatch, number, len(text))
        if text:
            body = np.frombuffer(bytearray(text), dtype=np.uint8)
            self._outbox.post(body, self._dst, self._edge.header_tag)

    def write_lost(self, microbatch: int) -> None:
        """Announce that no payload of a micro-batch will come."""
        self._post(microbatch, _LOST, 0)

    def _post(self, microbatch: int, number: int, length: int) -> None:
        header = np.array([microbatch, number, length], dtype=np.int64)
        self._outbox.post(header, self._dst, self._edge.header_tag)


@dataclass
class Received:
    """A value on its way in."""

    description: Description
    flat: Tensor
    work: Work | None

    def wait(self) -> list[Tensor]:
        """Return its tensors, which share memory that nobody else holds."""
        if self.work is not None:
            self.work.wait()
        return unflatten(self.flat, self.description.tensors)


@dataclass
class Inbox:
    """Receive the values that come over one edge, up to two before they are asked for."""

    channel: Communicator
    src: int
    edge: Edge
    device: torch.device
    _known: dict[int, Description] = field(default_factory=dict)
    _expected: int = 0
    _header: tuple[NDArray[np.int64], Work] | None = None
    _arriving: dict[int, Received | None] = field(default_factory=dict)

    def expect(self, count: int) -> None:
        """Say how many values are to come; no more headers are waited for."""
        self._expected = count
        self._next_header()

    def prefetch(self) -> None:
        """Begin to receive what has been announced, without waiting."""
        while len(self._arriving) < _AHEAD and self._header and self._header[1].done():
            self._read_header()

    def take(self, microbatch: int) -> Received | None:
        """Return the value of a micro-batch, waiting for its header but not for its payload.

        None for one that a stage before has lost.
        """
        while microbatch not in self._arriving:
            self._read_header()
        return self._arriving.pop(microbatch)

    def _next_header(self) -> None:
        self._header = None
        if self._expected:
            self._expected -= 1
            header = np.empty(_HEADER, dtype=np.int64)
            self._header = header, self.channel.irecv(header, self.src, self.edge.header_tag)

    def _read_header(self) -> None:
        assert self._header is not None
        header, work = self._header
        work.wait()
        microbatch, number, length = header.tolist()
        if length:
            text = np.empty(length, dtype=np.uint8)
            self.channel.recv(text, self.src, self.edge.header_tag)
            self._known[number] = Description.from_bytes(text.tobytes())
        self._arriving[microbatch] = (
            None
            if number == _LOST
            else start_receive(
                self.channel,
                self._known[number],
                self.src,
                self.edge.payload_tag(microbatch, backward=False),
                self.device,
            )
        )
        self._next_header()


def start_receive(
    channel: Communicator,
    description: Description,
    src: int,
    tag: int,
    device: torch.device,
    behind: int = 0,
) -> Received:
    """Begin to receive, on a device, the payload of a value whose description is known.

    behind: bytes that come with it, behind it.
    """
    nbytes = payload_bytes(description.tensors) + behind
    flat = torch.empty(nbytes, dtype=torch.uint8, device=device)
    work = channel.irecv(_array(flat), src, tag) if flat.numel() else None
    return Received(description, flat, work)


def payload_bytes(specs: Sequence[TensorSpec]) -> int:
    """Return the bytes of the payload of these tensors."""
    return _places(specs)[-1]


def flatten(tensors: Sequence[Tensor], device: torch.device, behind: int = 0) -> Tensor:
    """Return the bytes of several tensors as one flat tensor on a device.

    A single one that lies there is not copied, but where bytes behind it are to be free.
    """
    pieces = [flat_bytes(tensor.to(device)) for tensor in tensors]
    if len(pieces) == 1 and not behind:
        return pieces[0]
    places = _places([TensorSpec.of(tensor) for tensor in tensors])
    flat = torch.empty(places[-1] + behind, dtype=torch.uint8, device=device)
    for start, piece in zip(places, pieces, strict=False):
        flat[start : start + piece.numel()] = piece
    return flat


def unflatten(flat: Tensor, specs: Sequence[TensorSpec]) -> list[Tensor]:
    """Return the tensors of a payload, as views of its memory."""
    tensors = []
    for start, spec in zip(_places(specs), specs, strict=False):
        piece = flat[start : start + _nbytes(spec)].view(spec.torch_dtype).view(spec.shape)
        # Not views as far as autograd knows: layers may change one in place.
        tensors.append(piece.data)
    return tensors


def broadcast_value(
    comm: Communicator, value: Any, root: int, where: str, device: torch.device = _HOST
) -> Any:
    """Return root's nested value on every rank; the others' `value` is ignored. Collective.

    device: where its tensors come to lie on the others; all of one kind.
    """
    tensors: list[Tensor] = []
    text = b""
    if comm.rank == root:
        description, tensors = take_apart(value, where)
        text = description.to_bytes()
    length = np.array([len(text)], dtype=np.int64)
    comm.broadcast(length, root=root)
    body = np.zeros(int(length[0]), dtype=np.uint8)
    if comm.rank == root:
        body[:] = np.frombuffer(text, dtype=np.uint8)
    comm.broadcast(body, root=root)
    description = Description.from_bytes(body.tobytes())
    specs = description.tensors
    if comm.rank == root:
        flat = flatten(tensors, device)
    else:
        flat = torch.empty(payload_bytes(specs), dtype=torch.uint8, device=device)
    if flat.numel():
        comm.broadcast(flat, root=root)
    return (
        value if comm.rank == root else put_together(description.skeleton, unflatten(flat, specs))
    )


def _array(flat: Any) -> Any:
    """Return the array of NumPy with a CPU tensor's memory, which costs less to send."""
    return flat.numpy() if isinstance(flat, Tensor) and flat.device.type == "cpu" else flat


def _nbytes(spec: TensorSpec) -> int:
    count = 1
    for length in spec.shape:
        count *= length
    return count * spec.torch_dtype.itemsize


def _places(specs: Sequence[TensorSpec]) -> list[int]:
    """Return where each tensor begins in the payload, then the length of the payload."""
    if len(specs) == 1:
        return [0, _nbytes(specs[0])]
    return list(accumulate((-(-_nbytes(spec) // _ALIGN) * _ALIGN for spec in specs), initial=0))
