"""Small messages that come again, step by step, both sides in one process."""

import ctypes
from typing import Any

import numpy as np
import pytest
from two_ranks import TwoBoxes, step

from ringfold.comm.boxes import Bytes
from ringfold.comm.buffer import address_of
from ringfold.comm.express import Express
from ringfold.comm.trace import Entry, Ring, Signature, State
from ringfold.kernels.mailbox_words import (
    EXPRESS_BYTES,
    EXPRESS_STRIDE,
    EXPRESS_WINDOWS,
    GIVEN_UP,
    SLOT_BYTES,
    SLOTS,
    Kind,
    Letter,
    Out,
    Slot,
)
from ringfold.kernels.records import Count, Status

Array = np.ndarray[Any, Any]
TAG = 7


def values(nbytes: int, seed: int = 0) -> Array:
    return np.random.default_rng([nbytes, seed]).integers(0, 255, nbytes, np.uint8)


def words_of(slot: int) -> Any:
    return (ctypes.c_int64 * (SLOT_BYTES // 8)).from_address(slot)


class Known:
    """A message that rank 0 sends, or rank 1 receives, again: what counts and notes it, too."""

    def __init__(self, pair: TwoBoxes, rank: int, x: Array) -> None:
        self.x = x
        self.refused: set[object] = set()
        words = pair.boxes[rank].express(Bytes(address_of(x), x.nbytes, None), 1 - rank, rank == 0)
        assert words is not None
        words[Letter.SPINS], words[Letter.YIELDS] = 3, 3
        self.express = Express(words, pair.ordinals[rank], self.refused, pair)
        self.counter, self.tally, self.ring = np.zeros(Count.WORDS, int), np.zeros(1, int), Ring()
        name = ("send", "recv")[rank]
        call = self.ring.intern(Signature(name, "", "uint8", x.size, 1 - rank), "two", 2, "a:1")
        addresses = address_of(self.counter), address_of(self.tally)
        self.express.note_in(self.ring, call, *addresses)
        pair.ordinals[rank].next(TAG)
        pair.ordinals[rank].take_back(TAG, 1)

    def run(self, tag: int = TAG, patient: bool = False) -> bool:
        return self.express.run(tag, patient)

    @property
    def counted(self) -> tuple[int, int]:
        return int(self.counter[Count.MESSAGES]), int(self.tally[0])

    @property
    def entries(self) -> tuple[Entry, ...]:
        return self.ring.entries()


def two(nbytes: int = 100) -> tuple[TwoBoxes, Known, Known]:
    """Return a pair, of which one ordinary message has passed, and both ranks' known messages."""
    pair = TwoBoxes()
    pair.pass_on(values(3), 1)
    return pair, Known(pair, 0, values(nbytes)), Known(pair, 1, np.zeros(nbytes, np.uint8))


@pytest.mark.parametrize("nbytes", [0, 1, 100, EXPRESS_BYTES])
def test_it_is_sent_received_counted_and_noted(nbytes: int) -> None:
    _, sender, receiver = two(nbytes)
    for turn in range(3 * EXPRESS_WINDOWS):
        sender.x[:] = values(nbytes, turn)
        assert sender.run() and receiver.run()
        np.testing.assert_array_equal(receiver.x, sender.x)
        for side in (sender, receiver):
            assert side.counted == (turn + 1, turn + 1)
            last = side.entries[-1]
            assert (last.sequence, last.state) == (turn + 1, State.DONE)
            assert 0 < last.start <= last.end and last.site == "a:1"


def test_ordinary_messages_and_these_are_one_sequence_for_each_tag() -> None:
    pair, sender, receiver = two()
    got = np.zeros_like(sender.x)
    for turn in range(20):
        sent = [values(100, 2 * turn), values(100, 2 * turn + 1)]
        if turn % 2:
            assert step(pair.send(sent[0], TAG)) == Status.DONE
            sender.x[:] = sent[1]
            assert sender.run()
        else:
            sender.x[:] = sent[0]
            assert sender.run()
            assert step(pair.send(sent[1], TAG)) == Status.DONE
        if turn % 4 < 2:
            assert receiver.run() and step(pair.receive(got, TAG)) == Status.DONE
            arrived = [receiver.x, got]
        else:
            assert step(pair.receive(got, TAG)) == Status.DONE and receiver.run()
            arrived = [got, receiver.x]
        np.testing.assert_array_equal(arrived, sent)


def test_a_message_that_has_not_come_is_left_to_come() -> None:
    pair, sender, receiver = two()
    for patient in (False, True):
        assert not receiver.run(patient=patient)
    assert step(pair.send(sender.x, TAG + 1)) == Status.DONE  # another tag's
    assert not receiver.run() and receiver.counted == (0, 0) and not receiver.entries
    assert sender.run() and receiver.run()
    np.testing.assert_array_equal(receiver.x, sender.x)


def test_with_all_windows_taken_nothing_is_sent_and_none_is_written_over() -> None:
    pair, sender, _ = two()
    got = [np.zeros(100, np.uint8) for _ in range(EXPRESS_WINDOWS + 1)]
    for turn in range(EXPRESS_WINDOWS):
        sender.x[:] = values(100, turn)
        assert sender.run()
    assert not sender.run() and sender.counted == (EXPRESS_WINDOWS, EXPRESS_WINDOWS)
    last = values(100, EXPRESS_WINDOWS)
    assert step(pair.send(last, TAG)) == Status.DONE
    for one in got:
        assert step(pair.receive(one, TAG)) == Status.DONE
    np.testing.assert_array_equal(got[:-1], [values(100, k) for k in range(EXPRESS_WINDOWS)])
    np.testing.assert_array_equal(got[-1], last)
    assert sender.run()


def test_a_window_that_is_free_again_is_taken_again() -> None:
    """Each window of a large message takes memory once it is used, and is cold when used first."""
    pair, sender, receiver = two(EXPRESS_BYTES)
    for _ in range(3 * EXPRESS_WINDOWS):
        assert sender.run() and sender.run() and receiver.run() and receiver.run()
    words = pair.boxes[0]._slots[1].words
    users = [words[Out.USERS + 2 * window] for window in range(EXPRESS_WINDOWS)]
    assert sum(user != 0 for user in users) == 2


def test_a_message_that_is_received_late_keeps_its_window_and_no_other() -> None:
    """The pair's messages took the long way from then on, until it was received."""
    pair, sender, receiver = two()
    first = values(100, 1)
    for rank in range(2):
        pair.ordinals[rank].next(TAG + 1)
        pair.ordinals[rank].take_back(TAG + 1, 1)
    sender.x[:] = first
    assert sender.run(TAG + 1)
    for turn in range(3 * EXPRESS_WINDOWS):
        sender.x[:] = values(100, turn)
        assert sender.run() and receiver.run()
        np.testing.assert_array_equal(receiver.x, sender.x)
    for turn in range(EXPRESS_WINDOWS):  # with all others taken as well, none is left
        assert sender.run() == (turn < EXPRESS_WINDOWS - 1)
    assert receiver.run(TAG + 1)
    np.testing.assert_array_equal(receiver.x, first)
    assert sender.run() and not sender.run()


def test_what_is_closed_is_not_sent_to() -> None:
    """Another thread, just about to send, wrote to address 0."""
    pair, sender, _ = two()
    pair.boxes[0].close()
    assert not sender.run() and sender.counted == (0, 0)


def test_what_is_no_plain_message_is_left_to_others_untouched() -> None:
    """Another length, and a note."""
    pair, _, receiver = two()
    other, got = values(99), np.zeros(99, np.uint8)
    assert step(pair.send(other, TAG)) == Status.DONE
    assert not receiver.run() and receiver.counted == (0, 0)
    assert step(pair.receive(got, TAG)) == Status.DONE
    np.testing.assert_array_equal(got, other)
    note = pair.note(100, TAG)
    assert step(note) == Status.RUNNING and not receiver.run() and note.running
    hoping = pair.receive(receiver.x, TAG)
    hoping.hope()
    assert step(hoping) == Status.NOTE


@pytest.mark.parametrize(
    "words",
    [
        {Slot.PRODUCED: 64},  # of 100
        {Slot.NBYTES: 200},  # of which there are 100
        {Slot.WINDOW: 64},  # through which 100 have gone
        {Slot.KIND: Kind.PRIVATE},
    ],
    ids=str,
)
def test_a_message_that_is_not_whole_there_is_left_to_others(words: dict[Slot, int]) -> None:
    pair, sender, receiver = two()
    assert sender.run()
    slot = words_of(pair.boxes[0]._slots[1].slot)
    before = {word: slot[word] for word in words}
    for word, value in words.items():
        slot[word] = value
    assert not receiver.run() and receiver.counted == (0, 0) and not receiver.x.any()
    for word, value in before.items():
        slot[word] = value
    assert receiver.run()
    np.testing.assert_array_equal(receiver.x, sender.x)


def test_what_stands_in_a_slot_of_the_message_before_does_not_matter() -> None:
    pair, sender, receiver = two()
    slots = pair.boxes[0]._slots[1]
    following = words_of(slots.slot + SLOT_BYTES)
    for word in set(Slot) - {Slot.SEQUENCE, Slot.DONE}:
        following[word] = GIVEN_UP if word > Slot.KIND else Kind.NOTE
    assert sender.run() and slots.words[Out.SLOT] == slots.words[Out.SLOTS] + 2 * SLOT_BYTES
    assert receiver.run()
    np.testing.assert_array_equal(receiver.x, sender.x)


def test_what_was_sent_is_not_taken_back_for_a_message_behind_it() -> None:
    """One that is interrupted before it has a slot is counted no more: see Outbox.take_back."""
    pair, sender, _ = two()
    assert sender.run()
    pair.boxes[0].take_back(1)
    assert pair.boxes[0]._slots[1].sent == 2


def test_who_does_not_wait_looks_once() -> None:
    _, _, receiver = two()
    receiver.express._record[Letter.SPINS] = 1 << 60
    assert not receiver.run()


def test_tags_that_are_none_or_new_are_left_to_others() -> None:
    _, sender, receiver = two()
    tags: list[Any] = [TAG + 1, -1, 7.0, np.int64(TAG), True, "7"]
    for tag in tags:
        assert not sender.run(tag) and not receiver.run(tag)
    assert sender.counted == receiver.counted == (0, 0)


def test_where_receives_are_refused_none_goes_this_way() -> None:
    _, sender, receiver = two()
    receiver.refused.add((0, TAG))
    assert sender.run() and not receiver.run()
    receiver.refused.clear()
    assert receiver.run()


def test_a_run_of_slots_is_begun_by_others_and_used_again() -> None:
    pair, sender, receiver = two()
    left = 0
    for turn in range(3 * SLOTS):
        sender.x[:] = values(100, turn)
        if not sender.run():
            assert step(pair.send(sender.x, TAG)) == Status.DONE
            left += 1
        assert receiver.run()
        np.testing.assert_array_equal(receiver.x, sender.x)
    assert left == 3
    assert len(pair.boxes[0]._slots[1]._runs) <= 2


@pytest.mark.parametrize("rank", [0, 1])
def test_larger_messages_go_another_way(rank: int) -> None:
    pair = TwoBoxes()
    assert pair.boxes[rank].express(Bytes(0, EXPRESS_BYTES, None), 1 - rank, rank == 0) is not None
    assert pair.boxes[rank].express(Bytes(0, EXPRESS_BYTES + 1, None), 1 - rank, rank == 0) is None


def test_windows_are_given_back_with_the_group() -> None:
    def free() -> int:
        pair.memory._take_back()
        return sum(high - low for low, high in pair.memory._free)

    pair = TwoBoxes()
    slots, before = pair.boxes[0]._slots[1], free()
    for _ in range(2):
        slots.open_windows()
        assert before - 2 * EXPRESS_WINDOWS * EXPRESS_STRIDE < free() < before
    slots.close()
    assert free() == before
