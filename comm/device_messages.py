"""Messages of device memory: from device to device by `device_mail`, staged, or sent by MPI.

A message may have host memory at one end, and device memory at the other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from .chunks import pieces
from .device import Device, DeviceArray, renewed
from .device_mail import DeviceMail
from .device_wait import following, wait_here
from .direct import WAY
from .transport.base import Channel, Receiving, Request
from .transport.base import DeviceMessages as Sender
from .windowed import Copier, typed
from .work import Behind, Prepared, Steps

if TYPE_CHECKING:
    from .communicator import Communicator

REASON = "device memory passes through pinned host memory"


class DeviceMessages:
    """Prepare messages of device memory for one rank of one group."""

    def __init__(self, comm: Communicator, copier_of: Callable[[DeviceArray], Copier]) -> None:
        self._comm, self._copier_of = comm, copier_of
        self._mails: dict[str, DeviceMail] = {}

    def close(self) -> list[object]:
        """Give back what was opened of others; return what must live until they close theirs."""
        mails, self._mails = self._mails, {}
        for mail in mails.values():
            mail.close()
        return list(mails.values())

    def send(self, array: DeviceArray, empty: Prepared, tag: int) -> Prepared:
        """empty: a message of no elements to the same rank, as host memory's is prepared."""
        dst = empty.signature.peer
        mail, staged = self._mail(array, dst), self._send_staged(array, dst, tag)
        if mail is None:
            return _staged(empty, array, staged)
        if dst in mail.refused:
            return _staged(empty, array, staged, mail.refused[dst])
        return _by_note(empty, array, mail.send(array, dst, tag, staged))

    def recv(self, array: DeviceArray, empty: Prepared, tag: int) -> Prepared:
        """empty: as of `send`, from the same rank."""
        src = empty.signature.peer
        mail = self._mail(array, src)
        if mail is None:
            return _staged(empty, array, self._recv_staged(array, src, tag))
        return _by_note(empty, array, mail.recv(array, src, tag))

    # -- staged ------------------------------------------------------------------------------

    def _send_staged(self, array: DeviceArray, dst: int, tag: int) -> Callable[[int], Steps]:
        """Copy to the host while the caller waits, then send it as any host memory.

        The caller waits so that the message keeps its place among the others to that rank, which
        wait for no copy.
        """
        host, copier = self._comm.host_operations, self._copier_of(array)

        def run(_: int) -> Steps:
            ready = copier.device.record(copier.caller(array))
            place, copied = copier.fetch(array.address, array.nbytes, ready)
            wait_here(copied)
            part = place[: array.nbytes]
            yield from host.send(typed(part, array, (array.count,)), dst, tag).run(0)
            copier.staging.give(place, None)
            return array.owner

        return run

    def _recv_staged(self, array: DeviceArray, src: int, tag: int) -> Callable[[int], Steps]:
        host, copier = self._comm.host_operations, self._copier_of(array)

        def run(_: int) -> Steps:
            device, caller = copier.device, copier.caller(array)
            ready = device.record(caller)
            place = copier.staging.take(array.nbytes)
            part = place[: array.nbytes]
            yield from host.recv(typed(part, array, (array.count,)), src, tag).run(0)
            copied = copier.deliver(place, array, ready)
            return Behind(array.owner, following(device, array, caller, copied))

        return run

    # -- choosing ----------------------------------------------------------------------------

    def _mail(self, array: DeviceArray, peer: int) -> DeviceMail | None:
        """Return what carries notes to a peer; None where a message is staged."""
        host = self._comm.host_operations
        if not array.nbytes or peer == self._comm.rank or not host.by_mail(peer):
            return None
        copier = self._copier_of(array)
        peering, mail = copier.device.peering, host.mail
        if peering is None or mail is None:
            return None
        known = self._mails.get(copier.device.name)
        if known is None:
            known = DeviceMail(mail, copier, peering, "staged, shared")
            self._mails[copier.device.name] = known
        return known


def gpu_aware(
    comm: Communicator,
    messages: Sender,
    device: Device,
    array: DeviceArray,
    empty: Prepared,
    tag: int,
) -> Prepared:
    """Prepare a message from or into device memory; empty: the same of no elements on the host.

    The host waits for the caller's stream before the library is called, so that a message keeps
    its place among the others to that rank. The other end may be in host memory.
    """
    peer, posts = empty.signature.peer, comm.host_operations.posts
    limit, channel = comm._settings.max_message_bytes, Channel.POINT_TO_POINT

    def send(low: int, high: int) -> Request:
        return messages.isend_device(array.address + low, high - low, peer, tag, channel)

    def recv(low: int, high: int) -> Receiving:
        return messages.irecv_device(array.address + low, high - low, peer, tag, channel)

    def run(ours: int) -> Steps:
        if not array.nbytes:
            yield from empty.run(ours)
            return array.owner
        wait_here(device.record(device.caller(renewed(array))))
        spans = pieces(array.nbytes, limit)
        if empty.signature.operation == "send":
            yield from posts.send(send, spans, array)
        else:
            yield from posts.receive(recv, spans, peer, tag, array)
        return array.owner

    return _prepared(empty, array, WAY, "", run)


def _staged(
    empty: Prepared, array: DeviceArray, run: Callable[[int], Steps], why_not: str = ""
) -> Prepared:
    why = f"{REASON}; no ipc: {why_not}" if why_not else REASON
    return _prepared(empty, array, f"staged, {empty.receipt.transport}", why, run)


def _by_note(empty: Prepared, array: DeviceArray, run: Callable[[int], Steps]) -> Prepared:
    why = "the receiver's device copies it; staged where one end is in host memory"
    return _prepared(empty, array, f"ipc or staged, {empty.receipt.transport}", why, run)


def _prepared(
    empty: Prepared, array: DeviceArray, way: str, why: str, run: Callable[[int], Steps]
) -> Prepared:
    """Prepare a message to or from the same rank as `empty`, which has no elements."""
    receipt = replace(empty.receipt, transport=way, nbytes=array.nbytes, reason=why)
    signature = empty.signature._replace(dtype=array.dtype.name, elements=array.count)
    return Prepared(receipt, empty.channel, run, signature)
