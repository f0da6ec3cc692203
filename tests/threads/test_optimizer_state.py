"""After a resume on one rank, every optimizer is that rank's, in values, types and dtypes."""

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adam

from ringfold import ShardedOptimizer, run_local
from ringfold.parallel.objects import allgather_objects
from ringfold.parallel.optimizer_state import broadcast_optimizer


def parameters():
    made = [nn.Parameter(torch.ones(n)) for n in (2, 3, 1)]
    made[2].requires_grad_(False)
    return made


def groups(made):
    return [{"params": [made[0]]}, {"params": made[1:]}]


def step(optimizer, made):
    for parameter in made[:2]:
        parameter.grad = torch.full_like(parameter, 2.0)
    optimizer.step()


@pytest.mark.parametrize("root", [0, 1])
def test_pr21_optimizer_sent_from_one_rank(root):
    """The learning rate was not sent, scalars changed their types, missing state raised errors."""

    def main(comm):
        made = parameters()
        is_root = comm.rank == root
        optimizer = Adam(groups(made), lr=0.05 if is_root else 0.1)
        if is_root:
            optimizer.param_groups[1]["lr"] = 0.005
            optimizer.param_groups[1]["initial_lr"] = 0.5
            for _ in range(3):
                step(optimizer, made)
        for parameter in made:
            comm.broadcast(parameter.detach(), root=root)
        broadcast_optimizer(optimizer, comm, root)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == [0.05, 0.005] and all(type(rate) is float for rate in rates)
        assert "initial_lr" not in optimizer.param_groups[0]
        assert optimizer.param_groups[1]["params"][0] is made[1]
        assert set(optimizer.state) == set(made[:2])
        for parameter in made[:2]:
            entry = optimizer.state[parameter]
            assert type(entry["step"]) is torch.Tensor and entry["step"].dtype == torch.float32
            assert entry["step"].item() == 3 and entry["step"].shape == ()
            assert entry["exp_avg"].tolist() == pytest.approx([0.542] * len(parameter), rel=1e-6)
            assert entry["exp_avg_sq"].tolist() == pytest.approx(
                [0.011988004] * len(parameter), rel=1e-6
            )
        state = [{k: v.clone() for k, v in optimizer.state[p].items()} for p in made[:2]]
        step(optimizer, made)
        return state, [p.detach() for p in made]

    results = run_local(2, main)
    for one, two in zip(*(state for state, _ in results), strict=True):
        assert all(torch.equal(one[key], two[key]) for key in one)
    assert all(map(torch.equal, results[0][1], results[1][1]))


def test_pr21_no_state_partial_state_and_other_values():
    def main(comm):
        made = parameters()
        optimizer = SGD(groups(made), lr=0.05 if comm.rank == 0 else 0.1)
        broadcast_optimizer(optimizer, comm)
        assert [group["lr"] for group in optimizer.param_groups] == [0.05, 0.05]
        assert not optimizer.state
        optimizer = SGD(groups(made), lr=torch.tensor(0.5 + comm.rank), momentum=0.9)
        if comm.rank == 0:
            made[0].grad = torch.ones(2)
            optimizer.step()
            optimizer.param_groups[0]["schedule"] = [1, (2, "a"), None]
            optimizer.state["calls"] = 7
            optimizer.state[made[1]]["half"] = torch.ones(3, 2, dtype=torch.bfloat16).t()
        else:
            optimizer.state[made[2]]["left"] = 1
        broadcast_optimizer(optimizer, comm)
        assert optimizer.param_groups[0]["lr"].tolist() == 0.5
        assert optimizer.param_groups[0]["schedule"] == [1, (2, "a"), None]
        assert set(optimizer.state) == {made[0], made[1], "calls"}
        assert optimizer.state[made[1]]["half"].dtype == torch.bfloat16
        return optimizer.state[made[0]]["momentum_buffer"].tolist()

    assert run_local(3, main) == [[1.0, 1.0]] * 3


def test_different_optimizers_are_refused_on_all_ranks():
    def main(comm):
        made = parameters()
        optimizer = (Adam if comm.rank else SGD)(groups(made), lr=0.1)
        with pytest.raises(ValueError, match=r"SGD, group 0: \(2,\) float32 on rank 0; Adam"):
            broadcast_optimizer(optimizer, comm)
        with pytest.raises(ValueError, match="root from 0 to 1, got 2"):
            broadcast_optimizer(optimizer, comm, root=2)

    run_local(2, main)


def test_a_sharded_optimizer_and_entries_without_a_pickle_are_refused_on_all_ranks():
    """The first was taken and nothing sent; of the second only root heard."""

    def main(comm):
        made = parameters()
        optimizer = SGD(groups(made), lr=0.1 + comm.rank)
        optimizer.param_groups[0]["schedule"] = lambda step: step
        with pytest.raises(TypeError, match=r"value of rank 1 cannot .*lambda") as caught:
            broadcast_optimizer(optimizer, comm, root=1)
        assert (caught.value.__cause__ is not None) == (comm.rank == 1)
        assert optimizer.param_groups[0]["lr"] == 0.1 + comm.rank
        named = [(str(i), p) for i, p in enumerate(parameters())]
        with pytest.raises(TypeError, match="ShardedOptimizer holds a part of the state on each"):
            broadcast_optimizer(ShardedOptimizer(named, comm, Adam), comm)
        values = [comm.rank, (lambda: None) if comm.rank == 1 else None]
        with pytest.raises(TypeError, match="value of rank 1 cannot be sent"):
            allgather_objects(values, comm)
        return allgather_objects(values[:1], comm)

    assert run_local(3, main) == [[[0], [1], [2]]] * 3


def test_state_lies_in_memory_as_the_parameters_do():
    """Fused optimizers mixed up the elements of what other ranks than root had received."""

    def main(comm):
        image = torch.arange(48.0).reshape(2, 3, 2, 4).to(memory_format=torch.channels_last)
        made = [nn.Parameter(image), nn.Parameter(torch.arange(6.0).reshape(2, 3).t())]
        optimizer = Adam(made, lr=0.1, fused=True)
        for _ in range(1 + comm.rank):
            for parameter in made:
                parameter.grad = parameter.detach() * (comm.rank + 1)
            optimizer.step()
        broadcast_optimizer(optimizer, comm, root=1)
        found = [optimizer.state[p]["exp_avg"] for p in made]
        assert [t.stride() for t in found] == [p.stride() for p in made]
        return found

    results = run_local(2, main)
    assert all(map(torch.equal, *results))
