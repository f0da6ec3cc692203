"""A wrapper around a part of a model: a checkpoint calls all as without it."""

import pytest
import torch
from checkpointed import LOCK, rewrite, same
from torch import nn

import ringfold
from ringfold import CheckpointError, DataParallel, Mesh, Pipeline, ShardedOptimizer, run_local

HOWS = ["plain", "part", "whole", "both"]


def parent(comm, seed, how):
    """A body with a block, each perhaps within a wrapper, and a head."""
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        body, head = nn.Sequential(nn.Linear(3, 4), nn.Tanh()), nn.Linear(4, 2)
    model = nn.ModuleDict({"body": body, "head": head})
    if how in ("part", "both"):
        model["body"] = DataParallel(body, comm)
    return DataParallel(model, comm) if how in ("whole", "both") else model


def adam(model, comm, sharded):
    if sharded:
        return ShardedOptimizer(model.named_parameters(), comm, torch.optim.Adam, lr=0.1)
    return torch.optim.Adam(model.parameters(), lr=0.1)


def stepped(model, optimizer):
    for place, parameter in enumerate(model.parameters()):
        parameter.grad = torch.full_like(parameter, 1.0 + place)
    optimizer.step()


def moments(optimizer):
    return [entry["exp_avg"] for entry in optimizer.state_dict()["state"].values()]


@pytest.mark.parametrize("sharded", [False, True])
@pytest.mark.parametrize("how", HOWS)
def test_an_optimizer_goes_on_whether_a_part_is_wrapped_or_not(tmp_path, how, sharded):
    """Its names were those of parent.named_parameters(), which has the wrapper's place in them."""
    after = {"plain": "part", "part": "plain", "whole": "both", "both": "plain"}

    def main(comm):
        model = parent(comm, 1, how)
        optimizer = adam(model, comm, sharded)
        stepped(model, optimizer)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        for other_how, other_sharded in ((after[how], sharded), (after[how], not sharded)):
            other = parent(comm, 2, other_how)
            fresh = adam(other, comm, other_sharded)
            ringfold.load(tmp_path, {"m": other, "o": fresh}, comm)
            same(moments(optimizer), moments(fresh))
            same([*model.parameters()], [*other.parameters()])

    run_local(2, main)


@pytest.mark.parametrize("sharded", [False, True])
def test_names_with_the_place_of_a_wrapper_in_them_are_still_loaded(tmp_path, sharded):
    def main(comm):
        state = {"m": parent(comm, 1, "part"), "a": parent(comm, 3, "plain")}
        state["o"] = optimizer = adam(state["m"], comm, sharded)
        stepped(state["m"], optimizer)
        ringfold.save(tmp_path, state, comm)
        if comm.rank == 0:
            rewrite(tmp_path, with_places)
        comm.barrier()
        other = {"m": parent(comm, 2, "part"), "a": parent(comm, 4, "plain")}
        other["o"] = adam(other["m"], comm, sharded)
        ringfold.load(tmp_path, other, comm)
        same(moments(optimizer), moments(other["o"]))

    def with_places(manifest):
        values = {key.replace("m:body.", "body.module."): v for key, v in manifest.values.items()}
        values = {key.replace("/body.0", "/body.module.0"): v for key, v in values.items()}
        assert values.keys() != manifest.values.keys()
        return values

    run_local(2, main)


def test_a_sharded_optimizers_own_names_are_as_without_the_wrapper(tmp_path):
    """As of one for two models, whose names the program has made unique."""

    def main(comm, how, save):
        models = {"g": parent(comm, 1, how), "d": parent(comm, 2, how)}
        named = [(f"{k}.{n}", p) for k, m in models.items() for n, p in m.named_parameters()]
        optimizer = ShardedOptimizer(named, comm, torch.optim.Adam, lr=0.1)
        if save:
            stepped(nn.ModuleDict(models), optimizer)
            ringfold.save(tmp_path, {**models, "o": optimizer}, comm)
        else:
            ringfold.load(tmp_path, {"o": optimizer}, comm)
        return moments(optimizer)

    saved = run_local(2, lambda comm: main(comm, "part", True))
    same(saved, run_local(2, lambda comm: main(comm, "plain", False)))


def test_a_wrapped_layer_of_a_pipeline_goes_on_without_its_wrapper(tmp_path):
    def engine(comm, how):
        mesh = Mesh(comm, data=comm.size)
        made = Pipeline([*parent(mesh.data, 1, how).values()], mesh, loss_fn=nn.functional.mse_loss)
        return made, adam(made, comm, False)

    def main(comm):
        model, optimizer = engine(comm, "part")
        stepped(model, optimizer)
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        plain, fresh = engine(comm, "plain")
        ringfold.load(tmp_path, {"m": plain, "o": fresh}, comm)
        same(moments(optimizer), moments(fresh))

    run_local(2, main)


@pytest.mark.parametrize("how", HOWS)
def test_parts_that_ranks_train_apart_are_refused_within_a_wrapper_as_well(tmp_path, how):
    """One rank's was saved for all without a word, where a group of its own had wrapped it."""

    def main(comm):
        model = parent(comm.split(comm.rank), 1 + comm.rank, how)
        with torch.no_grad():
            for name, p in model.named_parameters():
                p.fill_(1.0 + comm.rank * ("body" in name))
        with pytest.raises(CheckpointError, match=r"m/body\.0\.weight is another tensor on rank 0"):
            ringfold.save(tmp_path, {"m": model}, comm)

    run_local(2, main)
