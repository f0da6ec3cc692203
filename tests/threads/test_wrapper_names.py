"""A wrapped module has the user's names, and its state; what compiles it sees through."""

import pytest
import torch
from scalars import network
from torch import nn

from ringfold import DataParallel, run_local


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
