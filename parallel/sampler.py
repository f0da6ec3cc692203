"""Deal the samples of a data set to ranks.

Samplers are plain iterables that a torch DataLoader accepts, and need no torch. The shuffle
is drawn from (seed, epoch) alone, so that all ranks deal from the same order without a message.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..comm.arguments import whole
from ..comm.chunks import bounds

__all__ = ["GlobalBatchSampler", "NoneIfEmpty", "ShardSampler", "epoch_order"]

Order = NDArray[np.int64]


def epoch_order(num_samples: int, epoch: int, seed: int, shuffle: bool) -> Order:
    """Return a permutation of range(num_samples), a pure function of its arguments."""
    if not shuffle:
        return np.arange(num_samples, dtype=np.int64)
    generator = np.random.Generator(np.random.PCG64(np.random.SeedSequence([seed, epoch])))
    return generator.permutation(num_samples).astype(np.int64)


def _keep(order: Order, multiple: int) -> Order:
    return order


def _drop(order: Order, multiple: int) -> Order:
    return order[: len(order) // multiple * multiple]


def _pad(order: Order, multiple: int) -> Order:
    return np.resize(order, -(-len(order) // multiple) * multiple) if len(order) else order


TAILS: Mapping[str, Callable[[Order, int], Order]] = {"keep": _keep, "drop": _drop, "pad": _pad}


class _Epochs:
    """Hold what both samplers share: checked arguments, the epoch, its order, and what is done."""

    def __init__(
        self, num_samples: int, rank: int, size: int, tail: str, shuffle: bool, seed: int
    ) -> None:
        self.num_samples = whole("num_samples", num_samples, 0, "len(dataset)")
        rank, size = whole("rank", rank), whole("size", size)
        if size < 1 or not 0 <= rank < size:
            raise ValueError(f"expected 0 <= rank < size, got rank {rank} of {size}")
        if tail not in TAILS:
            raise ValueError(f"unknown tail {tail!r}, expected one of: {', '.join(TAILS)}")
        self.rank = rank
        self.size = size
        self.tail = tail
        self.shuffle = shuffle
        self.seed = whole("seed", seed, 0)
        self.epoch = 0
        self.done = 0

    def set_epoch(self, epoch: int, done: int = 0) -> None:
        """Choose the epoch whose order iterations deal from now on; the same on every rank.

        done: how much of what this rank is dealt in it they leave out, batches of a
            GlobalBatchSampler, samples of a ShardSampler: what has been trained on before a run
            that goes on in the middle of an epoch. Batches are the same for any number of ranks.

        Raises: ValueError for negative numbers, and for more done than this rank is dealt.
        """
        epoch, done = whole("epoch", epoch, 0), whole("done", done, 0)
        if done > self._count():
            raise ValueError(f"expected done <= {self._count()}, all of an epoch, got {done}")
        self.epoch, self.done = epoch, done

    def _count(self) -> int:
        """Return how much this rank is dealt in a whole epoch."""
        raise NotImplementedError

    def __len__(self) -> int:
        return self._count() - self.done

    def _dealt(self, multiple: int) -> Order:
        order = epoch_order(self.num_samples, self.epoch, self.seed, self.shuffle)
        return TAILS[self.tail](order, multiple)


class ShardSampler(_Epochs):
    """Iterate over the sample indices of one rank: a contiguous part of the epoch's order.

    `tail` says what happens when the ranks do not divide the samples:

    - "drop" (default, for training): the last num_samples % size of the order are left out, other
      ones every epoch; every rank gets the same number, none gets a sample twice;
    - "pad": the order is continued from its start until the ranks divide it, so that all ranks get
      the same number and every sample is seen, up to size - 1 of them twice or more;
    - "keep" (for evaluation): every sample exactly once; the first ranks get one sample more, so
      weigh a metric by its true count. Unequal numbers of batches must not meet a collective.

    shuffle: draw a new order in every epoch, from (seed, epoch); the same `seed` on every rank.
    Without it the parts of all ranks, concatenated by rank, are the data set in its order.
    """

    def __init__(
        self,
        num_samples: int,
        rank: int,
        size: int,
        *,
        tail: str = "drop",
        shuffle: bool = True,
        seed: int = 0,
    ) -> None:
        super().__init__(num_samples, rank, size, tail, shuffle, seed)

    @classmethod
    def evaluation(cls, num_samples: int, rank: int, size: int) -> ShardSampler:
        """Deal every sample exactly once, in the order of the data set."""
        return cls(num_samples, rank, size, tail="keep", shuffle=False)

    def __iter__(self) -> Iterator[int]:
        order = self._dealt(self.size)
        first, end = bounds(len(order), self.size, self.rank)
        return iter(order[first + self.done : end].tolist())

    def _count(self) -> int:
        total = len(TAILS[self.tail](np.arange(self.num_samples, dtype=np.int64), self.size))
        first, end = bounds(total, self.size, self.rank)
        return end - first


class GlobalBatchSampler(_Epochs):
    """Iterate over this rank's part of every global batch, a list of indices each.

    The global batch of a step is batch_size consecutive samples of the epoch's order, whatever the
    number of ranks: rank r holds its r-th contiguous part, so the parts of all ranks, concatenated
    by rank, are the batch that one process alone would see. Use `mesh.data.rank` and
    `mesh.data.size` with a mesh. Every rank yields the same number of batches.

    `tail`: "drop" (default) leaves a last incomplete batch out; "keep" deals it, and a rank's part
    may then be shorter than the others', or empty, which a DataLoader cannot collate without
    `NoneIfEmpty`: weigh the loss by true counts; "pad" completes it from the start of the order.
    ValueError if size does not divide batch_size, unless `uneven=True`, with which the first ranks
    hold one sample more.

    shuffle, seed: as in ShardSampler.
    """

    def __init__(
        self,
        num_samples: int,
        batch_size: int,
        rank: int,
        size: int,
        *,
        tail: str = "drop",
        shuffle: bool = True,
        seed: int = 0,
        uneven: bool = False,
    ) -> None:
        super().__init__(num_samples, rank, size, tail, shuffle, seed)
        batch_size = whole("batch_size", batch_size, 1)
        if batch_size % size and not uneven:
            raise ValueError(f"global batch of {batch_size} is not divisible by {size} ranks")
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        order = self._dealt(self.batch_size)
        for start in range(self.done * self.batch_size, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            first, end = bounds(len(batch), self.size, self.rank)
            yield batch[first:end].tolist()

    def _count(self) -> int:
        whole, rest = divmod(self.num_samples, self.batch_size)
        return whole + (rest > 0 and self.tail != "drop")


@dataclass(frozen=True)
class NoneIfEmpty:
    """Collate the samples of a DataLoader's batch, to None where there are none.

        loader = DataLoader(data, batch_sampler=sampler, collate_fn=NoneIfEmpty())
        for batch in loader:
            with model.weighted(0 if batch is None else len(batch)):
                if batch is None:
                    model.reduce_gradients()
                else:
                    loss(model(batch)).backward()

    collate: what a batch with samples is given to; torch's default_collate if None.
    """

    collate: Callable[[Sequence[Any]], Any] | None = None

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch."""
        if not samples:
            return None
        if self.collate is not None:
            return self.collate(samples)
        from torch.utils.data import default_collate

        return default_collate(list(samples))
