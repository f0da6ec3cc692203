"""Gradients of several backwards, and of samples that count unequally, until they are reduced."""

import pytest
import torch
from scalars import Scalars, grad
from torch.utils.data import DataLoader

from ringfold import DataParallel, run_local
from ringfold.parallel import GlobalBatchSampler, NoneIfEmpty


def around_both(model, loss):
    with model.no_sync():
        loss().backward()


def around_backward(model, loss):
    value = loss()
    with model.no_sync():
        value.backward()


def by_flag(model, loss):
    model.synchronize = False
    loss().backward()


@pytest.mark.parametrize("accumulate", [around_both, around_backward, by_flag])
@pytest.mark.parametrize("forward_inside", [False, True])
def test_pr15_last_micro_step_reduces_the_whole_sum(accumulate, forward_inside):
    """The flag was read during forward, so the last micro-step reduced nothing, or its own part."""

    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm)
        counted = []
        channel = model._channel
        allreduce = channel.allreduce
        channel.allreduce = lambda *a, **k: counted.append(a) or allreduce(*a, **k)
        inputs = [(1, 2, 3), (10, 20, 30)][comm.rank]
        for x in inputs[:2]:
            accumulate(model, lambda x=x: model(lambda m: m.w * x))
        assert not counted
        model.synchronize = not forward_inside
        last = model(lambda m: m.w * inputs[2])
        model.synchronize = True
        last.backward()
        return grad(module.w), len(counted), model.last_step.reductions

    assert run_local(2, main) == [(33.0, 1, 1)] * 2


def test_no_sync_is_restored_after_an_error():
    def main(comm):
        model = DataParallel(Scalars(w=1), comm)
        with pytest.raises(KeyError), model.no_sync():
            raise KeyError
        return model.synchronize

    assert run_local(2, main) == [True, True]


def test_pr16_weights_give_the_mean_over_samples():
    """The mean of the ranks' means counted samples of the emptier rank more."""

    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm)
        samples = torch.tensor([[1.0, 2.0, 3.0], [10.0]][comm.rank])

        def step(samples, weight):
            module.zero_grad()
            with model.weighted(weight):
                model(lambda m: (m.w * samples).mean()).backward()
            return grad(module.w)

        found = [step(samples, len(samples))]
        valid = samples if comm.rank == 0 else samples[:0]
        found.append(step(valid, len(valid)))
        found.append(step(valid, 0))
        module.zero_grad()
        model(lambda m: (m.w * samples).mean()).backward()
        return [*found, grad(module.w)]

    assert run_local(2, main) == [[4.0, 2.0, 0.0, 6.0]] * 2


def test_weights_that_are_tensors():
    """As the number of a mask's elements is; their shares were rounded to float32."""

    def main(comm):
        model = DataParallel(Scalars(w=1).double(), comm)
        count = torch.ones(comm.rank + 1).bool().sum()
        with model.weighted(count):
            model(lambda m: m.w * (comm.rank + 1)).backward()
        return grad(model.module.w), model.loss_factor(count)

    exact = pytest.approx(5 / 3, rel=1e-15)
    assert run_local(2, main) == [(exact, 2 / 3), (exact, 4 / 3)]


@pytest.mark.parametrize("size", [1, 2])
def test_bad_weight(size):
    """One rank took any, and went on with it."""

    def main(comm):
        model = DataParallel(Scalars(w=1), comm)
        with pytest.raises(ValueError, match="finite weight >= 0, got -1"), model.weighted(-1):
            model(lambda m: m.w * 1).backward()

    run_local(size, main)


def test_a_bad_weight_of_one_rank_is_told_to_every_rank():
    def main(comm):
        module = Scalars(a=1, b=1)
        model = DataParallel(module, comm, bucket_bytes=1)
        bad = float("nan") if comm.rank == 1 else 1.0
        told = "expected a finite weight >= 0, got nan on rank 1"
        with pytest.raises(ValueError, match=told), model.weighted(bad):
            model(lambda m: m.a * m.b).backward()
        with pytest.raises(ValueError, match=told):
            model.loss_factor(bad)
        model.zero_grad()
        with model.weighted(comm.rank):
            model(lambda m: m.a * m.b * comm.rank).backward()
        return grad(module.a)

    assert run_local(3, main) == [pytest.approx(5 / 3)] * 3


@pytest.mark.parametrize("collate", [None, torch.stack])
def test_a_last_batch_of_which_ranks_get_nothing(collate):
    """torch's default_collate raises IndexError on an empty part."""
    samples = torch.linspace(-1, 2, 9)[:, None]

    def main(comm):
        model = DataParallel(Scalars(w=1), comm)
        sampler = GlobalBatchSampler(9, 8, comm.rank, comm.size, tail="keep", uneven=True)
        loader = DataLoader(samples, batch_sampler=sampler, collate_fn=NoneIfEmpty(collate))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        empty = 0
        for batch in loader:
            optimizer.zero_grad()
            with model.weighted(0 if batch is None else len(batch)):
                if batch is None:
                    empty += 1
                    model.reduce_gradients()
                else:
                    model(lambda scalars, x=batch: (scalars.w * x).square().mean()).backward()
            optimizer.step()
        return model.module.w.item(), empty

    [(alone, _)] = run_local(1, main)
    for size in (2, 3):
        found = run_local(size, main)
        assert [w for w, _ in found] == pytest.approx([alone] * size)
        assert [empty for _, empty in found] == [0] + [1] * (size - 1)
