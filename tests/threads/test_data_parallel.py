"""Data-parallel training equals the single-process run, whatever the ranks, buckets and wire."""

import copy
import io
import pickle
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from ringfold import DataParallel, NotFinite, Settings, run_local
from ringfold.parallel import GlobalBatchSampler, NoneIfEmpty
from ringfold.parallel.buckets import LIMITS

SIZES = (1, 2, 3, 4)


class Scalars(nn.Module):
    """Scalar parameters by name; forward hands them to a function of the test."""

    def __init__(self, **values):
        super().__init__()
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(torch.tensor(float(value))))

    def forward(self, function):
        return function(self)


def grad(parameter):
    return None if parameter.grad is None else parameter.grad.tolist()


def network(seed):
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7, bias=False), nn.Tanh(), nn.Linear(7, 2)
        )


def data(rows=24):
    generator = torch.Generator().manual_seed(7)
    return torch.randn(rows, 5, generator=generator), torch.randn(rows, 2, generator=generator)


LOCK = threading.Lock()  # torch's seed is one for all threads


def train(module, model, x, y, steps=5, after=lambda: None):
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x), y)
        loss.backward()
        after()
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach().clone() for name, p in module.named_parameters()}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("bucket_bytes", [1, 64, 1 << 20])
def test_training_equals_one_process(size, bucket_bytes):
    x, y = data()
    expected_losses, expected = train(module := network(0), module, x, y)

    def main(comm):
        with LOCK:
            module = network(comm.rank)
        model = DataParallel(module, comm, bucket_bytes=bucket_bytes)
        part = slice(comm.rank * 24 // size, (comm.rank + 1) * 24 // size)
        losses, weights = train(module, model, x[part], y[part])
        return comm.allreduce(np.array(losses), op="mean"), weights

    results = run_local(size, main)
    for losses, weights in results:
        np.testing.assert_allclose(losses, expected_losses, rtol=1e-5)
        for name, value in weights.items():
            torch.testing.assert_close(value, expected[name], rtol=1e-5, atol=1e-6)
            assert torch.equal(value, results[0][1][name])


@pytest.mark.parametrize("size", (2, 3))
def test_buckets_start_while_backward_goes_on(size):
    def main(comm):
        started = []
        module = network(0)
        model = DataParallel(module, comm, bucket_bytes=1)
        module[0].weight.register_hook(lambda _: started.append(len(in_flight)))
        in_flight = []
        channel = model._channel
        allreduce = channel.allreduce

        def counted(*args, **options):
            in_flight.append(args)
            return allreduce(*args, **options)

        channel.allreduce = counted
        for _ in range(2):
            in_flight.clear()
            model(data()[0]).sum().backward()
        return started, model.last_step.reductions, len(in_flight)

    for started, reductions, calls in run_local(size, main):
        # The three later parameters are under way before the first layer's gradient exists.
        assert min(started) >= 3
        assert len(started) == 2
        assert reductions == calls == 5


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


@pytest.mark.parametrize("before_training", [False, True])
@pytest.mark.parametrize("train_mode", [False, True])
def test_pr19_evaluation_on_one_rank(before_training, train_mode):
    """The wrapper's forward broadcast its buffers, even with gradients off."""

    def main(comm):
        module = nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))
        model = DataParallel(module, comm)
        x = data()[0][comm.rank :: 2]

        def step():
            model.train()
            module.zero_grad()
            model(x).pow(2).mean().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.1 * parameter.grad

        if not before_training:
            step()
        if comm.rank == 0:
            model.train(train_mode)
            with torch.no_grad():
                model(x), model(x)
        comm.barrier()
        step()
        return list(model.state_dict().values())

    zero, one = run_local(2, main)
    assert all(torch.equal(a, b) for a, b in zip(zero, one, strict=True))


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


@pytest.mark.parametrize("wire", [None, "topk:1.0"])
def test_a_complex_gradient_behind_an_odd_number_of_elements(wire):
    """No complex element may begin at an odd place of a bucket."""

    def main(comm):
        module = nn.Module()
        module.odd = nn.Parameter(torch.ones(3))
        module.waves = nn.Parameter(torch.tensor([[1 + 2j, 3 - 1j]]))
        module.last = nn.Parameter(torch.ones(3))
        model = DataParallel(module, comm, wire=wire)
        factor = torch.tensor([1 - 1j, 2 + 3j]) * (comm.rank + 1)
        for step, users in enumerate(((0, 1), (0, 1), (1,))):
            model.zero_grad()
            uses = (module.waves * factor.conj()).real.sum() if comm.rank in users else 0
            (module.odd.sum() + uses + module.last.sum()).backward()
            mean = (1.5, 1.5, 1.0)[step]
            assert module.waves.grad.tolist() == [[mean * (1 - 1j), mean * (2 + 3j)]]
            assert grad(module.odd) == grad(module.last) == [1.0] * 3

    run_local(2, main)


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


@pytest.mark.parametrize("size", (2, 3))
def test_parameter_used_twice_and_two_forwards_for_one_backward(size):
    def main(comm):
        module = Scalars(w=2)
        model = DataParallel(module, comm)
        first = model(lambda m: m.w * m.w)
        second = model(lambda m: m.w * (comm.rank + 1))
        (first + second).backward()
        return grad(module.w), model.last_step.reductions

    assert run_local(size, main) == [(4 + (size + 1) / 2, 1)] * size


def test_gradient_without_its_accumulation_is_not_reduced():
    def main(comm):
        module = Scalars(w=2)
        model = DataParallel(module, comm)
        if comm.rank == 0:
            (value,) = torch.autograd.grad(model(lambda m: m.w * m.w), [module.w])
            assert float(value) == 4.0
        return model.last_step

    assert run_local(2, main) == [None, None]


@pytest.mark.parametrize("wire", [None, "fp32", "bf16", "fp16"])
@pytest.mark.parametrize("size", (2, 3, 4))
def test_wire_dtype_rounds_once_per_rank(wire, size):
    kept = {None: 24, "fp32": 24, "bf16": 8, "fp16": 11}[wire]

    def main(comm):
        module = nn.Linear(33, 1, bias=False)
        model = DataParallel(module, comm, wire_dtype=wire)
        x = torch.linspace(1, 2, 33) + comm.rank
        model(x).sum().backward()
        return module.weight.grad[0], model.last_step.nbytes

    expected = torch.linspace(1, 2, 33) + (size - 1) / 2
    results = run_local(size, main)
    for found, nbytes in results:
        assert torch.equal(found, results[0][0])
        torch.testing.assert_close(found, expected, rtol=2.0 ** (1 - kept), atol=0)
        assert nbytes == (33 + 1 + 1) * (2 if kept < 24 else 4)


def test_wire_keeps_what_it_can_express():
    """A mean, not a sum that overflows: two ranks' 40000 add up to more than fp16's 65504."""

    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm, wire_dtype="fp16")
        model(lambda m: m.w * 40000.0).backward()
        return grad(module.w), model.last_step.finite

    assert run_local(2, main) == [(40000.0, True)] * 2


def test_overflow_of_the_wire_is_recorded():
    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm, wire_dtype="fp16")
        model(lambda m: m.w * (1e6 if comm.rank == 1 else 1.0)).backward()
        return grad(module.w), model.last_step.finite

    assert run_local(2, main) == [(float("inf"), True), (float("inf"), False)]


def test_unknown_wire():
    def main(comm):
        with pytest.raises(ValueError, match=r"unknown wire dtype 'int3'.*fp32, bf16, fp16"):
            DataParallel(Scalars(w=1), comm, wire_dtype="int3")

    run_local(1, main)


def test_sparse_gradients_stay_sparse():
    def main(comm):
        module = nn.Embedding(6, 2, sparse=True)
        model = DataParallel(module, comm)
        model(torch.tensor([comm.rank, 4, 4])).sum().backward()
        gradient = module.weight.grad
        return gradient.is_sparse, gradient.coalesce().indices().tolist(), gradient.to_dense()

    for is_sparse, rows, dense in run_local(2, main):
        assert is_sparse
        assert rows == [[0, 1, 4]]
        assert dense[:, 0].tolist() == [0.5, 0.5, 0, 0, 2, 0]


def test_names_are_the_users():
    def main(comm):
        module = network(0)
        model = DataParallel(module, comm)
        assert dict(model.named_parameters()).keys() == dict(module.named_parameters()).keys()
        assert model.state_dict().keys() == module.state_dict().keys()
        changed = {name: value + 1 for name, value in model.state_dict().items()}
        model.load_state_dict(changed)
        assert all(torch.equal(changed[name], p) for name, p in module.named_parameters())
        with pytest.raises(ValueError, match="assign=True"):
            model.load_state_dict(changed, assign=True)

    run_local(2, main)


def test_what_the_wrapper_would_not_name_is_refused():
    """A layer set on the wrapper was in no parameters() and in no state_dict(), without a word."""

    def main(comm):
        model = DataParallel(nn.Linear(2, 1), comm)
        model.loss, model.note = nn.MSELoss(), 3
        layer, parameter, buffer = nn.Linear(1, 1), nn.Parameter(torch.ones(1)), torch.ones(1)
        for refused in (
            lambda: setattr(model, "head", layer),
            lambda: model.add_module("head", layer),
            lambda: setattr(model, "head", parameter),
            lambda: model.register_parameter("head", parameter),
            lambda: model.register_buffer("head", buffer),
        ):
            with pytest.raises(TypeError, match=r"^head would be .* set module\.head before"):
                refused()
        return hasattr(model, "head"), list(model.state_dict())

    assert run_local(1, main) == [(False, ["weight", "bias"])]


@pytest.mark.parametrize("parent", ["dict", "average", "compiled", "twice", "own name"])
def test_the_state_of_a_parent_loads(parent):
    """Names in a parent's state have no "module." of the wrapper, and are found where it is."""
    make = {
        "dict": lambda wrap: nn.ModuleDict({"G": wrap(), "D": wrap(), "plain": network(0)}),
        "average": lambda wrap: torch.optim.swa_utils.AveragedModel(wrap()),
        "compiled": lambda wrap: torch.compile(wrap(), backend="eager"),
        "twice": lambda wrap: nn.Sequential(wrap(), wrap()),
        "own name": lambda wrap: nn.ModuleDict({"G": wrap(nn.ModuleDict({"module": network(0)}))}),
    }[parent]

    def main(comm):
        def wrap(module=None):
            model = DataParallel(module or network(0), comm)
            return DataParallel(model, comm) if parent == "twice" else model

        whole, plain = (
            make(wrap),
            make(lambda module=None: network(0) if module is None else module),
        )
        state = whole.state_dict()
        assert state.keys() == plain.state_dict().keys()
        plain.load_state_dict(state)
        changed = {name: value + 1 for name, value in state.items()}
        whole.load_state_dict(changed)
        assert all(torch.equal(changed[name], value) for name, value in whole.state_dict().items())
        first = next(name for name in changed if name.endswith("weight"))
        with pytest.raises(RuntimeError, match="Missing key"):
            whole.load_state_dict({k: v for k, v in changed.items() if k != first})
        with pytest.raises(RuntimeError, match="Unexpected key"):
            whole.load_state_dict({**changed, first.replace("weight", "other"): changed[first]})
        with pytest.raises(ValueError, match="assign=True"):
            whole.load_state_dict(changed, assign=True)

    run_local(1, main)


def test_a_wrapper_compiles_as_one_graph():
    """On rank 0; rank 1 does not, and gets the same."""

    def main(comm):
        model = DataParallel(network(0), comm)
        run = torch.compile(model, backend="eager", fullgraph=True) if comm.rank == 0 else model
        for step in range(3):
            model.zero_grad()
            run(torch.full((2, 5), 1.0 + comm.rank + step)).square().sum().backward()
        found = [p.grad.clone() for p in model.parameters()]
        layer = next(m for m in model.modules() if isinstance(m, nn.Linear))
        layer.bias = nn.Parameter(layer.bias.detach().clone())
        # What forward looks at otherwise, before anything is sent.
        with pytest.raises(RuntimeError, match="bias was added or replaced after the module"):
            run(torch.ones(2, 5)).sum().backward()
        return found

    compiled, plain = run_local(2, main)
    assert all(map(torch.equal, compiled, plain)) and all(g.any() for g in compiled)


def test_a_step_that_calls_backward_compiles():
    """On rank 0; it went into the reduction as well, and ended in an error of torch's."""

    def main(comm):
        model = DataParallel(network(0), comm)

        def step(x):
            model(x).square().sum().backward()

        run = torch.compile(step, backend="eager") if comm.rank == 0 else step
        found = []
        for _ in range(3):
            model.zero_grad()
            run(torch.ones(2, 5) * (comm.rank + 1))
            found += [p.grad.clone() for p in model.parameters()]
        return found

    compiled, plain = run_local(2, main)
    assert all(map(torch.equal, compiled, plain)) and all(g.any() for g in compiled)


def test_compiled_autograd_is_refused():
    """It calls nothing at backward's end; the error was an assertion of torch's, in our code."""

    def main(comm):
        model = DataParallel(network(0), comm, check_finite=True)
        with torch._dynamo.config.patch(compiled_autograd=True):
            step = torch.compile(lambda x: model(x).sum().backward(), backend="eager")
            with pytest.raises(RuntimeError, match=r"compiled autograd.*backward\(\) outside"):
                step(torch.ones(2, 5))

    run_local(1, main)


class Versioned(nn.Module):
    """A layer of whose weight old files have another unit."""

    _version = 2

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.ones(2))

    def _load_from_state_dict(self, state, prefix, metadata, *rest):
        if metadata.get("version", 1) < 2:
            state[prefix + "w"] = state[prefix + "w"] * 10
        super()._load_from_state_dict(state, prefix, metadata, *rest)


@pytest.mark.parametrize("twice", [False, True])
def test_a_parents_state_has_the_versions_and_names_of_layers(twice):
    """Versions were not found within a wrapper, and what was missing had "module." in its name."""

    def main(comm):
        def wrap(module):
            model = DataParallel(module, comm)
            return DataParallel(model, comm) if twice else model

        whole = nn.ModuleDict({"a": wrap(Versioned()), "b": wrap(nn.Sequential(Versioned()))})
        plain = nn.ModuleDict({"a": Versioned(), "b": nn.Sequential(Versioned())})
        for one, other in ((whole, whole), (whole, plain), (plain, whole)):
            one.load_state_dict(other.state_dict())
            assert all(p.eq(1).all() for p in one.parameters())
        state = whole.state_dict()
        state["b.0.other"] = state.pop("b.0.w")
        keys = whole.load_state_dict(state, strict=False)
        assert (keys.missing_keys, keys.unexpected_keys) == (["b.0.w"], ["b.0.other"])
        state = {**whole.state_dict(), "a.w": torch.ones(3)}
        with pytest.raises(RuntimeError, match=r"size mismatch for a\.w: "):
            whole.load_state_dict(state)
        places = [name for name, _ in whole.named_modules()]
        assert any(name.endswith("module.0") for name in places)

    run_local(1, main)


@pytest.mark.parametrize("within", [False, True])
def test_hooks_of_the_state_are_called(within):
    def main(comm):
        called = []

        def note(what):
            return lambda module, *_: called.append((what, module))

        module = nn.Sequential(nn.Linear(2, 2))
        model = DataParallel(module, comm)
        for one in (module, model):
            one.register_state_dict_pre_hook(note("saves"))
            one.register_state_dict_post_hook(note("saved"))
            one.register_load_state_dict_pre_hook(note("loads"))
            one.register_load_state_dict_post_hook(note("loaded"))
        # What a hook takes from the missing keys is not missed.
        model.register_load_state_dict_post_hook(lambda _, keys: keys.missing_keys.clear())
        whole = nn.ModuleDict({"model": model}) if within else model
        for time in range(2):
            called.clear()
            state = whole.state_dict()
            state.popitem()
            whole.load_state_dict(state)
            pairs = [("saves", model), ("saves", module), ("saved", module), ("saved", model)]
            pairs += [("loads", model), ("loads", module), ("loaded", module), ("loaded", model)]
            assert sorted(map(str, called)) == sorted(map(str, pairs)), time
            assert called[:4] == pairs[:4]

    run_local(1, main)


def test_tensors_and_layers_are_found_by_the_users_names():
    def main(comm):
        module = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
        model = DataParallel(DataParallel(module, comm), comm)
        for name, parameter in model.named_parameters():
            assert model.get_parameter(name) is parameter
        for name, buffer in model.named_buffers():
            assert model.get_buffer(name) is buffer
        assert model.get_submodule("1") is module[1] and model.get_submodule("") is model
        for name, layer in model.module.named_modules():
            assert model.module.get_submodule(name) is layer
        assert model.get_parameter("module.module.0.weight") is module[0].weight
        with pytest.raises(AttributeError, match="no attribute `2`"):
            model.get_submodule("2")
        wrapped = DataParallel(nn.Linear(2, 2), comm)
        assert wrapped.get_parameter("weight") is wrapped.module.weight

    run_local(1, main)


def test_changed_dtype_is_refused_by_name():
    def main(comm):
        module = Scalars(w=1)
        model = DataParallel(module, comm)
        module.double()
        with pytest.raises(TypeError, match="gradient of w: expected float32, got float64"):
            model(lambda m: m.w * 2).backward()

    run_local(2, main)


def test_goes_on_after_a_backward_that_failed_on_all_ranks():
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            raise RuntimeError("out of memory")

    def main(comm):
        module = Scalars(a=1, b=1)
        model = DataParallel(module, comm, bucket_bytes=1)
        with pytest.raises(RuntimeError, match="out of memory"):
            # b's gradient is in before the failure, and its bucket under way.
            model(lambda m: Fail.apply(m.a * 2) + m.b * 3).backward()
        module.zero_grad()
        model(lambda m: m.a * (1 + comm.rank) + m.b * 3).backward()
        return grad(module.a), grad(module.b), model.last_step.reductions

    assert run_local(2, main) == [(1.5, 3.0, 2)] * 2


def test_arrival_order_of_the_first_step_lays_out_the_next():
    """Layers registered in the order of use are reduced as they come, not as they are listed."""

    def main(comm):
        module = Scalars(last=1, first=2)  # backward reaches `last` before `first`
        model = DataParallel(module, comm, bucket_bytes=1)
        overlapped = []
        for _ in range(2):
            model(lambda m: (m.first * 2).exp() * m.last).backward()
            overlapped.append(model.last_step.overlapped)
        return overlapped, model._reducer.plan.bucketing.buckets[0].indices

    for overlapped, first in run_local(2, main):
        assert overlapped == [1, 1]  # a small last bucket waits for the end of backward
        assert first == (0,)


def test_bucket_size_is_chosen_after_two_steps_and_equal_on_all_ranks():
    def main(comm):
        module = nn.Sequential(*(nn.Linear(200, 200) for _ in range(4)))
        model = DataParallel(module, comm, bucket_bytes="auto")
        seen, gradients = [], []
        for _ in range(4):
            model.zero_grad()
            model(torch.full((2, 200), 1.0 + comm.rank)).sum().backward()
            seen.append((model._reducer.plan.bucket_bytes, model._reducer.plan.bucketing.buckets))
            gradients.append([p.grad.clone() for p in model.parameters()])
        for later in gradients[1:]:
            for first, other in zip(gradients[0], later, strict=True):
                torch.testing.assert_close(first, other)
        return seen

    results = run_local(3, main)
    assert results[0] == results[1] == results[2]
    sizes = [size for size, _ in results[0]]
    assert sizes[0] == 4 << 20 and sizes[1] in LIMITS and sizes[1:] == [sizes[1]] * 3


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("norm_type", [2.0, float("inf")])
def test_clipping_by_the_global_norm_is_that_of_one_process(set_to_none, norm_type):
    """Reduced gradients are equal everywhere, so torch's own function clips alike on every rank."""
    x, y = data()

    def step(module, model, x, y):
        model.zero_grad(set_to_none=set_to_none)
        nn.functional.mse_loss(model(x), y).backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 0.1, norm_type)
        return norm.item(), [p.grad for p in module.parameters()]

    whole = network(0)
    step(whole, whole, x, y)
    expected_norm, expected = step(whole, whole, x, y)

    def main(comm):
        with LOCK:
            module = network(0)
        model = DataParallel(module, comm)
        part = slice(comm.rank * 8, comm.rank * 8 + 8)
        step(module, model, x[part], y[part])
        return step(module, model, x[part], y[part])

    for norm, gradients in run_local(3, main):
        assert norm == pytest.approx(expected_norm, rel=1e-5) and norm > 0.1
        for found, value in zip(gradients, expected, strict=True):
            torch.testing.assert_close(found, value, rtol=1e-4, atol=1e-7)


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


def rows_one(*indices, width=1):
    """An embedding's gradient by rows, for the sum over looked-up rows."""
    table = torch.zeros(4, width)
    for index in indices:
        table[index] += 1
    return table


class Rows(nn.Module):
    """An embedding that does not say that it is sparse; known after its first gradient."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 1))

    def forward(self, index):
        return nn.functional.embedding(index, self.weight, sparse=True)


@pytest.mark.parametrize("wire", [None, "bf16", "topk:1.0"])
@pytest.mark.parametrize("declared", [True, False])
def test_sparse_gradient_on_one_rank_is_sparse_on_all(wire, declared):
    """A rank without a row had a dense gradient, which SparseAdam refuses."""

    def main(comm):
        module = nn.Embedding(4, 1, sparse=True) if declared else Rows()
        model = DataParallel(module, comm, wire=wire)
        model(torch.tensor([0])).sum().backward()
        model.zero_grad()
        if comm.rank == 0:
            model(torch.tensor([1, 1, 3])).sum().backward()
        else:
            model.reduce_gradients()
        gradient = module.weight.grad
        torch.optim.SparseAdam(list(model.parameters())).step()
        return gradient.layout, gradient.to_dense()

    for layout, gradient in run_local(2, main):
        assert layout == torch.sparse_coo
        assert torch.equal(gradient, rows_one(1, 1, 3) / 2)


def test_sparse_gradient_of_one_expanded_row():
    """torch makes zeros of it: what is summed over one row is an expanded single element."""

    def main(comm):
        module = nn.Embedding(4, 1, sparse=True)
        model = DataParallel(module, comm)
        found = []
        for index in range(3):
            model.zero_grad(set_to_none=False)
            model(torch.tensor([index])).sum().backward()
            found.append(module.weight.grad.coalesce().to_dense() + 0)
        return found

    for found in run_local(2, main):
        for index, gradient in enumerate(found):
            assert torch.equal(gradient, rows_one(index))


def test_sparse_gradients_accumulate_and_are_weighted():
    def main(comm):
        module = nn.Embedding(4, 2, sparse=True)
        model = DataParallel(module, comm)
        with model.no_sync():
            model(torch.tensor([0, 0])).sum().backward()
        with model.weighted((1, 3)[comm.rank]):
            model(torch.tensor([comm.rank + 1])).sum().backward()
        return module.weight.grad.to_dense()

    expected = rows_one(0, 0, width=2) + rows_one(1, width=2) / 4 + rows_one(2, width=2) * 0.75
    for gradient in run_local(2, main):
        assert torch.equal(gradient, expected)


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


@pytest.mark.parametrize("reentrant", [True, False])
def test_recomputed_layers(reentrant):
    """Re-entrant checkpoints run a backward within the backward."""
    torch.manual_seed(0)
    whole = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 1))
    inputs = [torch.full((2, 3), k + 1.0) for k in range(2)]
    for x in inputs:
        (whole(x).sum() / 2).backward()

    class Recomputing(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers = copy.deepcopy(whole)
            self.layers.zero_grad()

        def forward(self, x):
            x = x.requires_grad_()
            hidden = checkpoint(self.layers[0], x, use_reentrant=reentrant)
            return checkpoint(self.layers[1:], hidden, use_reentrant=reentrant)

    def main(comm):
        model = DataParallel(Recomputing(), comm, bucket_bytes=1)
        for _ in range(3):
            model.zero_grad()
            model(inputs[comm.rank].clone()).sum().backward()
        return [p.grad for p in model.parameters()]

    for found in run_local(2, main):
        for gradient, parameter in zip(found, whole.parameters(), strict=True):
            torch.testing.assert_close(gradient, parameter.grad)


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


def test_flags_follow_the_gradients_from_pass_to_pass():
    """What the last pass has left behind the elements is sent again only where it is right."""

    def main(comm):
        module = Scalars(first=2, last=3)
        model = DataParallel(module, comm)
        seen = []
        for users in ((0, 1), (0, 1), (0,), (), (0, 1)):  # ranks that use `last`
            module.zero_grad()
            uses = comm.rank in users
            model(lambda m, uses=uses: m.first * (m.last if uses else 1)).backward()
            seen.append((module.last.grad is None, model.last_step.partial))
        return seen

    all_use, one, none = (False, ()), (False, ("last",)), (True, ())
    assert run_local(2, main) == [[all_use, all_use, one, none, all_use]] * 2


def test_the_last_small_bucket_tells_the_same_in_every_pass():
    """From the second pass on a plan reduces it: receipts, bytes and the result stay."""

    def main(comm):
        module = Scalars(first=2, last=3)
        model = DataParallel(module, comm)
        seen = []
        for _ in range(3):
            module.zero_grad()
            model(lambda m: m.first * m.last * (comm.rank + 1)).backward()
            record = model.last_step
            seen.append((record.receipts, record.bucket_nbytes, module.first.grad.item()))
        return seen

    for first, second, third in run_local(2, main):
        assert first == second == third
        assert first[2] == 3 * 1.5


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
