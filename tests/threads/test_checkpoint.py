"""Checkpoints on ranks as threads: what comes back, and what does not fit."""

import pytest
import torch
from checkpointed import groups, network, same, three_of_them, trained
from safetensors.torch import load_file
from torch import nn

import ringfold
from ringfold import CheckpointError, Checkpoints, Mesh, Pipeline, run_local

OPTIMIZERS = {
    "adamw": lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9)),
    "sgd": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "momentum": lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9, nesterov=True),
    "groups": groups,
}


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("size", [1, 2, 3])
def test_a_model_and_its_optimizer_come_back_to_the_last_bit(tmp_path, size, kind):
    def main(comm):
        model, optimizer = trained(1, OPTIMIZERS[kind])
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm, step=3)
        fresh = network(2)
        other = OPTIMIZERS[kind](fresh)
        for group in other.param_groups:
            group["lr"] = 7.0
        loaded = ringfold.load(tmp_path, {"m": fresh, "o": other}, comm)
        assert loaded.step == 3 and loaded.damaged == ()
        same(dict(model.state_dict()), dict(fresh.state_dict()))
        same(optimizer.state_dict(), other.state_dict())
        assert type(other.param_groups[0]["lr"]) is float

    run_local(size, main)


@pytest.mark.parametrize("grid", [(1, 1), (2, 1), (1, 2), (4, 1), (1, 4), (1, 3), (3, 1)])
def test_a_checkpoint_of_two_by_two_fits_every_grid(tmp_path, grid):
    whole, whole_optimizer = trained(1)
    state = {i: whole_optimizer.state[p] for i, p in whole.named_parameters()}

    def split(comm, data, pipe, seed):
        mesh = Mesh(comm, data=data, pipe=pipe)
        engine = Pipeline(network(seed), mesh, loss_fn=nn.functional.mse_loss, microbatches=2)
        optimizer = torch.optim.AdamW(engine.parameters(), lr=0.01, betas=(0.8, 0.9))
        return engine, optimizer

    def write(comm):
        engine, optimizer = split(comm, 2, 2, 5)
        engine.load_state_dict(whole.state_dict())
        for name, parameter in engine.named_parameters():
            optimizer.state[parameter] = {k: v.clone() for k, v in state[name].items()}
        ringfold.save(tmp_path, {"model": engine, "opt": optimizer}, comm, step=1)

    def read(comm):
        engine, optimizer = split(comm, *grid, 6)
        ringfold.load(tmp_path, {"model": engine, "opt": optimizer}, comm)
        found = {n: optimizer.state[p] for n, p in engine.named_parameters()}
        return dict(engine.state_dict()), found

    run_local(4, write)
    files = sorted((tmp_path / "000001-step-1").glob("*.safetensors"))
    assert len(files) == 4 and all(load_file(file) for file in files)  # all four ranks have written
    names, states = set(), {}
    for tensors, found in run_local(grid[0] * grid[1], read):
        for name, tensor in tensors.items():
            same(tensor, whole.state_dict()[name])
        names |= tensors.keys()
        states |= found
    assert names == set(whole.state_dict())
    same(states, state)


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (2, 0), (0, 2)])
def test_a_sharded_optimizer_goes_on_sharded_otherwise_or_whole(tmp_path, before, after):
    """0 ranks: one rank with torch's own optimizer."""

    def make(comm, model, sharded):
        if not sharded:
            return torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.8, 0.9))
        named = model.named_parameters()
        return ringfold.ShardedOptimizer(
            named, comm, torch.optim.AdamW, lr=0.01, betas=(0.8, 0.9), reduce=False
        )

    def write(comm):
        model = network(1)
        optimizer = make(comm, model, before)
        for step in range(3):
            optimizer.zero_grad()
            model(torch.arange(20.0).view(4, 5) + step).square().mean().backward()
            optimizer.step()
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm, step=3)

    def read(comm):
        model = network(2)
        optimizer = make(comm, model, after)
        optimizer.param_groups[0]["lr"] = 3.0
        ringfold.load(tmp_path, {"m": model, "o": optimizer}, comm)
        optimizer.zero_grad()
        model(torch.arange(20.0).view(4, 5) + 3).square().mean().backward()
        optimizer.step()
        return model

    run_local(max(before, 1), write)
    expected, optimizer = trained(1)
    optimizer.zero_grad()
    expected(torch.arange(20.0).view(4, 5) + 3).square().mean().backward()
    optimizer.step()
    for model in run_local(max(after, 1), read):
        same(dict(model.state_dict()), dict(expected.state_dict()))


def test_a_model_without_memory_is_not_loaded_into(tmp_path):
    """torch's load only warns that it does nothing."""

    def main(comm):
        ringfold.save(tmp_path, {"m": nn.Linear(2, 2)}, comm)
        with pytest.raises(CheckpointError, match="tensor m/weight: on the meta device it takes"):
            ringfold.load(tmp_path, {"m": nn.Linear(2, 2, device="meta")}, comm)

    run_local(1, main)


def test_a_scheduler_of_milestones_goes_on(tmp_path):
    """It has them in a Counter, and where it follows another asks that for what a dict lacks."""

    def made():
        optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        kinds = torch.optim.lr_scheduler
        parts = [kinds.ConstantLR(optimizer, 0.5, 2), kinds.MultiStepLR(optimizer, [1, 3])]
        return optimizer, kinds.SequentialLR(optimizer, parts, [2])

    def rates(optimizer, scheduler, count):
        found = []
        for _ in range(count):
            optimizer.step()
            scheduler.step()
            found.append(scheduler.get_last_lr())
        return found

    def main(comm):
        expected, scheduler = made()
        rates(expected, scheduler, 1)
        ringfold.save(tmp_path, {"s": scheduler}, comm)
        other, resumed = made()
        ringfold.load(tmp_path, {"s": resumed}, comm)
        assert rates(other, resumed, 6) == rates(expected, scheduler, 6)

    run_local(1, main)


def test_what_one_rank_cannot_keep_is_told_where_others_gather_shares_meanwhile(tmp_path):
    def main(comm):
        model = network(1)
        optimizer = ringfold.ShardedOptimizer(
            model.named_parameters(), comm, torch.optim.SGD, lr=0.1, reduce=False
        )
        state = {"v": {1, 2} if comm.rank == 1 else 1, "m": model, "o": optimizer}
        with pytest.raises(CheckpointError, match="rank 1: v: a set cannot be kept"):
            ringfold.save(tmp_path, state, comm)

    run_local(2, main)


def test_wrappers_over_groups_of_unequal_size_within_a_module_are_saved(tmp_path):
    """What they carry was compared as if all ranks had one."""

    def main(comm):
        group = comm.split(comm.rank // 2)
        expert = f"expert{comm.rank // 2}"

        def make():
            inner = ringfold.DataParallel(nn.Linear(3, 2 + comm.rank // 2), group, wire="topk:0.2")
            return nn.ModuleDict({expert: inner})

        module = make()
        module[expert](torch.full((2, 3), comm.rank + 1.0)).sum().backward()
        with torch.no_grad():
            module[expert].module.bias.fill_(comm.rank // 2 + 5.0)
        ringfold.save(tmp_path, {"m": module}, comm)
        again = make()
        ringfold.load(tmp_path, {"m": again}, comm)
        return again[expert].module.bias.tolist()

    assert run_local(3, main) == [[5.0, 5.0], [5.0, 5.0], [6.0, 6.0, 6.0]]


def test_steps_that_differ_between_ranks_are_refused(tmp_path):
    def main(comm):
        with pytest.raises(CheckpointError, match=r"step differs .*: rank 0 has 4, rank 1 has 5"):
            ringfold.save(tmp_path, {"v": 1}, comm, step=4 + comm.rank)

    run_local(3, main)
    assert not list(tmp_path.iterdir())


def test_values_that_differ_between_ranks_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="v differs between ranks: rank 0 has 0, rank 1"):
        run_local(2, lambda comm: ringfold.save(tmp_path, {"v": comm.rank}, comm))


class Replay:
    """Has a state of its own, with a tensor in it."""

    def __init__(self, rows):
        self.rows = rows

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]


@pytest.mark.parametrize("wrap", [lambda t: t, lambda t: {"a": [t]}, lambda t: t.numpy(), Replay])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_tensors_by_value_that_differ_between_ranks_are_refused(tmp_path, wrap, dtype):
    """Of which rank 0's were saved for all, as of a buffer of samples or an order drawn by each."""

    def main(comm):
        alike = torch.arange(10_000).remainder(3).to(dtype)
        ringfold.save(tmp_path / "alike", {"v": wrap(alike.clone())}, comm)
        own = alike.clone()
        own[[5_000 + comm.rank, 5_000]] = own[[5_000, 5_000 + comm.rank]]
        says = r'v.* is another tensor on rank 0 than on rank 1, .* as in \{f"v\{rank\}": ...\}'
        with pytest.raises(CheckpointError, match=says):
            ringfold.save(tmp_path / "apart", {"v": wrap(own)}, comm)
        ringfold.save(tmp_path / "apart", {f"v{comm.rank}": wrap(own)}, comm)

    run_local(2, main)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (
            lambda m: m.append(nn.Linear(1, 1)),
            r"tensor m/5\.weight: the checkpoint of step 30 has no",
        ),
        (lambda m: m.pop(4), r"fit: 4\.bias, 4\.weight of its m are on no rank"),
        (
            lambda m: m.insert(4, nn.Linear(7, 9)) and m.pop(5),
            r"m/4\.weight: expected F32 \(9, 7\), the checkpoint of step 30 has F32 \(3, 7\)",
        ),
        (
            lambda m: m.double(),
            r"expected F64 \(7, 5\), the checkpoint .* has F32 \(7, 5\)",
        ),
    ],
)
def test_a_model_that_does_not_fit_is_refused_before_anything_is_changed(
    tmp_path, change, complaint
):
    three_of_them(tmp_path)

    def main(comm):
        model = network(0)
        if comm.rank == 1 or "on no rank" in complaint:  # one rank sees it, all are told
            change(model)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(CheckpointError, match=complaint):
            ringfold.load(tmp_path, {"m": model, "v": None}, comm)
        same(before, dict(model.state_dict()))

    run_local(2, main)


def test_the_copy_is_taken_before_training_goes_on(tmp_path):
    def main(comm):
        x = torch.arange(300_000.0)
        with Checkpoints(tmp_path, comm) as checkpoints:
            for step in range(3):
                checkpoints.save({"v": {"x": x}}, step)
                x.add_(1)  # as an optimizer would, in place, while the file is being written
        assert checkpoints.count == 3 and checkpoints.stood_still > 0
        for step in range(3):
            found = ringfold.load(tmp_path, {"v": None}, comm, step=step).values["v"]["x"]
            assert found.equal(torch.arange(300_000.0) + step)

    run_local(1, main)


@pytest.mark.parametrize("sizes", [(0, 1, 70_000), (5, 2, 3), (600_000, 1, 0)])
def test_memory_that_is_got_beforehand_may_fit_or_not(tmp_path, sizes):
    """Copies lie side by side in one piece: nothing may reach into a neighbour."""

    def tensors(size, step):
        return {f"x{i}": torch.full((size,), step + i, dtype=d) for i, d in enumerate(DTYPES)}

    def main(comm):
        with Checkpoints(tmp_path, comm) as checkpoints:
            checkpoints.prepare({"v": tensors(sizes[0], 0)})
            checkpoints.prepare({"v": tensors(sizes[1], 0)})  # is no more than a hint
            for step, size in enumerate(sizes):
                checkpoints.save({"v": tensors(size, step)}, step)
        for step, size in enumerate(sizes):
            found = ringfold.load(tmp_path, {"v": None}, comm, step=step).values["v"]
            same(found, tensors(size, step))

    run_local(2, main)


DTYPES = (torch.float32, torch.uint8, torch.float64, torch.bfloat16, torch.complex64, torch.int16)
