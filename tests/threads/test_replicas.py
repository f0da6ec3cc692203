"""Replicas begin equal, stay equal, and are refused by name where they cannot."""

import copy
import io
import pickle
import re
import subprocess
import sys

import pytest
import torch
from scalars import SIZES, Scalars, data, grad
from torch import nn

from ringfold import DataParallel, run_local


def test_pr20_deepcopy_and_pickle_are_independent():
    """Wrappers held communicators and hooks, which could not be copied, or were copied along."""

    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm)

        def step():
            module.zero_grad()
            model(lambda m: m.w * (1, 3)[comm.rank]).backward()
            return grad(module.w), model.last_step.reductions

        found = [step()]
        module.zero_grad()
        twin = copy.deepcopy(model)
        buffer = io.BytesIO()
        torch.save(model, buffer)
        loaded = torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
        unpickled = pickle.loads(pickle.dumps(model))
        found.append(step())
        torch.optim.SGD(model.parameters(), lr=1.0).step()
        for other in (twin, loaded, unpickled):
            assert other.comm is None
            assert grad(other.module.w) is None
            assert other.state_dict() == {"w": torch.tensor(1.0)}
        if comm.rank == 0:  # alone: the copy does not communicate
            twin(lambda m: m.w * 5).backward()
            assert grad(twin.module.w) == 5.0
        return found, module.w.item()

    assert run_local(2, main) == [([(2.0, 1), (2.0, 1)], -1.0)] * 2


def test_pr20_what_was_saved_loads_in_a_process_without_ranks(tmp_path):
    def main(comm):
        model = DataParallel(nn.Linear(2, 1), comm, wire="powersgd:1")
        model(torch.ones(1, 2)).sum().backward()
        if comm.rank == 0:
            torch.save(model, tmp_path / "model")
            torch.save(model.state_dict(), tmp_path / "state")
        return model.module.weight.tolist()

    code = """
import sys, torch
model = torch.load(sys.argv[1] + "/model", weights_only=False)
state = torch.load(sys.argv[1] + "/state")
model(torch.ones(1, 2)).sum().backward()
assert "mpi4py" not in sys.modules
assert torch.equal(state["weight"], model.module.weight)
print(model.module.weight.tolist())
"""
    weight = run_local(2, main)[0]
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, timeout=100
    )
    assert done.stdout.strip() == str(weight), done.stderr


def test_pr09_root_of_the_first_broadcast():
    def main(comm):
        module = nn.Linear(3, 2)
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.fill_(comm.rank + 1)
        for root in (3, -1):
            with pytest.raises(ValueError, match=f"root from 0 to 2, got {root}"):
                DataParallel(module, comm, root=root)
        DataParallel(module, comm, root=1)
        return {value for p in module.parameters() for value in p.flatten().tolist()}

    assert run_local(3, main) == [{2.0}] * 3


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda rank: Scalars(**{"ab"[rank == 1]: 1}), r"a \(\) float32 on ranks 0, 2; b \(\)"),
        (lambda rank: nn.Linear(2, 2 + rank % 2), r"weight \(2, 2\) float32 on ranks 0, 2; weight"),
        (
            lambda rank: nn.Linear(2, 2).to(torch.float64 if rank == 2 else torch.float32),
            r"weight \(2, 2\) float32 on ranks 0, 1; weight \(2, 2\) float64 on rank 2",
        ),
        (lambda rank: nn.Linear(2, 2, bias=rank != 0), r"entry 1: nothing on rank 0; bias \(2,\)"),
    ],
)
def test_different_replicas_are_refused_before_anything_is_overwritten(make, message):
    def main(comm):
        module = make(comm.rank)
        before = [p.detach().clone() for p in module.parameters()]
        with pytest.raises(ValueError, match=message):
            DataParallel(module, comm)
        return all(map(torch.equal, before, module.parameters()))

    assert run_local(3, main) == [True] * 3


class Mixed(nn.Module):
    """Every kind of parameter and buffer at once."""

    def __init__(self, rank):
        super().__init__()
        ramp = torch.arange(6.0) + 10 * rank
        self.in_single = nn.Parameter(ramp.clone())
        self.in_double = nn.Parameter(ramp.double())
        self.in_half = nn.Parameter(ramp.to(torch.bfloat16))
        self.in_complex = nn.Parameter(torch.complex(ramp, -ramp))
        self.empty = nn.Parameter(torch.empty(0, 3))
        self.turned = nn.Parameter(ramp.clone().view(2, 3).t())
        self.register_buffer("count", torch.tensor([rank + 1]))
        self.register_buffer("mask", torch.tensor([rank == 0, True]))

    def forward(self, scale):
        parts = (self.in_single, self.in_double, self.in_half, self.in_complex.real, self.empty)
        turned = (self.turned * torch.arange(6.0).view(3, 2)).sum()
        return scale * (sum(part.sum() for part in parts) + turned)


@pytest.mark.parametrize("size", SIZES)
def test_dtypes_layouts_and_buffers(size):
    def main(comm):
        module = Mixed(comm.rank)
        model = DataParallel(module, comm, bucket_bytes=32)
        start = {name: value.clone() for name, value in model.state_dict().items()}
        model(float(comm.rank + 1)).backward()
        return start, {name: p.grad for name, p in module.named_parameters()}

    mean = (size + 1) / 2
    for start, grads in run_local(size, main):
        for name, value in Mixed(0).state_dict().items():
            assert torch.equal(start[name], value)
        for name in ("in_single", "in_double", "in_half"):
            assert grads[name].tolist() == [mean] * 6
        assert grads["in_complex"].tolist() == [complex(mean, 0)] * 6
        assert grads["empty"].shape == (0, 3)
        assert grads["turned"].tolist() == (mean * torch.arange(6.0).view(3, 2)).tolist()


def test_a_buffer_that_is_a_conjugate_or_negative_view_gets_roots_values():
    def main(comm):
        module = nn.Linear(1, 1)
        made = torch.full((3,), complex(1 + comm.rank, 2 + comm.rank)).conj()
        module.register_buffer("conjugate", made)
        module.register_buffer("negative", made.imag)
        model = DataParallel(module, comm, root=1)
        model.check_replicas()
        return module.conjugate.tolist(), module.negative.tolist()

    assert run_local(3, main) == [([2 - 3j] * 3, [-3.0] * 3)] * 3


def test_changed_dtype_is_refused_by_name():
    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm)
        module.double()
        with pytest.raises(TypeError, match="gradient of w: expected float32, got float64"):
            model(lambda m: m.w * 2).backward()

    run_local(2, main)


def test_running_statistics_are_those_of_the_root():
    def main(comm):
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        model = DataParallel(module, comm, root=1)
        alone = copy.deepcopy(module)
        x = data()[0][comm.rank :: 3]
        model(x).sum().backward()
        alone(x)
        return module[1].running_mean, alone[1].running_mean

    results = run_local(3, main)
    assert all(torch.equal(found, results[1][1]) for found, _ in results)
    assert not torch.equal(results[0][1], results[1][1])


class Scaled(nn.Module):
    """A batch normalisation, and a buffer that backward needs."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(5, 3), nn.BatchNorm1d(3)
        self.register_buffer("scale", torch.full((3,), 2.0))

    def forward(self, x):
        return self.norm(self.linear(x) * self.scale)


@pytest.mark.parametrize("training", [True, False])
def test_buffers_of_the_root_leave_other_backwards_alone(training):
    """On all ranks but the root the second backward found a buffer modified."""

    def main(comm):
        module = Scaled().train(training)
        model = DataParallel(module, comm, root=1)
        x = data()[0]
        first, second = model(x[comm.rank :: 3]), model(x[: comm.rank + 2])
        first.square().sum().backward()
        second.square().sum().backward(retain_graph=True)
        second[:, 0].sum().backward()
        return [p.grad for p in module.parameters()], module.norm.running_mean

    results = run_local(3, main)
    for gradients, mean in results:
        assert all(map(torch.equal, gradients, results[0][0]))
        assert torch.equal(mean, results[1][1])


def replace(module):
    module[0].weight = nn.Parameter(torch.ones(1, 1))


def append(module):
    module.append(nn.Linear(1, 1))


@pytest.mark.parametrize(("change", "name"), [(replace, "0.weight"), (append, "1.weight")])
def test_parameters_that_came_after_wrapping_are_refused_by_name(change, name):
    """They trained on each rank by themselves, without a word."""

    def main(comm):
        module = nn.Sequential(nn.Linear(1, 1))
        model = DataParallel(module, comm)
        model(torch.ones(1, 1)).sum().backward()
        change(module)
        with torch.no_grad():
            model(torch.ones(1, 1))
        with pytest.raises(RuntimeError, match=f"parameter {name} was added or replaced"):
            model(torch.ones(1, 1))
        return copy.deepcopy(model)(torch.ones(1, 1)).requires_grad

    assert run_local(2, main) == [True, True]


def test_layers_without_parameters_may_come_and_parameters_may_go():
    def main(comm):
        module = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1), nn.Linear(1, 1))
        nn.init.ones_(module[0].weight)
        model = DataParallel(module, comm)
        module[1] = nn.Identity()
        del module[2]
        module[0].bias = None
        for _ in range(2):
            model.zero_grad()
            model(torch.full((1, 1), comm.rank + 1.0)).sum().backward()
        return module[0].weight.grad.item()

    assert run_local(2, main) == [1.5, 1.5]


class Lazy(nn.Module):
    def __init__(self):
        super().__init__()
        self.x = nn.UninitializedParameter()


class Holder(nn.Module):
    """A frozen x beside a parameter."""

    def __init__(self, x):
        super().__init__()
        self.register_buffer("x", x)
        self.y = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("alike", [True, False])
@pytest.mark.parametrize(
    ("make", "message"),
    [
        (Lazy, "x has no shape yet"),
        (lambda: Holder(torch.ones(3, device="meta")), "x (3,) float32 is on the meta device"),
        (lambda: Holder(torch.ones(1).expand(3)), "x (3,) float32 is expanded"),
        (lambda: Holder(torch.eye(3).to_sparse()), "layout torch.sparse_coo, expected a dense"),
    ],
)
def test_what_cannot_be_made_equal_is_refused_by_name_on_all_ranks(alike, make, message):
    def main(comm):
        module = make() if alike or comm.rank == 1 else Holder(torch.ones(3))
        with pytest.raises(ValueError, match=re.escape(message)):
            DataParallel(module, comm)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ({}, r"0\.weight has no shape yet"),
        ({"root": 2}, r"settings of DataParallel, on rank 1: expected a root from 0 to 1, got 2"),
        ({"wire": "int3"}, r"settings of DataParallel, on rank 1: unknown wire dtype 'int3'"),
    ],
)
def test_what_one_rank_cannot_wrap_every_rank_is_told_at_once(arguments, told):
    def main(comm):
        own = comm.rank == 1
        module = nn.Sequential(nn.LazyLinear(1) if own and not arguments else nn.Linear(1, 1))
        with pytest.raises(ValueError, match=told):
            DataParallel(module, comm, **(arguments if own else {}))
        comm.barrier()

    run_local(2, main)


def test_a_buffer_of_a_narrow_dtype_is_roots():
    def main(comm):
        module = Holder((torch.arange(3.0) + comm.rank).to(torch.float8_e5m2))
        model = DataParallel(module, comm, root=1)
        model.module.y.sum().backward()
        model.check_replicas()
        return module.x.float().tolist()

    assert run_local(3, main) == [[1.0, 2.0, 3.0]] * 3


def test_a_frozen_layer_made_for_inference():
    def main(comm):
        with torch.inference_mode():
            made = nn.Linear(1, 1).requires_grad_(False)
        module = nn.Sequential(made, nn.Linear(1, 1))
        model = DataParallel(module, comm)
        with torch.no_grad():
            hidden = made(torch.ones(1, 1)).clone()
        module[1](hidden + comm.rank).sum().backward()
        model.check_replicas()
        return module[1].weight.grad.item() - hidden.item(), made.weight.grad

    for found, nothing in run_local(2, main):
        assert found == pytest.approx(0.5) and nothing is None


def test_a_lazy_module_is_refused_by_name():
    def main(comm):
        with pytest.raises(ValueError, match=r"0\.weight has no shape yet"):
            DataParallel(nn.Sequential(nn.LazyLinear(3)), comm)
        return True

    assert run_local(2, main) == [True, True]
