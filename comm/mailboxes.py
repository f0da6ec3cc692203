"""Messages between ranks of one node, through memory that they map of each other."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Generator
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ..kernels.mailbox_words import ANSWERS, Letter
from ..kernels.records import Status
from .boxes import IN_PLACE_BYTES, Boxes, Bytes
from .buffer import Buffer, address_of
from .errors import CommError
from .express import Express
from .letters import Message
from .node_memory import NodeMemory, look_counts
from .ordinals import Ordinals
from .posts import Torn
from .trace import Signature
from .transport.base import Request
from .work import Prepared, Receipt, Steps

if TYPE_CHECKING:
    from .communicator import Communicator


class Mailboxes:
    """Send and receive between this rank and those of its group that share its memory."""

    def __init__(self, boxes: Boxes) -> None:
        self.rank = boxes.rank
        self._boxes = boxes
        self._ordinals: defaultdict[tuple[bool, int], Ordinals] = defaultdict(Ordinals)
        self._torn = Torn(self.rank)
        self._patience = look_counts(boxes.num_neighbours)

    @classmethod
    def open(cls, comm: Communicator, nodes: NodeMemory) -> Mailboxes | None:
        """Open the boxes of a group; collective. None where this rank shares no memory."""
        boxes = Boxes.open(comm, nodes)
        return None if boxes is None else cls(boxes)

    def reaches(self, peer: int) -> bool:
        """Tell whether this rank and the peer share memory; both see it alike."""
        return peer in self._boxes

    def close(self) -> None:
        """Give the memory back, which no rank of the group may use any more."""
        self._boxes.close()

    def send(self, buffer: Buffer, dst: int, tag: int) -> Prepared:
        """Prepare a message to a rank that this one reaches."""
        address, nbytes = address_of(buffer.flat), buffer.flat.nbytes
        there, reason = self._boxes.where(Bytes(address, nbytes, None), dst)

        def carry(keeps: Any, tag: int) -> Steps:
            bytes_ = Bytes(address, nbytes, keeps)
            post = partial(self._boxes.outgoing, bytes_, dst, tag, there)
            asked = yield from self._deliver(post, dst, tag)
            if asked:
                yield from self._answer(bytes_, dst, asked)
            return keeps

        def run(_: int) -> Steps:
            buffer.stage()
            yield from carry(buffer, tag)
            return buffer.owner

        receipt = Receipt("send", "message", "shared", 1, nbytes, reason)
        signature, again = _signature("send", buffer, dst), None if buffer.staged else carry
        express = partial(self._express, address, nbytes, dst, True)
        return Prepared(receipt, None, run, signature, carry=again, express=express)

    def recv(self, buffer: Buffer, src: int, tag: int) -> Prepared:
        """Prepare to receive a message from a rank that this one reaches."""
        nbytes, address = buffer.flat.nbytes, address_of(buffer.flat)

        def carry(keeps: Any, tag: int) -> Steps:
            yield from self._accept(Bytes(address, nbytes, keeps), src, tag)
            return keeps

        def run(_: int) -> Steps:
            buffer.stage()
            yield from carry(buffer, tag)
            buffer.commit()
            return buffer.owner

        receipt = Receipt("recv", "message", "shared", 1, nbytes)
        large = nbytes > IN_PLACE_BYTES
        signature, again = _signature("recv", buffer, src), None if buffer.staged else carry
        express = partial(self._express, address, nbytes, src, False)
        return Prepared(
            receipt, None, run, signature, background=large, carry=again, express=express
        )

    def _express(self, address: int, nbytes: int, peer: int, sends: bool) -> Express | None:
        """Return what sends or receives the same bytes again at once, None of larger messages."""
        try:
            words = self._boxes.express(Bytes(address, nbytes, None), peer, sends)
        except MemoryError:  # as much as is left may do for messages that are copied
            return None
        if words is None:
            return None
        words[Letter.SPINS], words[Letter.YIELDS] = self._patience
        ordinals, refused = self._ordinals[sends, peer], () if sends else self._torn.known
        return Express(words, ordinals, refused, self._boxes)

    # -- messages whose bytes lie elsewhere ---------------------------------------------------

    def note(self) -> npt.NDArray[np.uint8]:
        """Return memory for notes, which both sides of a message can write."""
        return self._boxes.note()

    def send_note(
        self, note: npt.NDArray[np.uint8], nbytes: int, dst: int, tag: int
    ) -> Generator[list[Request], bool | None, int]:
        """Send what tells how to come by nbytes; end when the receiver has done with it.

        Nothing else may be written to the note meanwhile. Returns: 0, or what to answer with the
        bytes themselves, which the receiver asks for.
        """

        post = partial(self._boxes.outgoing_note, note, nbytes, dst, tag)
        return (yield from self._deliver(post, dst, tag))

    def answer(self, part: npt.NDArray[np.uint8], dst: int, number: int) -> Steps:
        """Send the bytes that were asked for: `number` is what `send_note` has returned."""
        yield from self._answer(_bytes_of(part), dst, number)

    def hope(
        self, nbytes: int, src: int, tag: int
    ) -> Generator[list[Request], bool | None, Message]:
        """Wait for a message that may be a note; see what it is by its `note`."""
        return (yield from self._accept(Bytes(0, nbytes, None), src, tag, notes=True))

    def take(self, message: Message, part: npt.NDArray[np.uint8], src: int) -> Steps:
        """Receive the bytes of what `hope` has found: those that came, or that it asks for."""
        if message.note:
            message.settle(served=False)
        else:
            message.put_at(part)
            status = message.check((yield from message.steps(self._patience)))
            if status != Status.BYTES:
                return
        yield from self._ask(message, _bytes_of(part), src)

    # -- parts of them -----------------------------------------------------------------------

    def _deliver(
        self, post: Callable[[int], Message], dst: int, tag: int, number: int | None = None
    ) -> Generator[list[Request], bool | None, int]:
        """Post a message, given its ordinal, and go on until it has ended, or break it off.

        number: of an answer, in place of an ordinal.
        Returns: 0, or its number where the receiver asks for the bytes of a note.
        """
        message, ordinal = None, 0
        try:
            # Here, so that what a signal's handler raises from now on takes it back.
            ordinal = self._ordinals[True, dst].next(tag) if number is None else number
            message = post(ordinal)
            status = yield from message.steps(self._patience)
        except BaseException:
            self._break_off_send(message, dst, tag, ordinal)
            raise
        return message.sequence if message.check(status) == Status.BYTES else 0

    def _answer(self, bytes_: Bytes, dst: int, number: int) -> Steps:
        """Send the bytes that were asked for, unless the receiver has given them up since.

        It may have done so before it could find them: it says so where it has asked.
        """
        post = partial(self._boxes.outgoing, bytes_, dst, ANSWERS, None)
        steps, patience = self._deliver(post, dst, ANSWERS, number), None
        try:
            while not self._boxes.given_up(dst, number):
                patience = yield steps.send(patience)
        except StopIteration:
            return
        finally:
            steps.close()
        raise CommError(
            f"rank {self.rank}: rank {dst} has given a message up halfway, of {bytes_.nbytes} bytes"
        )

    def _accept(
        self, bytes_: Bytes, src: int, tag: int, *, notes: bool = False
    ) -> Generator[list[Request], bool | None, Message]:
        """Take the next message, or break it off.

        notes: take a note as one; bytes that have come instead are left to who takes them.
        """
        ordinal, message = self._next(src, tag), None
        try:
            message = self._boxes.incoming(bytes_, src, tag, ordinal)
            if notes:
                message.hope()
            # A copy that takes long is left to whoever waits, or to the background.
            later = not notes and bytes_.nbytes > IN_PLACE_BYTES
            status = yield from message.steps(self._patience, later)
            if status == Status.BYTES and not notes:
                yield from self._ask(message, bytes_, src)
        except BaseException:
            self.break_off(message, src, tag, ordinal)
            raise
        message.check(status)
        return message

    def _ask(self, message: Message, bytes_: Bytes, src: int) -> Steps:
        """Receive the bytes that a message's sender was asked for."""
        answer = self._boxes.incoming(bytes_, src, ANSWERS, message.sequence)
        try:
            status = yield from answer.steps(self._patience)
        except BaseException:
            answer.abandon()
            raise
        answer.check(status)

    def _next(self, src: int, tag: int) -> int:
        """Return the ordinal of the next message to receive."""
        self._torn.check(src, tag)
        return self._ordinals[False, src].next(tag)

    def break_off(self, message: Message | None, src: int, tag: int, ordinal: int) -> None:
        """Leave a message to the next receive, or refuse these where it cannot be left."""
        begun = message is not None and message.abandon()
        if begun or not self._ordinals[False, src].take_back(tag, ordinal):
            self._torn.add(src, tag)

    def _break_off_send(self, message: Message | None, dst: int, tag: int, ordinal: int) -> None:
        """Keep what the receiver may still write to; uncount a message that it cannot have seen."""
        if message is not None and message.abandon():
            self._boxes.keep(message)
            return
        self._boxes.take_back(dst)
        if tag != ANSWERS:
            self._ordinals[True, dst].take_back(tag, ordinal)


def _bytes_of(part: npt.NDArray[np.uint8]) -> Bytes:
    return Bytes(address_of(part), part.nbytes, part)


def _signature(name: str, buffer: Buffer, peer: int) -> Signature:
    return Signature(name, "", buffer.dtype.name, buffer.flat.size, peer)
