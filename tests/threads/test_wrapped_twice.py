"""Several wrappers over one communicator, which ranks may reach in different orders."""

import numpy as np
import pytest
from scalars import Scalars, grad

from ringfold import DataParallel, NotFinite, Settings, run_local


def test_wrappers_over_one_communicator_reduce_in_one_backward():
    """A generator and its critic whose bias one rank uses: each got the other's gradients."""

    def main(comm):
        first, second = Scalars(w=2, shift=0), Scalars(w=3, bias=1)
        generator, critic = (DataParallel(m, comm, bucket_bytes=1) for m in (first, second))
        for step in range(3):
            generator.zero_grad()
            critic.zero_grad()
            made = generator(lambda m: m.w * (comm.rank + 1.0) + m.shift)
            score = critic(lambda m, x=made: m.w * x + (m.bias if comm.rank == 0 else 0))
            (score * (step + 1)).backward()
            grads = [grad(p) for p in (first.w, first.shift, second.w, second.bias)]
            assert grads == [n * (step + 1) for n in (4.5, 3.0, 3.0, 0.5)]
        critic.close()
        first.zero_grad()
        generator(lambda m: m.w * comm.rank).backward()
        critic(lambda m: m.w * comm.rank).backward()
        return grad(first.w), grad(second.w), comm.allreduce(np.ones(1)).item()

    assert run_local(2, main) == [(0.5, 9.0, 2.0), (0.5, 10.0, 2.0)]


@pytest.mark.parametrize("groups", ["one", "each"])
@pytest.mark.parametrize("check_finite", [False, True])
def test_wrappers_that_ranks_reach_in_different_orders(check_finite, groups):
    """Each rank waited for the other in another wrapper."""

    def main(comm):
        modules = [Scalars(a=2, b=3) for _ in range(3)]
        comms = [comm, comm.split(0), comm.split(0)] if groups == "each" else [comm] * 3
        models = [
            DataParallel(module, own, check_finite=check_finite)
            for module, own in zip(modules, comms, strict=True)
        ]
        for step in range(3):
            for model in models:
                model.zero_grad()
            shifted = models[comm.rank :] + models[: comm.rank]
            bad = check_finite and step == 1 and comm.rank == 2
            losses = [model(lambda m: m.a * m.b * (comm.rank + 1)) for model in shifted]
            loss = sum(losses) * (float("nan") if bad else 1.0)
            if check_finite and step == 1:
                with pytest.raises(NotFinite, match="rank 2"):
                    loss.backward()
            else:
                loss.backward()
                assert [(grad(m.a), grad(m.b)) for m in modules] == [(6.0, 4.0)] * 3

    run_local(3, main)


def test_a_rank_without_a_batch_does_not_wait_for_what_is_frozen():
    """As for a critic in its generator's step, to which no other rank's backward comes."""

    def main(comm):
        first, second = Scalars(w=2), Scalars(w=3)
        models = [DataParallel(module, comm) for module in (first, second)]
        for step in range(4):
            for model in models:
                model.zero_grad()
            second.requires_grad_(step % 2 == 0)
            if comm.rank == 1 and step < 3:
                for model in models:
                    model.reduce_gradients()
            else:
                made = models[0](lambda m: m.w * 1)
                models[1](lambda m, x=made: m.w * x).backward()
            mean = 2 if step == 3 else 1
            assert grad(first.w) == 1.5 * mean
            assert grad(second.w) == (1.0 * mean if step % 2 == 0 else None)

    run_local(2, main, settings=Settings(timeout=60))


def test_weighted_wrappers_that_ranks_reach_in_different_orders():
    """A rank waited in backward for weights that another told only once its own had ended."""

    def main(comm):
        first, second = modules = [Scalars(a=2, b=3) for _ in range(2)]
        models = [DataParallel(module, comm, bucket_bytes=1) for module in modules]
        for step in range(4):
            for model in models:
                model.zero_grad()
            with models[0].weighted(comm.rank + 1), models[1].weighted(3 - comm.rank):
                if step == 2 and comm.rank == 1:
                    for model in models:  # the other rank's backward comes to the second first
                        model.reduce_gradients()
                else:
                    reached = models[:: 1 - 2 * comm.rank]
                    sum(m(lambda m: m.a * m.b * (comm.rank + 1)) for m in reached).backward()
            by_two = [3 * r + 3 for r in range(2)] if step != 2 else [3, 0]
            assert grad(first.a) == pytest.approx((by_two[0] + 2 * by_two[1]) / 3)
            assert grad(second.a) == pytest.approx((3 * by_two[0] + 2 * by_two[1]) / 5)

    run_local(2, main, settings=Settings(timeout=60))
