"""The slots of messages between two ranks: as many as are under way, and used again."""

import sys
import threading
import time
from random import Random

import numpy as np
import pytest

from ringfold import CommError
from ringfold.comm import outbox
from ringfold.comm.memory import Memory
from ringfold.comm.outbox import Outbox
from ringfold.kernels.mailbox_words import BOX_BYTES, RUNS, SLOT_BYTES, SLOTS, Slot


class Pair:
    """An outbox, and what its receiver sees: the words of slots by the number of the message."""

    def __init__(self) -> None:
        self.memory = Memory(0, 1)
        block = self.memory.allocate(BOX_BYTES)
        self.directory = np.asarray(block).view(np.int64)
        self.slots = Outbox(self.memory.address + block.offset, self.memory)
        self.addresses = [0]  # of each message

    def send(self, count: int) -> None:
        for _ in range(count):
            self.slots.take()
            self.addresses.append(self.slots.slot)
            self.words(self.slots.sent)[Slot.SEQUENCE] = self.slots.sent

    def words(self, sequence: int) -> np.ndarray:
        run = int(self.directory[sequence // SLOTS % RUNS])
        at = run + sequence % SLOTS * SLOT_BYTES
        return self.memory._mapped.bytes[at : at + SLOT_BYTES].view(np.int64)

    def finish(self, *sequences: int) -> None:
        for sequence in sequences:
            self.words(sequence)[Slot.DONE] = sequence


def test_a_message_has_a_slot_of_its_own_until_it_is_done() -> None:
    pair = Pair()
    pair.send(3 * SLOTS)
    assert len(set(pair.addresses)) == 3 * SLOTS + 1
    assert [int(pair.words(k)[Slot.SEQUENCE]) for k in (1, 300, 700)] == [1, 300, 700]
    assert pair.words(3 * SLOTS + 1)[Slot.SEQUENCE] < 3 * SLOTS + 1  # is yet to come


def test_a_message_that_was_never_written_is_taken_back() -> None:
    """Receivers saw none behind the slot of a send that a signal had interrupted."""
    pair = Pair()
    for sent in (0, SLOTS - 1):  # in a run, and where the next one begins
        pair.send(sent - pair.slots.sent)
        pair.slots.take()
        for _ in range(2):
            pair.slots.take_back()
            assert pair.slots.sent == sent
        pair.send(1)
        assert pair.words(sent + 1)[Slot.SEQUENCE] == pair.slots.sent == sent + 1
    pair.slots.take_back()  # which was written
    assert pair.slots.sent == SLOTS and len(pair.slots._runs) == 2


def test_a_run_of_slots_is_used_again_once_all_of_it_is_done() -> None:
    pair = Pair()
    for round in range(4):  # all but message 5 are received at once
        pair.send(SLOTS)
        sequences = range(round * SLOTS + 1, round * SLOTS + SLOTS + 1)
        pair.finish(*(sequence for sequence in sequences if sequence != 5))
    first, *runs = pair.directory[:5].tolist()
    assert runs[:2] == [-2, -3] and len({first, *runs[2:]}) == 3  # two are done as a whole
    pair.finish(5)
    pair.send(SLOTS)
    assert pair.directory[5] == first and pair.directory[0] == -1


def test_a_sender_is_far_ahead_of_messages_that_wait_not_of_one_that_does(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(outbox, "AHEAD", SLOTS)
    pair = Pair()
    pair.send(SLOTS)
    assert not pair.slots.far_ahead
    pair.send(1)
    assert pair.slots.far_ahead
    pair.finish(*range(2, SLOTS + 2))
    assert not pair.slots.far_ahead
    pair.send(1)
    pair.finish(SLOTS + 2)
    assert not pair.slots.far_ahead


def test_more_messages_than_can_be_told_apart_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "RUNS", 2)
    pair = Pair()
    pair.send(1)
    pair.send(2 * SLOTS - 2)
    with pytest.raises(CommError, match=f"{2 * SLOTS - 1} messages .*; {2 * SLOTS} is the"):
        pair.send(1)
    pair.finish(*range(1, SLOTS))
    pair.send(1)


def test_a_run_that_is_used_again_leaves_the_words_of_later_ones_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """However late messages are received, as long as the sender may be so far ahead."""
    monkeypatch.setattr(outbox, "RUNS", 3)
    monkeypatch.setattr(sys.modules[__name__], "RUNS", 3)
    for seed in range(8):
        random, pair, open_ = Random(seed), Pair(), set[int]()
        for number in range(20):
            late = {k for k in open_ if k // SLOTS <= number - 3}
            done = late | {k for k in open_ if random.random() < random.choice((0.3, 1))}
            pair.finish(*sorted(done))
            open_ -= done
            pair.send(SLOTS if number else SLOTS - 1)
            open_ |= {*range(max(number * SLOTS, 1), (number + 1) * SLOTS)}
            sequences = [int(pair.words(k)[Slot.SEQUENCE]) for k in sorted(open_)]
            assert sequences == sorted(open_)


def test_two_threads_take_memory_one_after_the_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same pages went to both."""
    memory, inside, most = Memory(0, 1), [], []
    look = Memory._take_back

    def slowly(memory: Memory) -> None:
        inside.append(1)
        most.append(len(inside))
        time.sleep(0.02)
        look(memory)
        inside.pop()

    monkeypatch.setattr(Memory, "_take_back", slowly)
    threads = [threading.Thread(target=memory.allocate, args=(100,)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1, 1]
