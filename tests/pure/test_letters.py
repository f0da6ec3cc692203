"""Messages through shared memory step by step, both sides in one process: no luck needed."""

import ctypes
import gc
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from two_ranks import TwoBoxes, accessing, goes_on, step

from ringfold.comm import boxes, lending
from ringfold.comm.errors import CommError
from ringfold.comm.letters import Message
from ringfold.comm.mailboxes import Mailboxes
from ringfold.comm.memory import Memory
from ringfold.kernels.mailbox_words import RUNS, SLOTS, Letter, Out
from ringfold.kernels.records import Status


@pytest.fixture(autouse=True)
def small_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(boxes, "BUFFERED_BYTES", 4000)
    monkeypatch.setattr(boxes, "IN_PLACE_BYTES", 1000)
    monkeypatch.setattr(boxes, "WINDOW_BYTES", 64)
    monkeypatch.setattr(boxes, "PIECE_BYTES", 16)


def values(nbytes: int) -> np.ndarray[Any, Any]:
    return np.random.default_rng(nbytes).integers(0, 255, nbytes, np.uint8)


def registered(pair: TwoBoxes, nbytes: int) -> np.ndarray[Any, Any]:
    x = pair.memory.lend(nbytes)
    x[:] = values(nbytes)
    return x


def play(pair: TwoBoxes, sender: Message, receiver: Message) -> tuple[int, int]:
    """Take a step of either side by turns until both have ended; return how.

    Whoever lets the other one get on, which sleeps by its bell, has to ring it.
    """
    sides, rung = [(receiver, 1), (sender, 0)], True
    for turn in range(10_000):
        mine, rank = sides[turn % 2]
        pair.bells[1 - rank].value = 1
        assert not goes_on(mine) or rung, f"nobody wakes rank {rank}"
        rung = pair.bells[1 - rank].value == 0 or turn == 0
        if not (sender.running or receiver.running):
            return step(sender), step(receiver)
    raise AssertionError("they wait for each other")


@pytest.mark.parametrize("nbytes", [4001, 4096, 9999])
@pytest.mark.parametrize("way", ["read", "window", "registered"])
def test_who_waits_is_woken_and_gets_what_was_sent(way: str, nbytes: int) -> None:
    """Of windows, which only ranks without access to each other need, no test saw who rings."""
    pair = TwoBoxes(reads=way == "read")
    for size in (nbytes, 1001) if way == "registered" else (nbytes,):
        x = registered(pair, size) if way == "registered" else values(size)
        got = np.zeros_like(x)
        assert play(pair, pair.send(x), pair.receive(got)) == (Status.DONE, Status.DONE)
        np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("way", ["read", "window"])
def test_who_sends_another_length_is_woken_too(way: str) -> None:
    pair = TwoBoxes(reads=way == "read")
    sender, receiver = pair.send(values(5000)), pair.receive(values(4999))
    assert play(pair, sender, receiver) == (Status.MISMATCH, Status.MISMATCH)
    assert (sender._words[Letter.FOUND], receiver._words[Letter.FOUND]) == (4999, 5000)


def test_who_sends_a_note_is_woken_when_it_has_served_or_the_bytes_are_asked_for() -> None:
    pair = TwoBoxes()
    for hopes, served, told in (
        (False, False, Status.BYTES),
        (True, False, Status.BYTES),
        (True, True, Status.DONE),
    ):
        sender, receiver = pair.note(5000), pair.receive(values(5000))
        if hopes:
            receiver.hope()
        goes_on(receiver)
        pair.bells[1].value = 1
        assert step(sender) == Status.RUNNING and pair.bells[1].value == 0
        pair.bells[0].value = 1
        assert step(receiver) == (Status.NOTE if hopes else Status.BYTES)
        if hopes:
            assert step(sender) == Status.RUNNING
            receiver.settle(served=served)
        assert pair.bells[0].value == 0 and step(sender) == told


def test_bytes_that_came_where_a_note_was_hoped_for_are_not_asked_for_again() -> None:
    """Their sender would send them twice, the second time to nobody."""
    pair = TwoBoxes(reads=False)
    x, got = values(5000), np.zeros(5000, np.uint8)
    sender, receiver = pair.send(x), pair.receive(np.zeros(5000, np.uint8))
    receiver.hope()
    goes_on(sender)
    assert step(receiver) == Status.BYTES and step(sender) == Status.RUNNING
    receiver.put_at(got)
    assert play(pair, sender, receiver) == (Status.DONE, Status.DONE)
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("way", ["read", "window"])
def test_who_waits_for_a_message_given_up_is_woken(way: str) -> None:
    pair = TwoBoxes(reads=way == "read")
    x = values(5000)
    sender, receiver = pair.send(x), pair.receive(np.zeros_like(x))
    if way == "window":  # some of it has passed, and the receiver waits for more
        goes_on(sender)
        goes_on(receiver)
        pair.bells[1].value = 1
    else:
        goes_on(sender)
    assert sender.abandon()
    assert way == "read" or pair.bells[1].value == 0
    assert step(receiver) == Status.REFUSED
    if way == "window":
        sender, receiver = pair.send(x), pair.receive(np.zeros_like(x))
        goes_on(sender)
        goes_on(receiver)
        goes_on(sender)
        pair.bells[0].value = 1
        assert receiver.abandon() and pair.bells[0].value == 0
        assert step(sender) == Status.REFUSED


def ended(steps: Any) -> Any:
    """Take the steps of one side to their end, which depend on nothing else; return the result."""
    try:
        for _ in range(10):
            next(steps)
    except StopIteration as end:
        return end.value
    raise AssertionError("it waits for the other side")


@pytest.mark.parametrize("heard", [0, 1, 2])
def test_who_is_asked_for_bytes_does_not_wait_for_one_that_has_given_them_up(heard: int) -> None:
    """Who had not found the answer yet told nobody, and its sender waited until time was up.

    heard: steps of the sender before that: it has not heard of it, or has, or has answered.
    """
    pair = TwoBoxes()
    x = values(5000)
    sender, receiver = (Mailboxes(boxes) for boxes in pair.boxes)

    def send() -> Any:
        asked = yield from sender.send_note(sender.note(), x.nbytes, 1, 7)
        yield
        yield from sender.answer(x, 1, asked)

    sending = send()
    next(sending)
    message = ended(receiver.hope(x.nbytes, 0, 7))
    taking = receiver.take(message, np.zeros_like(x), 0)
    for steps in (taking, *heard * [sending]):
        next(steps)
    taking.close()
    receiver.break_off(message, 0, 7, message.ordinal)
    with pytest.raises(CommError, match="rank 1 has given a message up halfway, of 5000 bytes"):
        ended(sending)


def test_who_gives_up_asking_tells_it_in_no_slot_that_is_used_again() -> None:
    pair = TwoBoxes()
    sender, receiver = pair.note(5000), pair.receive(values(5000))
    goes_on(sender)
    assert step(receiver) == Status.BYTES == step(sender)
    for k in range(SLOTS):
        pair.pass_on(values(k))
    # As far ahead as that the words of the box tell of other slots, too.
    pair.boxes[0]._slots[1].words[Out.SENT] = RUNS * SLOTS - 1
    pair.boxes[1]._inboxes[0].low[0] = RUNS * SLOTS
    later = [pair.note(5000) for _ in range(3)]
    for one in later:
        goes_on(one)
        assert step(pair.receive(values(5000))) == Status.BYTES
    assert receiver.abandon()
    assert {step(one) for one in later} == {int(Status.BYTES)}


def test_what_comes_to_nothing_leaves_the_message_to_the_next_receive() -> None:
    pair = TwoBoxes()
    for hoped in (False, True):
        first = pair.receive(values(5000))
        if hoped:
            first.hope()
            sender = pair.note(5000)
            goes_on(sender)
            assert step(first) == Status.NOTE
        assert not first.abandon()
        assert pair.ordinals[1].take_back(0, 1)
    again = pair.receive(values(5000))
    again.hope()
    assert step(again) == Status.NOTE and sender.running


def test_a_buffered_message_outlives_that_its_sender_is_broken_off() -> None:
    pair = TwoBoxes()
    x, got = values(100), np.zeros(100, np.uint8)
    sender = pair.send(x)
    assert step(sender) == Status.DONE and sender.abandon()
    assert not sender.returned()
    assert step(pair.receive(got)) == Status.DONE and sender.returned()
    np.testing.assert_array_equal(got, x)
    assert not pair.send(x).abandon()  # nobody has seen it


def test_receives_of_one_tag_take_messages_in_the_order_in_which_they_were_posted() -> None:
    pair = TwoBoxes()
    xs, gets = [values(9), values(9)[::-1].copy()], [np.zeros(9, np.uint8) for _ in range(2)]
    receives = [pair.receive(got) for got in gets]
    for x in xs:
        assert step(receives[1]) == Status.RUNNING
        assert step(pair.send(x)) == Status.DONE
    assert step(receives[1]) == step(receives[0]) == Status.DONE
    np.testing.assert_array_equal(gets, xs)


def test_a_slot_that_is_used_again_does_not_tell_of_the_message_before() -> None:
    """What was taken of that one counted for the next, and unread bytes would be written over."""
    pair = TwoBoxes(reads=False)
    for k in range(2 * SLOTS):
        pair.pass_on(values(48 + k % 5))
    x = values(5000)
    got = np.zeros_like(x)
    assert play(pair, pair.send(x), pair.receive(got)) == (Status.DONE, Status.DONE)
    np.testing.assert_array_equal(got, x)


def test_a_receiver_that_has_not_looked_for_long_finds_what_was_left_there() -> None:
    """The sender is two millions of messages ahead by then, as far as it may be."""
    pair = TwoBoxes()
    x = values(9)
    works = [pair.send(x, tag) for tag in range(1, SLOTS)]
    assert {step(work) for work in works} == {int(Status.DONE)}
    for tag in (*range(2, SLOTS), 1):  # the receiver has not looked behind the first since
        assert step(pair.receive(np.zeros_like(x), tag)) == Status.DONE
    assert step(pair.send(x, 1)) == Status.DONE  # is left there
    pair.boxes[0]._slots[1].words[Out.SENT] = RUNS * SLOTS - 1
    for _ in range(3):
        assert step(pair.send(x)) == Status.DONE
    got = np.zeros_like(x)
    assert step(pair.receive(got, 1)) == Status.DONE
    np.testing.assert_array_equal(got, x)


def test_the_words_that_tell_where_slots_lie_are_used_again() -> None:
    pair = TwoBoxes()
    pair.boxes[0]._slots[1].words[Out.SENT] = RUNS * SLOTS - 5
    pair.boxes[1]._inboxes[0].low[0] = RUNS * SLOTS - 4
    for k in range(2 * SLOTS):
        pair.pass_on(values(k))


# -- the memory that messages take ---------------------------------------------------------------


def free(memory: Memory) -> int:
    gc.collect()
    memory._take_back()
    return sum(high - low for low, high in memory._free)


def test_what_was_received_takes_no_memory_any_more() -> None:
    pair = TwoBoxes()
    for k in range(20):
        pair.pass_on(values(k))
    assert pair.boxes[0]._pool.outstanding <= 2 * 4096


def test_what_nobody_receives_does_not_hold_up_what_was_received(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The sender stayed as far ahead as it once was, and waited for each of its receivers."""
    monkeypatch.setattr(lending, "OUTSTANDING_BYTES", 3 * 4096)
    pair, x = TwoBoxes(), values(3000)
    for tag in (1, 2, 2):
        assert step(pair.send(x, tag)) == Status.DONE
    waits = pair.send(x, 2)
    assert step(waits) == Status.RUNNING
    for _ in range(2):
        assert step(pair.receive(np.zeros_like(x), 2)) == Status.DONE
    last = pair.receive(np.zeros_like(x), 2)
    assert play(pair, waits, last) == (Status.DONE, Status.DONE)
    step(pair.send(x, 2))  # sees what has come back
    assert step(pair.send(x, 2)) == Status.DONE


def test_blocks_to_use_again_are_not_kept_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lending, "_SPARE_BYTES", 4 * 4096)
    pair, x = TwoBoxes(), values(3000)
    pair.pass_on(x)
    before = free(pair.memory)
    for _ in range(12):
        assert step(pair.send(x)) == Status.DONE
    for _ in range(12):
        assert step(pair.receive(np.zeros_like(x))) == Status.DONE
    pair.pass_on(x)
    assert 0 < before - free(pair.memory) <= 5 * 4096


def test_blocks_of_a_size_that_is_asked_for_no_more_make_room_for_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Behind a burst of one size, all messages of another took new pages: 1 MiB 1.1 ms for 0.08."""
    monkeypatch.setattr(lending, "_SPARE_BYTES", 4 * 4096)
    monkeypatch.setattr(boxes, "BUFFERED_BYTES", 8000)
    pair, few, more = TwoBoxes(), values(3000), values(6000)
    for _ in range(8):
        assert step(pair.send(few)) == Status.DONE
    for _ in range(8):
        assert step(pair.receive(np.zeros_like(few))) == Status.DONE
    for _ in range(2):
        pair.pass_on(more)
    before = free(pair.memory)
    monkeypatch.setattr(pair.memory, "lend", None)
    for _ in range(5):
        pair.pass_on(more)
    assert free(pair.memory) == before


def test_a_closed_group_gives_all_its_memory_back() -> None:
    pair = TwoBoxes()
    for k in range(2 * SLOTS):
        pair.pass_on(values(k))
    assert step(pair.send(values(300))) == Status.DONE  # is never received
    assert free(pair.memory) < free(Memory(0, 2))
    pair.boxes.pop(0).close()
    assert free(pair.memory) == free(Memory(0, 2))


def test_a_note_is_kept_until_its_receiver_has_done_with_it() -> None:
    pair = TwoBoxes()
    sender, receiver = pair.note(5000), pair.receive(values(5000))
    kept = weakref.ref(sender)
    receiver.hope()
    goes_on(sender)
    assert sender.abandon()
    pair.boxes[0].keep(sender)
    del sender
    assert free(pair.memory) and kept() is not None
    goes_on(receiver)
    assert receiver.note
    receiver.settle(served=True)
    assert free(pair.memory) and kept() is None


def test_what_a_receiver_refuses_is_not_kept() -> None:
    """An array stayed for good, where its group closed before anybody received it."""
    pair, x = TwoBoxes(), values(5000)
    kept = weakref.ref(x)
    sender, receiver = pair.send(x), pair.receive(np.zeros(5000, np.uint8))
    goes_on(sender)
    assert sender.abandon()
    pair.boxes[0].keep(sender)
    del sender, x
    gc.collect()
    assert kept() is None and step(receiver) == Status.REFUSED


# -- what the other thread, or the other process, does meanwhile ---------------------------------


def reading(receiver: Message, read: Callable[[int, int, int], int]) -> object:
    """Let a receiver read the sender by a function of (own, remote, bytes); keep the result."""
    receiver._words[Letter.READ], kept = accessing(read)
    return kept


def test_what_the_kernel_copies_in_part_is_gone_on_with() -> None:
    """Linux copies 2 GiB at once, and less where a signal comes."""
    pair = TwoBoxes()
    x, counts = values(5000), []
    got = np.zeros_like(x)
    sender, receiver = pair.send(x), pair.receive(got)

    def some(own: int, remote: int, nbytes: int) -> int:
        counts.append(nbytes)
        ctypes.memmove(own, remote, min(nbytes, 1999))
        return min(nbytes, 1999)

    function = reading(receiver, some)
    goes_on(sender)
    assert step(receiver) == Status.DONE and step(sender) == Status.DONE and function
    assert counts == [5000, 3001, 1002]
    np.testing.assert_array_equal(got, x)


@pytest.mark.parametrize("most", [2000, 5000, -1])
def test_what_is_given_up_while_it_is_read_is_refused(most: int) -> None:
    """most: bytes that are read before the sender gives the message up; -1 where none can be."""
    pair = TwoBoxes()
    x, counts = values(5000), []
    sender, receiver = pair.send(x), pair.receive(np.zeros_like(x))

    def some(own: int, remote: int, nbytes: int) -> int:
        counts.append(nbytes)
        sender.abandon()
        return most

    function = reading(receiver, some)
    goes_on(sender)
    assert step(receiver) == Status.REFUSED and len(counts) == 1 and function


def test_what_cannot_be_read_is_asked_for() -> None:
    pair = TwoBoxes()
    x = values(5000)
    sender, receiver = pair.send(x), pair.receive(np.zeros_like(x))
    function = reading(receiver, lambda *_: -1)
    assert play(pair, sender, receiver) == (Status.BYTES, Status.BYTES) and function


def test_a_message_that_another_thread_is_at_is_left_alone() -> None:
    pair = TwoBoxes()
    message = pair.send(values(5000))
    message._words[Letter.LOCK] = 1
    assert not goes_on(message)
    ends = threading.Thread(target=message.abandon)
    ends.start()
    time.sleep(0.05)
    assert message.running and ends.is_alive()
    message._words[Letter.LOCK] = 0
    ends.join(10)
    assert not message.running and not ends.is_alive()
