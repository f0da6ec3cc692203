"""Parameters that are frozen, used by some ranks only, or by none."""

import pytest
import torch
from scalars import Scalars, grad
from torch import nn

from ringfold import DataParallel, run_local


@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
@pytest.mark.parametrize("set_to_none", [True, False])
def test_pr14_gradient_on_some_ranks_only(bucket_bytes, set_to_none):
    """Ranks that had a gradient reduced a differently packed buffer than those that had none."""

    def main(comm):
        module = Scalars(a=1, b=1)
        model = DataParallel(module, comm, bucket_bytes=bucket_bytes)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        seen = []
        for functions in (
            (lambda m: 2 * m.a, lambda m: 4 * m.a + 6 * m.b),
            (lambda m: 8 * m.b, lambda m: 2 * m.a),
        ):
            optimizer.zero_grad(set_to_none=set_to_none)
            model(functions[comm.rank]).backward()
            optimizer.step()
            seen.append((grad(module.a), grad(module.b), module.a.item(), module.b.item()))
        return seen

    for first, second in run_local(2, main):
        assert first == (3.0, 3.0, pytest.approx(0.7), pytest.approx(0.7))
        assert second[:2] == (1.0, 4.0)


def test_parameter_used_on_no_rank_keeps_no_gradient():
    def main(comm):
        module = Scalars(a=1, b=1, c=1)
        model = DataParallel(module, comm)
        model(lambda m: 2.0 * (comm.rank + 1) * m.b).backward()
        return grad(module.a), grad(module.b), grad(module.c), model.last_step.unused

    for a, b, c, unused in run_local(3, main):
        assert (a, b, c) == (None, 4.0, None)
        assert sorted(unused) == ["a", "c"]


def test_pr18_frozen_and_unfrozen_while_training():
    """Parameters unfrozen after wrapping trained separately on each rank, silently."""

    def main(comm):
        module = Scalars(a=1, b=1)
        module.b.requires_grad_(False)
        model = DataParallel(module, comm)
        assert not module.b.requires_grad
        seen = []

        def step(xb):
            module.zero_grad()
            model(lambda m: m.a * (1, 3)[comm.rank] + m.b * xb[comm.rank]).backward()
            seen.append((grad(module.a), grad(module.b), model.last_step.reductions))

        step((2, 6))
        module.b.requires_grad_(True)
        step((2, 6))
        step((2, 6))
        module.a.requires_grad_(False)
        step((1, 5))
        step((1, 5))
        return seen

    for seen in run_local(2, main):
        assert [pair[:2] for pair in seen] == [(2, None), (2, 4), (2, 4), (None, 3), (None, 3)]
        assert [pair[2] for pair in seen] == [1, 2, 1, 1, 1]


def test_pr18_everything_frozen_then_unfrozen():
    def main(comm):
        module = Scalars(a=1)
        module.a.requires_grad_(False)
        model = DataParallel(module, comm)
        module.a.requires_grad_(True)
        model(lambda m: m.a * (1, 3)[comm.rank]).backward()
        return grad(module.a)

    assert run_local(2, main) == [2.0, 2.0]


def test_pr18_unfrozen_on_one_rank_is_refused_on_all():
    def main(comm):
        module = Scalars(a=1, b=1)
        module.b.requires_grad_(False)
        model = DataParallel(module, comm)
        module.b.requires_grad_(comm.rank == 1)
        with pytest.raises(ValueError) as caught:
            model(lambda m: m.a + m.b).backward()
        return str(caught.value)

    assert (
        run_local(2, main)
        == [
            "requires_grad of the parameters differ between ranks, first at entry 1: "
            "b frozen on rank 0; b trainable on rank 1"
        ]
        * 2
    )


def test_gradient_without_its_accumulation_is_not_reduced():
    def main(comm):
        module = Scalars(w=2)
        model = DataParallel(module, comm)
        if comm.rank == 0:
            (value,) = torch.autograd.grad(model(lambda m: m.w * m.w), [module.w])
            assert float(value) == 4.0
        return model.last_step

    assert run_local(2, main) == [None, None]


def test_frozen_on_some_ranks_only_is_refused_at_once():
    """The buckets of such ranks held other parameters."""

    def main(comm):
        module = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False))
        module[0 if comm.rank == 1 else 1].requires_grad_(False)
        told = (
            r"0\.weight \(2, 2\) float32 on ranks 0, 2; 0\.weight \(2, 2\) float32 frozen on rank 1"
        )
        with pytest.raises(ValueError, match=told):
            DataParallel(module, comm)
        return True

    assert all(run_local(3, main))
