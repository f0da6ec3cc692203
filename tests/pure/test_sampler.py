"""Every sample goes to exactly one rank, once; a global batch does not depend on the ranks."""

from itertools import chain

import pytest

from ringfold.parallel.sampler import GlobalBatchSampler, NoneIfEmpty, ShardSampler, epoch_order

COUNTS = (0, 1, 2, 3, 9, 10, 12)
RANKS = (1, 2, 3, 4)


def every_rank(num_samples, size, **options):
    return [list(ShardSampler(num_samples, rank, size, **options)) for rank in range(size)]


@pytest.mark.parametrize("num_samples", COUNTS)
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("batch_size", [1, 4, 5])
def test_pr27_evaluation_sees_each_sample_once(num_samples, size, batch_size):
    """Padding an evaluation repeated samples, so the accuracy depended on the number of ranks."""
    gathered, right, seen = [], 0, 0
    for rank in range(size):
        indices = list(ShardSampler.evaluation(num_samples, rank, size))
        for start in range(0, len(indices), batch_size):
            batch = indices[start : start + batch_size]
            right += sum(index in (0, 1) for index in batch)
            seen += len(batch)
            gathered += batch
    assert gathered == list(range(num_samples))
    assert (right, seen) == (min(num_samples, 2), num_samples)


def test_pr27_ten_samples_on_three_ranks():
    parts = [list(ShardSampler.evaluation(10, rank, 3)) for rank in range(3)]
    assert [len(part) for part in parts] == [4, 3, 3]
    assert sum(index in (0, 1) for part in parts for index in part) / 10 == 0.2


@pytest.mark.parametrize("num_samples", COUNTS)
@pytest.mark.parametrize("size", RANKS)
@pytest.mark.parametrize("shuffle", [False, True])
def test_training_drops_or_pads_as_documented(num_samples, size, shuffle):
    dropped = every_rank(num_samples, size, tail="drop", shuffle=shuffle)
    seen = [index for part in dropped for index in part]
    assert len(seen) == len(set(seen)) == num_samples // size * size
    padded = every_rank(num_samples, size, tail="pad", shuffle=shuffle)
    assert len({len(part) for part in padded}) == 1
    seen = [index for part in padded for index in part]
    assert set(seen) == set(range(num_samples))
    assert len(seen) == -(-num_samples // size) * size


@pytest.mark.parametrize("tail", ["keep", "drop", "pad"])
@pytest.mark.parametrize("num_samples", COUNTS)
@pytest.mark.parametrize("size", RANKS)
def test_length_is_what_iteration_yields(tail, num_samples, size):
    for rank in range(size):
        shard = ShardSampler(num_samples, rank, size, tail=tail)
        assert len(shard) == len(list(shard))
        batches = GlobalBatchSampler(num_samples, 2 * size, rank, size, tail=tail)
        assert len(batches) == len(list(batches))


def test_epochs_differ_and_repeat_by_seed():
    sampler = ShardSampler(50, 0, 2, seed=3)
    first = list(sampler)
    sampler.set_epoch(1)
    second = list(sampler)
    sampler.set_epoch(0)
    assert first == list(sampler) != second
    assert first != list(ShardSampler(50, 0, 2, seed=4))
    assert sorted(epoch_order(50, 1, 3, True)) == list(range(50))


@pytest.mark.parametrize("tail", ["keep", "drop", "pad"])
@pytest.mark.parametrize("num_samples", [0, 1, 11, 12, 13, 40])
def test_global_batch_holds_the_same_samples_on_every_grid(tail, num_samples):
    alone = list(GlobalBatchSampler(num_samples, 12, 0, 1, tail=tail, seed=5))
    for size in (2, 3, 4, 6):
        ranks = [
            list(GlobalBatchSampler(num_samples, 12, rank, size, tail=tail, seed=5))
            for rank in range(size)
        ]
        assert [list(chain(*parts)) for parts in zip(*ranks, strict=True)] == alone


def test_global_batches_cover_the_epoch_once():
    batches = list(GlobalBatchSampler(23, 5, 0, 1, tail="keep"))
    assert sorted(chain(*batches)) == list(range(23))
    assert [len(batch) for batch in batches] == [5, 5, 5, 5, 3]


@pytest.mark.parametrize("tail", ["keep", "drop", "pad"])
def test_an_epoch_goes_on_in_the_middle_on_another_number_of_ranks(tail):
    alone = GlobalBatchSampler(23, 6, 0, 1, tail=tail, seed=5)
    alone.set_epoch(3)
    batches = list(alone)
    for done in range(len(batches) + 1):
        parts = []
        for rank in range(3):
            sampler = GlobalBatchSampler(23, 6, rank, 3, tail=tail, seed=5)
            sampler.set_epoch(3, done=done)
            parts.append(list(sampler))
            assert len(sampler) == len(parts[-1]) == len(list(sampler)) == len(batches) - done
        assert [list(chain(*row)) for row in zip(*parts, strict=True)] == batches[done:]
        shard, whole = (ShardSampler(23, 1, 3, tail=tail, seed=5) for _ in range(2))
        shard.set_epoch(0, done=done)
        assert list(shard) == list(whole)[done:] and len(shard) == len(whole) - done
        shard.set_epoch(0)
        assert list(shard) == list(whole)


def test_uneven_parts_only_when_asked_for():
    with pytest.raises(ValueError, match="global batch of 10 is not divisible by 4 ranks"):
        GlobalBatchSampler(100, 10, 0, 4)
    parts = [next(iter(GlobalBatchSampler(100, 10, r, 4, uneven=True))) for r in range(4)]
    assert [len(part) for part in parts] == [3, 3, 2, 2]


def test_padding_more_ranks_than_samples_repeats_the_order():
    assert every_rank(2, 5, tail="pad", shuffle=False) == [[0], [1], [0], [1], [0]]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0, 1), "num_samples >= 0, got -1"),
        ((5, 2, 2), "rank 2 of 2"),
        ((5, -1, 2), "rank -1 of 2"),
        ((5, 0, 0), "rank 0 of 0"),
    ],
)
def test_bad_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ShardSampler(*arguments)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (
            lambda: ShardSampler([1, 2], 0, 1),
            r"^num_samples: expected a whole number, such as len\(dataset\), got a list",
        ),
        (lambda: ShardSampler(5, 0, 1, seed=0.5), "^seed: expected a whole number, got 0.5"),
        (lambda: GlobalBatchSampler(5, 2.0, 0, 1), "^batch_size: expected a whole number, got 2.0"),
        (lambda: ShardSampler(5, 0, 1).set_epoch(1.5), "^epoch: expected a whole number, got 1.5"),
    ],
)
def test_what_is_no_whole_number_is_refused_at_once(make, told):
    """It was an error of NumPy's in the first iteration."""
    with pytest.raises(TypeError, match=told):
        make()


def test_a_collate_of_ones_own_is_given_the_samples():
    """torch.stack, by which it was tested, does what the default does."""
    assert NoneIfEmpty(tuple)([1, 2]) == (1, 2) and NoneIfEmpty(tuple)([]) is None


def test_unknown_tail():
    with pytest.raises(ValueError, match="unknown tail 'wrap', expected one of: keep, drop, pad"):
        ShardSampler(5, 0, 1, tail="wrap")


def test_bad_batch_size_and_epoch():
    with pytest.raises(ValueError, match="batch_size >= 1, got 0"):
        GlobalBatchSampler(5, 0, 0, 1)
    with pytest.raises(ValueError, match="epoch >= 0, got -1"):
        ShardSampler(5, 0, 1).set_epoch(-1)
    with pytest.raises(ValueError, match="seed >= 0, got -1"):
        ShardSampler(5, 0, 1, seed=-1)
    with pytest.raises(ValueError, match="done <= 3, all of an epoch, got 4"):
        GlobalBatchSampler(7, 2, 0, 1).set_epoch(0, done=4)
