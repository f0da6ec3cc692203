"""Workloads: the same global batches for any number of ranks, and nothing drawn from elsewhere."""

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits

from ringfold.parallel.sampler import GlobalBatchSampler
from ringfold.workloads import WORKLOADS, load
from ringfold.workloads.digits import images
from ringfold.workloads.linear import Linear, rows, uniform
from ringfold.workloads.text import Text, unigram_entropy
from ringfold.workloads.workload import Share, cosine

BATCH = 12


def epoch(make, size, number=0):
    """Join the shares of all data ranks, batch by batch."""
    shares = [list(make(Share(BATCH, rank, size, 5)).batches(number)) for rank in range(size)]
    return [
        tuple(torch.cat([member[i] for member in parts]) for i in range(2))
        for parts in zip(*shares, strict=True)
    ]


def small_linear(share):
    return Linear(share, num_rows=130)


def small_text(share):
    return Text(share, np.arange(60_000).astype(np.uint8) * np.uint8(7))


def test_the_digits_are_those_of_scikit_learn():
    found = load_digits()
    pixels, labels = images()
    np.testing.assert_array_equal(pixels[:, 0] * 16, found.images)
    np.testing.assert_array_equal(labels, found.target)


@pytest.mark.parametrize("make", [small_linear, small_text, lambda s: load("digits").data(s)])
@pytest.mark.parametrize("size", [2, 3, 4])
def test_a_global_batch_holds_the_same_samples_for_any_number_of_ranks(make, size):
    for number in (0, 1):
        alone, together = epoch(make, 1, number), epoch(make, size, number)
        assert len(alone) == len(together) > 2
        for one, other in zip(alone, together, strict=True):
            for a, b in zip(one, other, strict=True):
                assert torch.equal(a, b)
    assert not torch.equal(epoch(make, 1, 0)[0][0], epoch(make, 1, 1)[0][0])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_evaluation_counts_each_sample_once(size):
    workload = load("digits")
    sums = np.zeros(2)
    for rank in range(size):
        data = workload.data(Share(BATCH, rank, size, 0))
        sums += data.evaluate(lambda x: torch.eye(10)[torch.zeros(len(x), dtype=torch.int64)])
    labels = data.test[1]
    assert sums.tolist() == [int((labels == 0).sum()), 360]


def test_rows_are_a_function_of_seed_and_number():
    numbers = np.array([5, 9_999_999, 0])
    x, y = rows(3, numbers)
    for place, number in enumerate(numbers):
        alone = rows(3, numbers[place : place + 1])
        assert number in numbers and (alone[0] == x[place]).all() and (alone[1] == y[place]).all()
    assert not (rows(4, numbers)[0] == x).any()


def test_uniform_fills_its_interval():
    drawn = uniform(0, np.arange(100_000, dtype=np.uint64))
    assert drawn.min() >= -1 and drawn.max() < 1
    counts = np.histogram(drawn, 10, (-1, 1))[0]
    assert abs(counts - 10_000).max() < 500


def test_entropy_of_single_bytes():
    assert unigram_entropy(np.array([0, 1, 2, 3] * 5, np.uint8)) == 2
    assert unigram_entropy(np.zeros(9, np.uint8)) == 0


def test_decay():
    assert cosine(0) == 1 and cosine(0.5) == pytest.approx(0.5) and cosine(1) == pytest.approx(0)


@pytest.mark.parametrize("name", WORKLOADS)
def test_layers_take_one_batch(name):
    workload = load(name)
    torch.manual_seed(0)
    model = torch.nn.Sequential(*workload.layers())
    if name != "linear":
        x, y = next(iter(workload.data(Share(4, 0, 1, 0)).batches(0)))
        loss = workload.loss(model(x), y)
        assert loss.ndim == 0 and loss.isfinite()
    assert sum(p.numel() for p in model.parameters()) < 2_000_000


def test_sampler_drops_only_the_ragged_end():
    sampler = GlobalBatchSampler(100, BATCH, 0, 1, seed=0)
    assert len(sampler) == 100 // BATCH
