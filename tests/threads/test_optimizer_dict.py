"""What an optimizer tells by its state_dict is kept and sent, wherever the state lies.

Checkpoints and `broadcast_optimizer` read `optimizer.state` by itself. That of an optimizer which
wraps another is empty, and what hooks of state_dict add is not in it: all that was lost, unsaid.
"""

from collections import defaultdict
from copy import deepcopy

import pytest
import torch
from checkpointed import network, rewrite, same
from torch import nn
from torch.optim import SGD, Adam

import ringfold
from ringfold import CheckpointError, Mesh, Pipeline, ShardedOptimizer, run_local
from ringfold.parallel.optimizer_state import broadcast_optimizer


class Lookahead(torch.optim.Optimizer):
    """As timm's: the state is in the optimizer within, and torch's constructor is not called."""

    def __init__(self, inner, every=2):
        self._optimizer_step_pre_hooks, self._optimizer_step_post_hooks = {}, {}
        self.state = defaultdict(dict)
        self.inner, self.param_groups, self.defaults = inner, inner.param_groups, inner.defaults
        for group in self.param_groups:
            group.update(every=every, steps=0)

    @torch.no_grad()
    def step(self):
        self.inner.step()
        for group in self.inner.param_groups:
            group["steps"] += 1
            due = group["steps"] % group["every"] == 0
            for p in (p for p in group["params"] if due and p.grad is not None):
                slow = self.inner.state[p].setdefault("slow", torch.zeros_like(p))
                p.copy_(slow.lerp_(p, 0.5))

    def state_dict(self):
        return self.inner.state_dict()

    def load_state_dict(self, state):
        self.inner.load_state_dict(state)
        self.param_groups = self.inner.param_groups


class Counting(SGD):
    """With state of no parameter: torch's load_state_dict takes that, too."""

    def step(self):
        self.state["calls"] = self.state.get("calls", 0) + 1
        for group in self.param_groups:
            group["lr"] = 0.1 / self.state["calls"]
        super().step()


def hooked(inner):
    """Give an optimizer a running mean that goes by torch's hooks."""
    mean = torch.zeros(2)

    def save(_, state):
        return {**state, "more": {"mean": mean, "of": ("step", 0.5)}}

    def load(_, state):
        assert state["more"]["of"] == ("step", 0.5)
        mean.copy_(state["more"]["mean"])

    inner.register_step_post_hook(lambda o, *_: mean.add_(1))
    inner.register_step_pre_hook(lambda o, *_: o.param_groups[0].update(lr=0.1 / (1 + mean[0])))
    inner.register_state_dict_post_hook(save)
    inner.register_load_state_dict_pre_hook(load)
    return inner


KINDS = {
    "wrapped": lambda parameters: Lookahead(Adam(parameters, lr=0.1)),
    "hooked": lambda parameters: hooked(Adam(parameters, lr=0.1)),
    "hooked within": lambda parameters: Lookahead(hooked(SGD(parameters, lr=0.1, momentum=0.9))),
    "counting": lambda parameters: Counting(parameters, lr=0.1, momentum=0.9),
}


def train(model, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.arange(20.0).view(4, 5)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("how", ["load", "broadcast"])
def test_a_run_goes_on_as_one_that_was_not_ended(tmp_path, kind, how):
    """It differed by 0.16, and replicas from each other, where the state lay elsewhere."""

    def main(comm):
        model, other = network(1), network(2)
        for frozen in (model, other):
            frozen[0].bias.requires_grad_(False)
        optimizer, new = (KINDS[kind]([*m.parameters()]) for m in (model, other))
        train(model, optimizer, 3)
        if how == "load":
            ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
            ringfold.load(tmp_path, {"m": other, "o": new}, comm)
        else:
            other.load_state_dict(model.state_dict())
            if comm.rank == 1:  # torch copies no tensors itself
                new.load_state_dict(deepcopy(optimizer.state_dict()))
            broadcast_optimizer(new, comm, root=1)
        same(new.state_dict(), optimizer.state_dict())
        train(model, optimizer, 3)
        train(other, new, 3)
        same(other.state_dict(), model.state_dict())
        same(new.state_dict(), optimizer.state_dict())

    run_local(2, main)


@pytest.mark.parametrize("kind", ["wrapped", "hooked"])
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (2, 2)])
def test_it_fits_another_split(tmp_path, kind, before, after):
    """Two groups, and layers of another stage."""

    def make(comm, seed, cut):
        cuts = None if comm.size == 1 else [cut]
        engine = Pipeline(
            network(seed),
            Mesh(comm, pipe=comm.size),
            loss_fn=nn.functional.mse_loss,
            boundaries=cuts,
        )
        rows = [[p for p in engine.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
        return engine, KINDS[kind]([{"params": row} for row in rows])

    def step(engine, optimizer, scale):
        for name, p in engine.named_parameters():
            p.grad = torch.full_like(p, scale * (1 + sum(map(ord, name)) % 97))
        optimizer.step()

    def write(comm):
        engine, optimizer = make(comm, 1, 2)
        step(engine, optimizer, 1.0)
        step(engine, optimizer, -0.5)
        ringfold.save(tmp_path, {"m": engine, "o": optimizer}, comm)

    def read(comm):
        engine, optimizer = make(comm, 5, 3)
        ringfold.load(tmp_path, {"m": engine, "o": optimizer}, comm)
        other, expected = make(comm, 1, 3)
        step(other, expected, 1.0)
        step(other, expected, -0.5)
        same(optimizer.state_dict(), expected.state_dict())
        step(engine, optimizer, 1.0)
        step(other, expected, 1.0)
        same(engine.state_dict(), other.state_dict())

    run_local(before, write)
    run_local(after, read)


class Wide(torch.optim.Optimizer):
    """Keeps float32 for parameters of bfloat16; torch's load_state_dict would round it."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    def step(self):
        for p in self.param_groups[0]["params"]:
            entry = self.state[p]
            entry.setdefault("sum", torch.zeros(p.shape)).add_(1 / 3)
            entry.setdefault("mean", torch.tensor(1 / 3))


@pytest.mark.parametrize("kind", ["wrapped", "hooked"])
def test_state_keeps_its_dtype_beside_narrower_parameters(tmp_path, kind):
    def main(comm):
        model = network(1).bfloat16()
        wrap = Lookahead if kind == "wrapped" else hooked
        optimizers = [wrap(Wide(model.parameters())) for _ in range(3)]
        optimizers[0].step()
        ringfold.save(tmp_path, {"m": model, "o": optimizers[0]}, comm)
        ringfold.load(tmp_path, {"m": model, "o": optimizers[1]}, comm)
        if comm.rank == 0:
            optimizers[2].step()
        broadcast_optimizer(optimizers[2], comm)
        for optimizer in optimizers:
            entry = optimizer.state_dict()["state"][0]
            assert entry["sum"].dtype == entry["mean"].dtype == torch.float32
            assert entry["sum"].eq(1 / 3).all() and entry["mean"] == torch.tensor(1 / 3)

    run_local(2, main)


class Apart(torch.optim.Optimizer):
    """Its state_dict is of another form than torch's."""

    def __init__(self, inner):
        super().__init__(inner.param_groups, inner.defaults)
        self.inner = inner

    def state_dict(self):
        return {"inner": self.inner.state_dict(), "mean": 1.0}


class Numbers(Apart):
    def state_dict(self):
        found = self.inner.state_dict()
        return {**found, "state": {7: {}}}


@pytest.mark.parametrize(
    ("kind", "says"),
    [
        (Apart, r"the state_dict of Apart gives \['inner', 'mean'\], not 'state' .*that it wraps"),
        (Numbers, "the state_dict of Numbers gives state of 7, which its groups do not list"),
    ],
)
def test_a_state_dict_that_does_not_tell_whose_state_it_holds_is_refused(tmp_path, kind, says):
    def main(comm):
        model = network(1)
        inner = Adam(model.parameters())
        train(model, inner, 1)
        optimizer = kind(inner)
        with pytest.raises(CheckpointError, match=f"o: {says}"):
            ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        with pytest.raises(TypeError, match=says):
            broadcast_optimizer(optimizer, comm)
        ringfold.save(tmp_path, {"m": model, "o": inner}, comm)
        before = [p.clone() for p in model.parameters()]
        train(model, inner, 1)
        after = [p.clone() for p in model.parameters()]
        with pytest.raises(CheckpointError, match=f"o: {says}"):
            ringfold.load(tmp_path, {"m": model, "o": optimizer}, comm)
        same(list(map(torch.Tensor.detach, model.parameters())), after)
        assert not torch.equal(before[0], after[0])

    run_local(2, main)


def test_what_a_hook_raises_on_one_rank_is_told_on_all_and_changes_nothing(tmp_path):
    def main(comm):
        model, other = network(1), network(2)
        optimizer, new = KINDS["wrapped"](model.parameters()), KINDS["wrapped"](other.parameters())
        train(model, optimizer, 1)
        train(other, new, 2)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        before = [{k: v.clone() for k, v in new.inner.state[p].items()} for p in other.parameters()]
        weights = [p.clone() for p in other.parameters()]

        def fail(*_):
            raise KeyError("of a newer version")

        handle = new.inner.register_load_state_dict_post_hook(fail) if comm.rank else None
        says = "rank 1: o did not take its state: KeyError: .*; nothing is changed"
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path, {"m": other, "o": new}, comm)
        same([new.inner.state[p] for p in other.parameters()], before)
        same([p.detach() for p in other.parameters()], [w.detach() for w in weights])
        assert new.param_groups[0]["steps"] == 2
        says = "state of the optimizer, on rank 1: Lookahead did not take it: KeyError"
        with pytest.raises(ValueError, match=says):
            broadcast_optimizer(new, comm)

        if handle is not None:
            handle.remove()
            new.inner.register_state_dict_pre_hook(fail)
        state = {"m": other, "o": new}
        with pytest.raises(CheckpointError, match="rank 1: o did not tell its state: KeyError"):
            ringfold.save(tmp_path, state, comm)
        with pytest.raises(CheckpointError, match="o did not tell its state: KeyError"):
            ringfold.load(tmp_path, state, comm)
        with pytest.raises(ValueError, match="on rank 1: Lookahead did not tell its state: KeyEr"):
            broadcast_optimizer(new, comm)

    run_local(2, main)


def test_what_hooks_add_is_one_thing_on_all_ranks(tmp_path):
    def main(comm):
        model = network(1)
        optimizer = Adam(model.parameters())
        told = {"more": torch.full((9,), 1.0 + comm.rank)}
        optimizer.register_state_dict_post_hook(lambda o, state: {**state, **told})
        with pytest.raises(CheckpointError, match="o/beside/more/more is another tensor on rank 0"):
            ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        told["more"] = comm.rank
        with pytest.raises(CheckpointError, match="o/beside differs between ranks: rank 0 has"):
            ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)

    run_local(2, main)


def test_a_checkpoint_of_an_optimizer_without_what_hooks_add_is_loaded(tmp_path):
    """As of another optimizer, or of a version that did not keep it: what there is stays."""

    def main(comm):
        model = network(1)
        plain = Adam(model.parameters(), lr=0.1)
        train(model, plain, 2)
        new = hooked(Adam(model.parameters(), lr=0.2))
        mean = new.state_dict()["more"]["mean"].fill_(7)
        for old in (False, True):
            ringfold.save(tmp_path / f"{old}", {"m": model, "o": plain}, comm)
            if old:
                rewrite(
                    tmp_path / f"{old}",
                    lambda m: {k: v for k, v in m.values.items() if k != "o/beside"},
                )
            ringfold.load(tmp_path / f"{old}", {"m": model, "o": new}, comm)
            found = new.state_dict()
            assert found.pop("more")["mean"] is mean and mean.tolist() == [7, 7]
            same(found, plain.state_dict())

    run_local(1, main)


def test_one_that_shares_the_state_of_another_goes_on_sharing_it(tmp_path):
    """Torch's own load_state_dict gives it state and groups that the other does not know of."""

    def main(comm):
        model = network(1)
        inner = Adam(model.parameters(), lr=0.1)
        outer = hooked(SGD(model.parameters(), lr=0.1))
        outer.state, outer.param_groups, outer.defaults = inner.state, inner.param_groups, {}
        train(model, inner, 2)
        ringfold.save(tmp_path, {"m": model, "o": outer}, comm)
        kept = [inner.state[p]["exp_avg"].clone() for p in model.parameters()]
        train(model, inner, 1)
        inner.param_groups[0]["lr"] = 7.0
        ringfold.load(tmp_path, {"m": model, "o": outer}, comm)
        assert outer.state is inner.state and inner.param_groups[0]["lr"] == 0.1
        same([inner.state[p]["exp_avg"] for p in model.parameters()], kept)

    run_local(1, main)


def test_hooks_of_a_sharded_optimizer(tmp_path):
    """They were not called; and an optimizer with hooks of its own cannot be sharded."""

    def main(comm):
        def make(seed):
            model = network(seed)
            return model, hooked(ShardedOptimizer(model.named_parameters(), comm, Adam, lr=0.1))

        model, optimizer = make(1)
        train(model, optimizer, 2)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        new = [make(2), make(3)]
        ringfold.load(tmp_path, {"m": new[0][0], "o": new[0][1]}, comm)
        new[1][1].load_state_dict(optimizer.state_dict())
        for _, sharded in new:
            same(sharded.state_dict(), optimizer.state_dict())
            assert sharded.state_dict()["more"]["mean"].tolist() == [2, 2]
        whole = hooked(Adam(model.parameters(), lr=0.1))
        ringfold.load(tmp_path, {"m": model, "o": whole}, comm)
        assert whole.state_dict()["more"]["mean"].tolist() == [2, 2]

        class Own(Adam):
            def load_state_dict(self, state):
                super().load_state_dict(state)

        class Hooked(Adam):
            def __init__(self, *args, **kwargs):
                super().__init__(*args, **kwargs)
                hooked(self)

        for kind in (Own, Hooked):
            with pytest.raises(TypeError, match=f"{kind.__name__} cannot be sharded: it has a sta"):
                ShardedOptimizer(model.named_parameters(), comm, kind)

    run_local(2, main)
