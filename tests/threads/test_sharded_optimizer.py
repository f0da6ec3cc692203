"""The sharded optimizer updates as the whole one does, with 1/size of its memory on each rank."""

import copy
import math
import threading
from collections import defaultdict

import pytest
import torch
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from ringfold import DataParallel, Mesh, Pipeline, ShardedOptimizer, run_local

LOCK = threading.Lock()
KINDS = [
    (SGD, {"lr": 0.1}),
    (SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.01}),
    (Adam, {"lr": 0.01}),
    (AdamW, {"lr": 0.01, "amsgrad": True}),
]


class Network(nn.Module):
    """Odd sizes, a scalar, an empty parameter, one with turned strides, one that is never used."""

    def __init__(self):
        super().__init__()
        with LOCK, torch.random.fork_rng():
            torch.manual_seed(3)
            self.one = nn.Linear(5, 13)
            self.two = nn.Linear(13, 7, bias=False)
            self.turned = nn.Parameter(torch.randn(7, 3).t())
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.empty(0, 2))
        self.never = nn.Parameter(torch.ones(4))
        self.wide = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x):
        hidden = self.two(torch.tanh(self.one(x)) * self.scale)
        return hidden @ self.turned.t() * self.wide


def data(rank, step):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(6, 5, generator=generator), torch.randn(6, 3, generator=generator)


def backward(model, rank, step):
    x, y = data(rank, step)
    nn.functional.mse_loss(model(x), y.double()).backward()


def bits(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def run(comm, make, steps=4, model=None):
    module = Network()
    model = DataParallel(module, comm)
    optimizer = make(module)
    for step in range(steps):
        optimizer.zero_grad()
        backward(model, comm.rank, step)
        optimizer.step()
    return module, optimizer


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize(("kind", "hyper"), KINDS)
@pytest.mark.parametrize("bucket_bytes", [64, 1 << 20])
def test_equals_the_whole_optimizer_to_the_last_bit(size, kind, hyper, bucket_bytes):
    def main(comm):
        whole, _ = run(comm, lambda m: kind(m.parameters(), **hyper))
        sharded, _ = run(
            comm,
            lambda m: ShardedOptimizer(
                m.named_parameters(), comm, kind, bucket_bytes=bucket_bytes, **hyper
            ),
        )
        return bits(whole), bits(sharded)

    for whole, sharded in run_local(size, main):
        for name, value in whole.items():
            assert torch.equal(value, sharded[name]), name


OTHERS = ["ASGD", "Adadelta", "Adagrad", "Adamax", "NAdam", "RAdam", "RMSprop", "Rprop"]


@pytest.mark.parametrize("name", OTHERS)
def test_other_optimizers_go_on_sharded_otherwise_and_whole(name):
    kind = getattr(torch.optim, name)
    hyper = {"lr": 0.1, **({"centered": True, "momentum": 0.9} if name == "RMSprop" else {})}

    def main(comm):
        part = comm.split(int(comm.rank < 2))
        module, plain = Network(), Network()
        optimizer = ShardedOptimizer(module.named_parameters(), comm, kind, **hyper)
        whole = kind(plain.parameters(), **hyper)
        for step in range(6):
            if step == 3:  # on from the state, on another number of ranks
                state = optimizer.state_dict()
                optimizer = ShardedOptimizer(module.named_parameters(), part, kind, **hyper)
                optimizer.load_state_dict(state)
            for one, network in ((optimizer, module), (whole, plain)):
                one.zero_grad()
                backward(network, 0, step)
                one.step()
        found = optimizer.state_dict()["state"]
        for path, p in plain.named_parameters():
            assert torch.equal(p, module.get_parameter(path)), path
            for key, value in (whole.state[p] if p.numel() else {}).items():
                assert torch.equal(found[path][key], value), (path, key)

    run_local(3, main)


@pytest.mark.parametrize("size", [2, 3])
def test_reduces_by_itself(size):
    """Without a wrapper, by reduce-scatter; a rank without a gradient counts as zeros."""

    def main(comm):
        with_wrapper, _ = run(comm, lambda m: AdamW(m.parameters(), lr=0.01))
        module = Network()
        optimizer = ShardedOptimizer(module.named_parameters(), comm, AdamW, reduce=True, lr=0.01)
        for step in range(4):
            optimizer.zero_grad()
            backward(module, comm.rank, step)
            optimizer.step()
        some = nn.Parameter(torch.ones(5))
        never = nn.Parameter(torch.ones(5))
        optimizer = ShardedOptimizer(
            [("some", some), ("never", never)], comm, SGD, reduce=True, lr=1.0, weight_decay=1.0
        )
        if comm.rank == 0:
            (some * size).sum().backward()
        optimizer.step()
        return bits(with_wrapper), bits(module), some.tolist(), never.tolist()

    results = run_local(size, main)
    for expected, found, some, never in results:
        for name, value in expected.items():
            torch.testing.assert_close(found[name], value, rtol=1e-4, atol=1e-6)
            assert torch.equal(found[name], results[0][1][name])
        assert some == [-1.0] * 5 and never == [1.0] * 5


@pytest.mark.parametrize("size", [2, 3, 4])
def test_memory_is_a_part_of_the_whole(size):
    def elements(optimizer):
        return sum(
            value.numel()
            for entry in optimizer.state.values()
            for key, value in entry.items()
            if key != "step"
        )

    def main(comm):
        _, whole = run(comm, lambda m: Adam(m.parameters()))
        _, sharded = run(comm, lambda m: ShardedOptimizer(m.named_parameters(), comm, Adam))
        return elements(whole), elements(sharded)

    results = run_local(size, main)
    assert sum(mine for _, mine in results) == results[0][0]
    for whole, mine in results:
        assert abs(mine - whole / size) <= 2 * size  # two moments, the rest of each of two dtypes


@pytest.mark.parametrize(("before", "after"), [(2, 3), (4, 1), (1, 2)])
def test_state_goes_to_another_number_of_ranks(before, after):
    def first(comm):
        module, optimizer = run(comm, lambda m: sharded(m, comm), steps=3)
        at_root = optimizer.state_dict(root=comm.size - 1)
        assert bool(at_root["state"]) == (comm.rank == comm.size - 1)
        return module.state_dict(), optimizer.state_dict()

    def sharded(module, comm):
        pairs = list(module.named_parameters())
        groups = [{"params": pairs[:2], "lr": 0.02}, {"params": pairs[2:]}]
        return ShardedOptimizer(groups, comm, AdamW, lr=0.01)

    module_state, state = run_local(before, first)[0]
    assert [group["lr"] for group in state["param_groups"]] == [0.02, 0.01]
    reference = Network()
    assert "never" not in state["state"]
    for name, entry in state["state"].items():
        assert entry["exp_avg"].shape == reference.get_parameter(name).shape
        assert entry["step"].item() == 3
    assert state["state"]["scale"]["exp_avg"].abs() > 0

    def second(comm):
        module = Network()
        module.load_state_dict(module_state)
        optimizer = sharded(module, comm)
        optimizer.param_groups[0]["lr"] = 7.0
        optimizer.load_state_dict(state)
        again = optimizer.state_dict()
        assert again["param_groups"] == state["param_groups"]
        for name, entry in state["state"].items():
            for key, value in entry.items():
                assert torch.equal(again["state"][name][key], value), (name, key)
        backward(DataParallel(module, comm), 0, 9)  # every rank the same batch
        optimizer.step()
        return bits(module)

    whole = Network()
    whole.load_state_dict(module_state)
    pairs = list(whole.named_parameters())
    optimizer = AdamW(
        [{"params": [p for _, p in pairs[:2]], "lr": 0.02}, {"params": [p for _, p in pairs[2:]]}],
        lr=0.01,
    )
    for name, p in pairs:
        if name in state["state"]:
            optimizer.state[p] = {k: v.clone() for k, v in state["state"][name].items()}
    backward(whole, 0, 9)
    optimizer.step()
    for found in run_local(after, second):
        for name, p in pairs:
            torch.testing.assert_close(found[name], p.detach(), rtol=1e-6, atol=1e-7)


def test_a_learning_rate_that_is_a_tensor_is_not_shared_with_the_state_it_came_from():
    """Schedulers write it in place: they did so in the state, and in the optimizer that told it."""

    def main(comm):
        pairs = list(Network().named_parameters())
        first, second = (
            ShardedOptimizer(pairs, comm, Adam, lr=torch.tensor(rate)) for rate in (0.5, 0.25)
        )
        state = first.state_dict()
        second.load_state_dict(state)
        scheduler = torch.optim.lr_scheduler.ExponentialLR(second, 0.5)
        second.step()
        scheduler.step()
        rates = [o["param_groups"][0]["lr"].item() for o in (state, vars(first), vars(second))]
        return rates, second._inner.param_groups[0]["lr"].item()

    assert run_local(2, main) == [([0.5, 0.5, 0.25], 0.25)] * 2


@pytest.mark.parametrize("reduce", [False, True])
def test_clipping_and_a_scheduler(reduce):
    def main(comm):
        module, whole = Network(), Network()
        optimizer = ShardedOptimizer(
            module.named_parameters(), comm, SGD, reduce=reduce, lr=0.5, momentum=0.9
        )
        reference = SGD(whole.parameters(), lr=0.5, momentum=0.9)
        schedulers = [torch.optim.lr_scheduler.StepLR(o, 1, 0.1) for o in (optimizer, reference)]
        model = module if reduce else DataParallel(module, comm)
        other = DataParallel(whole, comm)
        for step in range(3):
            for o in (optimizer, reference):
                o.zero_grad()
            backward(model, comm.rank, step)
            backward(other, comm.rank, step)
            norm = optimizer.clip_grad_norm_(0.01)
            expected = nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
            assert norm.item() == pytest.approx(expected.item(), rel=1e-5) and norm > 0.02
            for o in (optimizer, reference, *schedulers):
                o.step()
        assert optimizer.param_groups[0]["lr"] == pytest.approx(0.0005)
        for (name, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)

    run_local(2, main)


@pytest.mark.parametrize("reduce", [False, True])
@pytest.mark.parametrize("again", ["none", "zeros", "accumulated", "some ranks"])
def test_a_step_uses_the_gradients_of_now_not_those_that_were_clipped(reduce, again):
    """As where a step is skipped by the norm, or clip_grad_norm_ only looks at it."""

    def main(comm):
        module = nn.Linear(2, 1, bias=False)
        nn.init.ones_(module.weight)
        model = module if reduce else DataParallel(module, comm)
        optimizer = ShardedOptimizer(
            module.named_parameters(), comm, SGD, reduce=reduce, lr=1.0, bucket_bytes=4
        )

        def run_backward(value):
            model(
                torch.full((1, 2), value * (comm.rank + 1) * 2 / (comm.size + 1))
            ).sum().backward()

        run_backward(0.25)
        optimizer.clip_grad_norm_(1e-3)
        if again in ("none", "zeros"):
            module.zero_grad(set_to_none=again == "none")
        if again != "some ranks":
            run_backward(0.5)
        elif reduce:
            if comm.rank == 0:
                module.weight.grad.zero_()
        elif comm.rank == 0:
            model(torch.full((1, 2), comm.size * 0.5)).sum().backward()
        else:
            model.reduce_gradients()
        optimizer.step()
        return module.weight.flatten().tolist()

    size = 3
    first = 0.25 / size * 2 / (size + 1)  # of rank 0 to the mean
    gone = {"none": 0.5, "zeros": 0.5, "accumulated": 0.75, "some ranks": 0.25 - first}
    if not reduce and again == "some ranks":
        gone[again] = 0.25 + 0.5
    for found in run_local(size, main):
        assert found == pytest.approx([1 - gone[again]] * 2)


@pytest.mark.parametrize("reduce", [False, True])
def test_a_group_that_is_added_later(reduce):
    """A layer that is trained from the second step on, of which some ranks have no part."""

    def main(comm):
        module, whole = Network(), Network()
        optimizers, models = [], []
        for m in (module, whole):
            m.two.requires_grad_(False)
            m.scale.requires_grad_(False)
            models.append(m if reduce and m is module else DataParallel(m, comm))
            named = [(n, p) for n, p in m.named_parameters() if p.requires_grad]
            of_whole = AdamW([p for _, p in named], lr=0.1)
            optimizers.append(
                ShardedOptimizer(named, comm, lr=0.1, reduce=reduce) if m is module else of_whole
            )
        optimizer, reference = optimizers
        for step in range(4):
            if step == 2:
                for m in (module, whole):
                    for late in (m.two.weight, m.scale):
                        late.requires_grad_(True)
                pairs = [("two.weight", module.two.weight), ("scale", module.scale)]
                optimizer.add_param_group({"params": iter(pairs), "lr": 0.01})
                reference.add_param_group({"params": [whole.two.weight, whole.scale], "lr": 0.01})
            for model, one in zip(models, optimizers, strict=True):
                one.zero_grad()
                backward(model, comm.rank, step)
            optimizer.clip_grad_norm_(0.01)
            nn.utils.clip_grad_norm_(whole.parameters(), 0.01)
            optimizer.step()
            reference.step()
        for (name, p), q in zip(module.named_parameters(), whole.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7, msg=name)
        state = optimizer.state_dict()
        optimizer.load_state_dict(state)
        return state["param_groups"][1]["params"], state["state"]["scale"]["step"].item()

    assert run_local(3, main) == [(["two.weight", "scale"], 2.0)] * 3


def test_refusals():
    def main(comm):
        module = nn.Linear(2, 2)
        named = list(module.named_parameters())
        with pytest.raises(TypeError, match="LBFGS cannot be sharded, expected one of: SGD, Adam"):
            ShardedOptimizer(named, comm, torch.optim.LBFGS)
        with pytest.raises(TypeError, match=r"\(name, parameter\) pairs.*got Parameter"):
            ShardedOptimizer(module.parameters(), comm, SGD)
        with pytest.raises(ValueError, match="every parameter name once"):
            ShardedOptimizer([*named, *named], comm, SGD)
        with pytest.raises(ValueError, match=r"parameters or settings .* entry 2: SGD, reduce"):
            ShardedOptimizer(named, comm, SGD, reduce=comm.rank == 1)
        optimizer = ShardedOptimizer(named, comm, SGD, lr=1.0)
        with pytest.raises(TypeError, match=r"a ShardedOptimizer .* no copy .* its state_dict\(\)"):
            copy.deepcopy(optimizer)
        new = nn.Parameter(torch.ones(1))
        for pairs, error, told in (
            ([new], TypeError, "pairs.*got Parameter"),
            ([("new", new), ("bias", new)], ValueError, "bias is in the optimizer already"),
            ([("new", module.bias)], ValueError, "new is in the optimizer already"),
            ([(f"new{comm.rank}", new)], ValueError, "of the group differ between ranks"),
        ):
            with pytest.raises(error, match=told):
                optimizer.add_param_group({"params": iter(pairs)})
        state = optimizer.state_dict()
        with pytest.raises(ValueError, match="is no parameter of this optimizer"):
            optimizer.load_state_dict({**state, "state": {"other": {}}})
        bad = {"weight": {"momentum_buffer": torch.zeros(3)}}
        with pytest.raises(ValueError, match=r"momentum_buffer of weight: expected shape \(2, 2\)"):
            optimizer.load_state_dict({**state, "state": bad})

    run_local(2, main)


def test_one_rank_holds_a_whole_bucket_rounded_up():
    def main(comm):
        parameter = nn.Parameter(torch.arange(10.0))
        optimizer = ShardedOptimizer([("w", parameter)], comm, SGD, lr=1.0)
        return [p.numel() for group in optimizer._inner.param_groups for p in group["params"]]

    sizes = run_local(4, main)
    assert sizes == [[3], [3], [3], [1]]
    assert max(map(sum, sizes)) == math.ceil(10 / 4)


LONG = [(SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3})] + [
    (getattr(torch.optim, name), {"lr": 0.01, **({} if name == "Rprop" else {"weight_decay": 0.1})})
    for name in OTHERS
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("kind", "hyper"), KINDS[1:] + LONG)
def test_long_parameters_cut_at_odd_places_keep_their_bits(kind, hyper, dtype):
    """Vector instructions handle the ends of an array apart; a shard has its ends elsewhere.

    In halves, or with fused=True, torch rounds otherwise there.
    """
    counts = (1001, 77, 4099)

    def parameters():
        generator = torch.Generator().manual_seed(0)
        return [nn.Parameter(torch.randn(n, generator=generator, dtype=dtype)) for n in counts]

    def main(comm):
        whole, own = parameters(), parameters()
        named = [(str(n), p) for n, p in zip(counts, own, strict=True)]
        optimizers = kind(whole, **hyper), ShardedOptimizer(named, comm, kind, **hyper)
        generator = torch.Generator().manual_seed(5)
        for _ in range(10):
            for p, q in zip(whole, own, strict=True):
                p.grad = torch.randn(p.shape, generator=generator, dtype=dtype)
                q.grad = p.grad.clone()
            for optimizer in optimizers:
                optimizer.step()
        return all(map(torch.equal, whole, own))

    assert run_local(3, main) == [True] * 3


def test_beside_a_pipeline_over_its_replicas_also_on_a_stage_without_parameters():
    def train(mesh, make):
        with LOCK, torch.random.fork_rng():
            torch.manual_seed(0)
            layers = [nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3)]
        engine = Pipeline(
            layers, mesh, loss_fn=nn.functional.mse_loss, microbatches=2, boundaries=[1, 2]
        )
        optimizer = make(engine, mesh)
        for step in range(3):
            optimizer.zero_grad()
            engine.step(*data(mesh.data.rank, step))
            engine.clip_grad_norm_(0.1)
            optimizer.step()
        state = {name: value.clone() for name, value in engine.state_dict().items()}
        engine.close()
        return state, optimizer

    def main(comm):
        with Mesh(comm, data=2, pipe=3) as mesh:
            whole, _ = train(mesh, lambda engine, _: AdamW(engine.parameters(), lr=0.1))
            sharded, optimizer = train(
                mesh,
                lambda engine, mesh: ShardedOptimizer(
                    engine.named_parameters(), mesh.data, AdamW, lr=0.1
                ),
            )
            assert whole.keys() == sharded.keys() == optimizer.state_dict()["state"].keys()
            with pytest.raises(ValueError, match="clip_grad_norm_ of the Pipeline instead"):
                optimizer.clip_grad_norm_(0.1)  # by a norm of this stage alone
            return mesh.pipe.rank, whole, sharded

    for stage, whole, sharded in run_local(6, main):
        assert len(whole) == (0 if stage == 1 else 2)
        assert all(torch.equal(whole[name], sharded[name]) for name in whole)


@pytest.mark.parametrize("how", ["clear", "replace"])
def test_state_that_is_cleared_begins_anew(how):
    """As by `optimizer.state.clear()`, which cleared a dict that nothing used."""

    def main(comm):
        sharded, plain = Network(), Network()
        named = sharded.named_parameters()
        pair = [
            (sharded, ShardedOptimizer(named, comm, Adam, lr=0.1, bucket_bytes=200)),
            (plain, Adam(plain.parameters(), lr=0.1)),
        ]
        for step in range(4):
            for model, optimizer in pair:
                for parameter in model.parameters():
                    parameter.grad = torch.full_like(parameter, 1.0 + step)
                if step == 2 and how == "clear":
                    optimizer.state.clear()
                elif step == 2:
                    optimizer.state = defaultdict(dict)
                optimizer.step()
        assert all(map(torch.equal, sharded.parameters(), plain.parameters()))
        with pytest.raises(TypeError, match="load_state_dict takes that of whole ones"):
            pair[0][1].state = pair[1][1].state
        fresh = ShardedOptimizer(plain.named_parameters(), comm, Adagrad)
        assert all(entry["sum"].eq(0).all() for entry in fresh.state.values()) and fresh.state

    run_local(2, main)
