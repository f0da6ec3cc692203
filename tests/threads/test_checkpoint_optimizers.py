"""Optimizers in checkpoints: of several models, in groups of any kind, and of another kind."""

import re

import pytest
import torch
from checkpointed import groups, network, rewrite, same, trained
from torch import nn

import ringfold
from ringfold import CheckpointError, Mesh, Pipeline, run_local
from ringfold.parallel.checkpoint.handover import hand_over


def two_models(comm, seed, pipe):
    """Two models with the same names, and one optimizer of both."""
    pair = [network(seed), network(seed + 100)]
    if pipe:  # cut at other places, so that ranks hold one name of different models
        mesh, loss_fn = Mesh(comm, pipe=comm.size), nn.functional.mse_loss
        cuts = [[2], [3]] if comm.size > 1 else [None, None]
        pair = [
            Pipeline(m, mesh, loss_fn=loss_fn, boundaries=b)
            for m, b in zip(pair, cuts, strict=True)
        ]
    g, d = pair
    return g, d, torch.optim.Adam([*g.parameters(), *d.parameters()], lr=0.1)


def filled(g, d, optimizer):
    """Give every parameter a state that tells by its numbers whose it is."""
    for place, model in enumerate((g, d)):
        for name, parameter in model.named_parameters():
            value = 100.0 * place + sum(map(ord, name)) % 97
            optimizer.state[parameter] = {
                "step": torch.tensor(3.0 + place),
                "exp_avg": torch.full_like(parameter, value),
                "exp_avg_sq": torch.full_like(parameter, -value),
            }
    return optimizer


@pytest.mark.parametrize(("before", "after"), [(0, 0), (2, 2), (2, 0), (0, 2), (2, 1)])
def test_one_optimizer_of_two_models_with_the_same_names(tmp_path, before, after):
    """0 ranks: one rank without a pipeline."""

    def write(comm):
        g, d, optimizer = two_models(comm, 1, before)
        state = {"g": g, "d": d, "o": filled(g, d, optimizer), "o2": optimizer}
        ringfold.save(tmp_path, state, comm)

    def read(comm):
        g, d, optimizer = two_models(comm, 5, after)
        ringfold.load(tmp_path, {"d": d, "g": g, "o": optimizer}, comm)
        g2, d2, expected = two_models(comm, 5, after)
        same(optimizer.state_dict(), filled(g2, d2, expected).state_dict())
        # A state of one of them has its own part.
        alone = torch.optim.Adam(d.parameters(), lr=0.1)
        ringfold.load(tmp_path, {"d": d, "o": alone}, comm)
        same([alone.state[p] for p in d.parameters()], [optimizer.state[p] for p in d.parameters()])

    run_local(max(before, 1), write)
    run_local(max(after, 1), read)


def without_module_names(manifest):
    """Return a manifest's values with names as they were before modules were in them."""
    return {re.sub(r"^(o/\w+/)[gd]:", r"\1", key): v for key, v in manifest.values.items()}


def test_a_checkpoint_without_module_names_is_loaded_where_it_tells_names_apart(tmp_path):
    def make(seed):
        g, d = network(seed), nn.Sequential(*[nn.Identity()] * 5, nn.Linear(3, 2))
        return g, d, torch.optim.Adam([*g.parameters(), *d.parameters()])

    def main(comm):
        g, d, optimizer = make(1)
        ringfold.save(tmp_path / "apart", {"g": g, "d": d, "o": filled(g, d, optimizer)}, comm)
        rewrite(tmp_path / "apart", without_module_names)
        g2, d2, other = make(2)
        ringfold.load(tmp_path / "apart", {"g": g2, "d": d2, "o": other}, comm)
        same(optimizer.state_dict(), other.state_dict())

        g, d, optimizer = two_models(comm, 1, 0)
        ringfold.save(tmp_path / "alike", {"g": g, "d": d, "o": filled(g, d, optimizer)}, comm)
        rewrite(tmp_path / "alike", without_module_names)
        before = {name: value.clone() for name, value in g.state_dict().items()}
        says = (
            r"o/state/0\.weight: the checkpoint .* whether it is of g:0\.weight or of d:0\.weight"
        )
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path / "alike", {"g": g, "d": d, "o": optimizer}, comm)
        same(before, dict(g.state_dict()))

    run_local(1, main)


def test_a_sharded_optimizer_beside_two_models_and_the_whole_one_go_on_from_each_other(tmp_path):
    def make(comm, sharded, seed):
        model, average = network(seed), network(seed + 1)
        optimizer = (
            ringfold.ShardedOptimizer(model.named_parameters(), comm, torch.optim.Adam, lr=0.1)
            if sharded
            else torch.optim.Adam(model.parameters(), lr=0.1)
        )
        return {"average": average, "model": model, "o": optimizer}

    def main(comm):
        for sharded in (False, True):
            state = make(comm, sharded, 1)
            state["model"](torch.arange(20.0).view(4, 5)).square().mean().backward()
            state["o"].step()
            ringfold.save(tmp_path / f"{sharded}", state, comm)
            other = make(comm, not sharded, 5)
            ringfold.load(tmp_path / f"{sharded}", other, comm)
            found = []
            for optimizer, model in ((s["o"], s["model"]) for s in (state, other)):
                rows = optimizer.state_dict()["state"].values()
                found.append([row["exp_avg"] for row in rows] + [*model.parameters()])
            same(*found)

    run_local(2, main)


def rate(name):
    return 0.01 * (1 + sum(map(ord, name)) % 97)


def by_layer(comm, seed, cut):
    """Give each parameter a group and a rate of its own, as with rates that decay by layer."""
    mesh = Mesh(comm, pipe=comm.size)
    cuts = None if comm.size == 1 else [cut]
    tied = network(seed).append(nn.Linear(3, 7)).append(nn.Linear(7, 7))
    tied[6].weight = tied[2].weight  # of other groups on other stages, and of one rate
    engine = Pipeline(tied, mesh, loss_fn=nn.functional.mse_loss, boundaries=cuts)
    groups = [{"params": [p], "lr": rate(n) * seed} for n, p in engine.named_parameters()]
    return engine, torch.optim.SGD(groups, lr=0.1, momentum=0.9)


@pytest.mark.parametrize(("before", "after"), [(2, 2), (2, 1), (1, 2)])
def test_each_stage_of_a_pipeline_may_have_groups_of_its_own(tmp_path, before, after):
    def write(comm):
        engine, optimizer = by_layer(comm, 1, 3)
        ringfold.save(tmp_path, {"m": engine, "o": optimizer}, comm)

    def read(comm):
        engine, optimizer = by_layer(comm, 5, 4)
        ringfold.load(tmp_path, {"m": engine, "o": optimizer}, comm)
        names = {p: n for n, p in engine.named_parameters()}
        return [(names[g["params"][0]], g["lr"]) for g in optimizer.param_groups]

    run_local(before, write)
    found = dict(row for rows in run_local(after, read) for row in rows)
    assert found == {name: rate(name) for name in found} and len(found) == 8


@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 2), (2, 1)])
def test_a_group_without_parameters_on_a_rank_has_the_rate_of_the_others(tmp_path, before, after):
    def make(comm, lr):
        mesh = Mesh(comm, pipe=comm.size)
        layers = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2, bias=False))
        engine = Pipeline(layers, mesh, loss_fn=nn.functional.mse_loss)
        rows = [[p for p in engine.parameters() if (p.dim() > 1) == wide] for wide in (True, False)]
        groups = [{"params": row, "lr": lr * (i + 1)} for i, row in enumerate(rows)]
        return engine, torch.optim.SGD(groups, lr=lr)

    def main(comm, load):
        engine, optimizer = make(comm, 3.0 if load else 0.5)
        state = {"m": engine, "o": optimizer}
        ringfold.load(tmp_path, state, comm) if load else ringfold.save(tmp_path, state, comm)
        return [(len(group["params"]), group["lr"]) for group in optimizer.param_groups]

    run_local(before, lambda comm: main(comm, False))
    rows = run_local(after, lambda comm: main(comm, True))
    assert all([lr for _, lr in row] == [0.5, 1.0] for row in rows)
    assert (0 in [number for number, _ in rows[-1]]) == (after == 2)


def test_a_group_without_parameters_keeps_its_rate_where_others_of_its_number_differ(tmp_path):
    """Nobody can tell which of them it is."""

    def write(comm):
        engine, optimizer = by_layer(comm, 1, 3)
        ringfold.save(tmp_path, {"m": engine, "o": optimizer}, comm)

    def read(comm):
        engine, optimizer = by_layer(comm, 5, 4)
        groups = [{"params": [], "lr": 7.0}, *optimizer.param_groups]
        optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
        ringfold.load(tmp_path, {"m": engine, "o": optimizer}, comm)
        return [group["lr"] for group in optimizer.param_groups]

    run_local(2, write)
    for first, *others in run_local(2, read):
        assert first == 7.0 and len(others) >= 3 and max(others) < 1


def test_groups_are_joined_where_they_are_alike_and_divided_into_copies(tmp_path):
    def groups(model, *rates):
        rows = zip((model[0].parameters(), model[4].parameters()), rates, strict=True)
        rows = [{"params": list(part), "lr": torch.tensor(rate)} for part, rate in rows]
        return torch.optim.Adam(rows)

    def main(comm):
        for name, rates in (("alike", (0.25, 0.25)), ("other", (0.25, 0.5))):
            model = network(1)
            ringfold.save(tmp_path / name, {"m": model, "o": groups(model, *rates)}, comm)
        model = network(2)
        both = [*model[0].parameters(), *model[4].parameters()]
        joined = torch.optim.Adam(both, lr=torch.tensor(0.75))
        ringfold.load(tmp_path / "alike", {"m": model, "o": joined}, comm)
        assert joined.param_groups[0]["lr"].item() == 0.25
        says = r"o: parameter group 0 holds 0\.weight and 4\.weight, which differ in lr"
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path / "other", {"m": model, "o": joined}, comm)

        ringfold.save(tmp_path / "joined", {"m": model, "o": joined}, comm)
        divided = groups(model, 1.0, 1.0)
        ringfold.load(tmp_path / "joined", {"m": model, "o": divided}, comm)
        divided.param_groups[0]["lr"].fill_(7.0)
        assert divided.param_groups[1]["lr"].item() == 0.25

    run_local(1, main)


def test_replicas_with_other_rates_are_refused_by_their_rates(tmp_path):
    def main(comm):
        model, optimizer = trained(1)
        optimizer.param_groups[0]["lr"] = 0.25 * (1 + comm.rank)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)

    says = (
        r"o/group_of/0\.weight differs between ranks: rank 0 has .*'lr', 0\.25.* 1 has .*'lr', 0\.5"
    )
    with pytest.raises(CheckpointError, match=says):
        run_local(2, main)


def test_a_checkpoint_with_numbered_groups_is_loaded(tmp_path):
    """As they were written before stages could have groups of their own."""

    def numbered(manifest):
        values = dict(manifest.values)
        numbers = {
            v: int(k.split("/")[2]) for k, v in values.items() if k.startswith("o/group_at/")
        }
        for key, value in manifest.values.items():
            if key in numbers:
                values[f"o/groups/{numbers[key]}"] = values.pop(key)
            elif key.startswith("o/group_of/"):
                values[key] = numbers[value]
            elif key.startswith("o/group_at/"):
                del values[key]
        return values

    def main(comm):
        model, optimizer = trained(1, groups)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        rewrite(tmp_path, numbered)
        fresh = network(2)
        other = groups(fresh)
        for group in other.param_groups:
            group["lr"] = 7.0
        ringfold.load(tmp_path, {"m": fresh, "o": other}, comm)
        same(optimizer.state_dict(), other.state_dict())
        one = torch.optim.Adam(fresh.parameters())
        with pytest.raises(CheckpointError, match="which differ in lr in the checkpoint of step 0"):
            ringfold.load(tmp_path, {"m": fresh, "o": one}, comm)

    run_local(1, main)


class OwnAdam(torch.optim.Adam):
    """Torch's, with a hyper-parameter more."""

    def __init__(self, params, lr=0.1, warmup=10):
        super().__init__(params, lr=lr)
        for group in self.param_groups:
            group["warmup"] = warmup


class Wrapped(torch.optim.Optimizer):
    """Another optimizer behind torch's interface."""

    def __init__(self, params, of=torch.optim.Adam):
        inner = of(params, lr=0.1)
        super().__init__(inner.param_groups, inner.defaults)
        self.param_groups, self.state, self.step = inner.param_groups, inner.state, inner.step


class Own(torch.optim.Optimizer):
    def __init__(self, params):
        super().__init__(params, {"lr": 0.1, "own": 1})


KINDS = {
    "SGD": torch.optim.SGD,
    "Adam": torch.optim.Adam,
    "AdamW": torch.optim.AdamW,
    "Adamax": torch.optim.Adamax,
    "OwnAdam": OwnAdam,
    "Wrapped": Wrapped,
    "Own": Own,
}


@pytest.mark.parametrize("kept", ["SGD", "Adam", "Adamax", "OwnAdam", "Wrapped"])
def test_the_state_of_another_kind_of_optimizer_is_refused_by_both_names(tmp_path, kept):
    def make(kind, model, comm):
        if kind == "sharded":
            named = model.named_parameters()
            return ringfold.ShardedOptimizer(named, comm, torch.optim.Adam, lr=0.1)
        return KINDS[kind](model.parameters())

    def main(comm):
        fits = {"Adam", "OwnAdam", "Wrapped", "sharded"}
        model, optimizer = trained(1, lambda m: make(kept, m, comm))
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        for kind in (*KINDS, "sharded"):
            other = network(2)
            own = make(kind, other, comm)
            before = {name: value.clone() for name, value in other.state_dict().items()}
            state = {"m": other, "o": own}
            # What is wrapped is not known; AdamW has the hyper-parameters of Adam.
            if kind == kept or {kind, kept} <= fits or {kind, kept} == {"Wrapped", "AdamW"}:
                ringfold.load(tmp_path, state, comm)
                other(torch.ones(4, 5)).square().mean().backward()
                own.step()
                continue
            name = "Adam" if kind == "sharded" else kind
            says = rf"o: expected the state of {name} \(.*lr.* step 0 has that of {kept} \(.*lr"
            with pytest.raises(CheckpointError, match=says):
                ringfold.load(tmp_path, state, comm)
            same(before, dict(other.state_dict()))

    run_local(1, main)


def test_an_optimizer_whose_kind_was_not_kept_is_loaded(tmp_path):
    def main(comm):
        model, optimizer = trained(1)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        rewrite(tmp_path, lambda m: {k: v for k, v in m.values.items() if k != "o/kind"})
        fresh = network(2)
        other = torch.optim.AdamW(fresh.parameters())
        ringfold.load(tmp_path, {"m": fresh, "o": other}, comm)
        same(optimizer.state_dict(), other.state_dict())

    run_local(1, main)


def strided(seed):
    layers = nn.Sequential(nn.Conv2d(3, 4, 2), nn.Conv2d(4, 2, 2))
    layers.to(memory_format=torch.channels_last)
    layers.register_parameter("scale", nn.Parameter(torch.ones(2, 3).t()))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in layers.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return layers, torch.optim.Adam(layers.parameters(), lr=0.1, fused=True)


@pytest.mark.parametrize("how", ["load", "hand_over"])
def test_state_lies_in_memory_as_the_parameters_do(tmp_path, how):
    """A fused optimizer that went on mixed up the elements of moments and parameters."""

    def train(layers, optimizer):
        for parameter in layers.parameters():
            parameter.grad = parameter.detach().sin()
        optimizer.step()

    def main(comm):
        old, new = strided(1), strided(2)
        train(*old)
        if how == "load":
            ringfold.save(tmp_path, {"m": old[0], "o": old[1]}, comm)
            ringfold.load(tmp_path, {"m": new[0], "o": new[1]}, comm)
        else:
            hand_over(
                comm,
                {} if comm.rank else {"m": old[0], "o": old[1]},
                {"m": new[0], "o": new[1]},
            )
        for parameter in new[0].parameters():
            assert new[1].state[parameter]["exp_avg_sq"].stride() == parameter.stride()
        train(*old)
        train(*new)
        same(new[0].state_dict(), old[0].state_dict())

    run_local(2, main)


@pytest.mark.parametrize("sharded", [False, True])
def test_state_that_no_ranks_optimizer_takes_is_refused_on_all(tmp_path, sharded):
    """Of layers that are unfrozen later: an optimizer of the head alone dropped their state."""

    def make(comm, seed, *places):
        model = network(seed)
        groups = [{"params": list(model[k].named_parameters(prefix=str(k)))} for k in places]
        if sharded:
            return model, ringfold.ShardedOptimizer(groups, comm, torch.optim.Adam, lr=0.1)
        for group in groups:
            group["params"] = [parameter for _, parameter in group["params"]]
        return model, torch.optim.Adam(groups, lr=0.1)

    def main(comm):
        model, optimizer = make(comm, 1, 4, 2, 0)
        model[0].bias.requires_grad_(False)  # has no state, and is missed by nobody
        model(torch.arange(20.0).view(4, 5)).square().mean().backward()
        optimizer.step()
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        fresh, head = make(comm, 2, 4)
        before = fresh[4].weight.clone()
        says = r"0\.weight, 2\.weight of its o/state are on no rank: give the optimizer their"
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path, {"m": fresh, "o": head}, comm)
        same(before.detach(), fresh[4].weight.detach())
        for place in (2, 0):
            own = [("0.weight", fresh[0].weight)] if place == 0 else [("2.weight", fresh[2].weight)]
            head.add_param_group({"params": own if sharded else [p for _, p in own]})
        ringfold.load(tmp_path, {"m": fresh, "o": head}, comm)
        same(fresh[2].weight.detach(), model[2].weight.detach())

    run_local(2, main)


def test_ranks_may_have_optimizers_of_other_parameters_each_and_what_one_lacks_is_told_on_all(
    tmp_path,
):
    def make(comm, seed, *places):
        model = network(seed)
        params = [p for k in places for p in model[k].parameters()]
        return model, torch.optim.SGD(params, lr=0.0, momentum=0.9)

    def main(comm):
        model, optimizer = make(comm, 1, 2 * comm.rank, 4)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        ringfold.save(tmp_path, {"m": model, "o": optimizer, f"o{comm.rank}": optimizer}, comm)
        fresh, other = make(comm, 2, 2 * comm.rank, 4)
        # Each rank takes a part of the state, and together all of it.
        ringfold.load(tmp_path, {"m": fresh, "o": other, f"o{comm.rank}": other}, comm)
        same(optimizer.state_dict(), other.state_dict())
        own = torch.optim.SGD(fresh[0].parameters(), momentum=0.9)
        state = {"m": fresh, f"o{comm.rank}": other if comm.rank else own}
        with pytest.raises(CheckpointError, match=r"4\.bias, 4\.weight of its o0/state are on no"):
            ringfold.load(tmp_path, state, comm)

    run_local(2, main)
