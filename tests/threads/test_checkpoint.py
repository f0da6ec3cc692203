"""Checkpoints on ranks as threads: what comes back, what is refused, and what survives a kill."""

import json
import os
import pickle
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from checkpointed import LOCK, groups, network, same, trained
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ringfold
from ringfold import CheckpointError, Checkpoints, Mesh, Pipeline, RandomStreams, run_local
from ringfold.parallel import GlobalBatchSampler
from ringfold.parallel.checkpoint import files, manifest
from ringfold.parallel.checkpoint.errors import Damaged
from ringfold.parallel.checkpoint.manifest import Entry, Manifest, from_text, to_text
from ringfold.parallel.checkpoint.samples import are_apart, digest_of, samples_of
from ringfold.parallel.checkpoint.shares import assign

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


VALUES = {
    "plain": [None, True, 0, -3, 2**60, 0.1, -0.0, "text", {"a": (1, (2.5,)), 3: []}],
    "odd floats": (float("inf"), float("-inf"), float("nan")),
    "none": torch.zeros(0, 3),
    "one": torch.tensor(2.5, dtype=torch.float64),
    "bf16": torch.arange(5).to(torch.bfloat16),
    "half": torch.arange(5).half(),
    "bool": torch.tensor([True, False, True]),
    "bytes": torch.arange(7, dtype=torch.uint8),
    "complex": torch.tensor([1 + 2j, 3 - 1j]),
    "narrow": [
        torch.tensor([0.5, -3.0, float("nan")]).to(getattr(torch, name))
        for name in ("float8_e4m3fn", "float8_e5m2", "float8_e8m0fnu")
        if hasattr(torch, name)
    ],
    "unsigned": [
        torch.tensor([0, 7, 2**15 + 1]).to(dtype)
        for dtype in (torch.uint16, torch.uint32, torch.uint64)
    ],
    "strided": torch.arange(12.0).view(3, 4).t(),
    "nan": torch.tensor([float("nan"), 1.0]),
    "counted": Counter({3: 2, 5: 1}),
}


def test_plain_values_and_every_dtype_come_back_without_pickle(tmp_path, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("pickle")

    def main(comm):
        ringfold.save(tmp_path, {"v": VALUES}, comm)
        return ringfold.load(tmp_path, {"v": None}, comm).values["v"]

    for module, name in (
        (pickle, "load"),
        (pickle, "loads"),
        (pickle, "Unpickler"),
        (torch, "load"),
    ):
        monkeypatch.setattr(module, name, refuse)
    for found in run_local(2, main):
        same(found, VALUES)


def test_what_needs_pickle_is_refused_by_its_path(tmp_path):
    def main(comm):
        ringfold.save(tmp_path, {"v": {"a": [1, object()]}}, comm)

    with pytest.raises(CheckpointError, match=r"v/a/1: a object cannot be kept without pickle"):
        run_local(2, main)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("make", [lambda m: m, lambda m: torch.optim.SGD(m.parameters())])
def test_a_module_within_a_value_is_refused_with_what_to_do(tmp_path, make):
    """As of models in a dict; that they cannot be kept without pickle did not tell."""
    state = {"models": {"g": make(nn.Linear(2, 2))}}
    says = r'models/g: a \w+ is not kept within another value: .* as in \{"models_g": ...\}'
    with pytest.raises(CheckpointError, match=says):
        run_local(1, lambda comm: ringfold.save(tmp_path, state, comm))


def test_what_tells_its_state_but_takes_none_is_refused_when_it_is_saved(tmp_path):
    """Not in the run that is to go on, which has nothing to give it to."""

    class Meter:
        def state_dict(self):
            return {"seen": 3}

    with pytest.raises(CheckpointError, match="v: a Meter cannot be kept without pickle"):
        run_local(1, lambda comm: ringfold.save(tmp_path, {"v": Meter()}, comm))


@pytest.mark.parametrize(
    "value", [np.int64(3), np.float32(0.5), np.float64(0.1), np.bool_(True)], ids=repr
)
def test_a_scalar_of_numpys_comes_back_as_pythons(tmp_path, value):
    """A metric that is kept as it was computed."""

    def main(comm):
        ringfold.save(tmp_path, {"best": {"loss": value}}, comm)
        return ringfold.load(tmp_path, {"best": None}, comm).values["best"]["loss"]

    (found,) = run_local(1, main)
    assert type(found) is type(value.item()) and found == value


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"__metadata__": torch.ones(2)}, "tensor __metadata__: safetensors files hold something"),
        ({"v": {"\ud800": torch.ones(2)}}, r"tensor v/\\ud800: a safetensors file holds no name"),
    ],
)
def test_a_name_that_a_file_cannot_hold_is_refused(tmp_path, state, why):
    """It was saved, and no load ever read it."""

    def main(comm):
        with pytest.raises(CheckpointError, match=f"rank 1: {why}"):
            ringfold.save(tmp_path, state if comm.rank else {}, comm)
        plain = {"__metadata__": 1, "v": {"__metadata__": torch.ones(2), "\ud800": "\ud800"}}
        ringfold.save(tmp_path, plain, comm)
        same(dict(ringfold.load(tmp_path, dict.fromkeys(plain), comm).values), plain)

    run_local(2, main)


def test_more_names_than_a_file_can_have_are_refused(tmp_path, monkeypatch):
    """As a million of them: the file was written, and no load ever read it."""
    monkeypatch.setattr(files, "_LONGEST", 5_000)
    few, many = ({f"{n:03}": torch.ones(()) for n in range(count)} for count in (100, 300))

    def main(comm):
        ringfold.save(tmp_path, {"v": few}, comm)
        with pytest.raises(CheckpointError, match=r"150 tensors take .* bytes, of .* 5000"):
            ringfold.save(tmp_path, {"v": many}, comm)

    run_local(2, main)
    assert [path.name for path in tmp_path.iterdir()] == ["000001-step-0"]


@pytest.mark.parametrize(
    ("value", "why"),
    [
        (np.ma.masked_array([1, 2], [0, 1]), "v/a: a masked array cannot be kept"),
        (np.ma.masked, "v/a: a masked array cannot be kept"),
        (np.datetime64("2024-01-01", "ns"), "v/a: a datetime64 cannot be kept"),
        (np.timedelta64(5, "ns"), "v/a: a timedelta64 cannot be kept"),
        (np.zeros(1, "i4,f8")[0], "v/a: a void cannot be kept"),
        (np.longdouble(1), "v/a: a (longdouble|float128) cannot be kept"),
        (np.array(1, "m8[ns]"), r"v/a: an array of timedelta64\[ns\] cannot be kept"),
        pytest.param(1 << 20_000, "v/a: a number of 20001 bits cannot be kept", id="wide"),
        (torch.ones(3, device="meta"), "tensor v/a: on the meta device it has no values"),
        (nn.LazyLinear(2).weight, "tensor v/a: a lazy layer has not made it yet"),
        (torch.ones(3).to_sparse(), "tensor v/a: expected a dense one, got torch.sparse_coo"),
    ],
)
def test_what_would_lose_something_or_has_no_values_is_refused_by_its_path(tmp_path, value, why):
    """Masks, fields and units were lost without a word; a tensor without memory, or a number of
    very many digits, ended one rank, without its name.
    """

    def main(comm):
        with pytest.raises(CheckpointError, match=rf"rank 1: {why}"):
            ringfold.save(tmp_path, {"v": {"a": value if comm.rank else 1}}, comm)

    run_local(2, main)


def test_a_model_without_memory_is_not_loaded_into(tmp_path):
    """torch's load only warns that it does nothing."""

    def main(comm):
        ringfold.save(tmp_path, {"m": nn.Linear(2, 2)}, comm)
        with pytest.raises(CheckpointError, match="tensor m/weight: on the meta device it takes"):
            ringfold.load(tmp_path, {"m": nn.Linear(2, 2, device="meta")}, comm)

    run_local(1, main)


def test_a_dtype_among_hyper_parameters_is_kept(tmp_path):
    """As of optimizers that keep their state in another dtype: every save was refused."""

    def main(comm):
        model, optimizer = trained(1)
        optimizer.param_groups[0]["state_dtype"] = torch.bfloat16
        ringfold.save(tmp_path, {"m": model, "o": optimizer}, comm)
        optimizer.param_groups[0]["state_dtype"] = torch.float32
        ringfold.load(tmp_path, {"m": model, "o": optimizer}, comm)
        assert optimizer.param_groups[0]["state_dtype"] is torch.bfloat16

    run_local(2, main)


@pytest.mark.parametrize(
    ("value", "places"),
    [
        ({"a/b": torch.zeros(2), "a": {"b": torch.ones(2)}}, r"v\['a'\]\['b'\] and v\['a/b'\]"),
        ([{1: torch.zeros(2), "1": torch.ones(2)}], r"v\[0\]\['1'\] and v\[0\]\[1\]"),
    ],
)
def test_tensors_whose_keys_make_one_path_are_refused_by_their_places(tmp_path, value, places):
    def main(comm):
        ringfold.save(tmp_path, {"v": value if comm.rank == 1 else torch.zeros(1)}, comm)

    with pytest.raises(CheckpointError, match=f"rank 1: {places} would both be kept as v/"):
        run_local(2, main)
    assert not list(tmp_path.iterdir())


def test_plain_values_under_such_keys_come_back(tmp_path):
    value = {"a/b": 1, "a": {"b": 2.5, "c": torch.ones(2)}, 1: "one", "1": [None]}

    def main(comm):
        ringfold.save(tmp_path, {"v": value}, comm)
        same(ringfold.load(tmp_path, {"v": None}, comm).values["v"], value)

    run_local(1, main)


def test_none_is_a_value_and_arrays_come_back_as_arrays(tmp_path):
    """One of no dimension came back as a float."""
    order = np.arange(12, dtype=np.int16).reshape(3, 4)[::-1]
    one = np.array(2.5, np.float32)

    def main(comm):
        ringfold.save(tmp_path, {"best": None, "order": order, "one": one}, comm)
        found = ringfold.load(tmp_path, {"best": 7, "order": None, "one": None}, comm).values
        assert isinstance(found["one"], np.ndarray) and found["one"].dtype == one.dtype
        assert found["one"].shape == () and found["one"] == one
        assert found["best"] is None and found["order"].dtype == order.dtype
        np.testing.assert_array_equal(found["order"], order)
        with pytest.raises(CheckpointError, match=r"v/0: an array of <U1 cannot be kept"):
            ringfold.save(tmp_path, {"v": [np.array(["a", "b"])]}, comm)

    run_local(2, main)


@pytest.mark.parametrize(
    ("value", "plain"),
    [(np.bool_(True), True), (np.uint8(7), 7), (np.float32(0.5), 0.5), (np.float64(0.1), 0.1)],
)
def test_numbers_of_numpy_come_back_as_those_of_python(tmp_path, value, plain):
    def main(comm):
        ringfold.save(tmp_path, {"v": [value]}, comm)
        same(ringfold.load(tmp_path, {"v": None}, comm).values["v"], [plain])

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


def test_what_is_being_written_is_waited_for_before_loading(tmp_path):
    def main(comm):
        with Checkpoints(tmp_path, comm) as checkpoints:
            checkpoints.save(numbers(comm, 4, size=300_000), 4)
            assert checkpoints.newest() == 4
            checkpoints.save(numbers(comm, 5, size=300_000), 5)
            assert checkpoints.load({"v": None}).step == 5

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


def numbers(comm, step, size=40):
    return {"v": {"step": step, "x": torch.full((size,), float(step))}}


def three_of_them(tmp_path, keep=None):
    def main(comm):
        with Checkpoints(tmp_path, comm, keep=keep) as checkpoints:
            for step in (10, 20, 30):
                model = network(step)
                checkpoints.save({"m": model, **numbers(comm, step)}, step)

    run_local(2, main)


def load_newest(tmp_path):
    def main(comm):
        model = network(0)
        loaded = ringfold.load(tmp_path, {"m": model, "v": None}, comm)
        same(dict(model.state_dict()), dict(network(loaded.step).state_dict()))
        assert loaded.values["v"]["step"] == loaded.step
        return loaded

    return run_local(2, main)[0]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_newest_are_kept_and_what_kills_have_left_is_removed(tmp_path):
    (tmp_path / ".partial-000001-step-5").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    three_of_them(tmp_path, keep=2)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["000002-step-20", "000003-step-30", "notes.txt"]
    assert load_newest(tmp_path).step == 30


@pytest.mark.filterwarnings("ignore:.*is damaged:RuntimeWarning")
@pytest.mark.parametrize("rank", [0, 1])
def test_every_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, rank):
    three_of_them(tmp_path)
    name = f"rank-0000{rank}.safetensors"
    newest, middle = tmp_path / "000003-step-30", tmp_path / "000002-step-20"
    flip(newest / name, -1)
    (middle / name).unlink()
    loaded = load_newest(tmp_path)
    assert loaded.step == 10 and len(loaded.damaged) == 2
    last = list(json.loads((newest / "manifest.json").read_text())["tensors"].items())
    assert f"{name}: tensor " in loaded.damaged[0] and "checksum" in loaded.damaged[0]
    assert any(f"tensor {key} " in loaded.damaged[0] for key, row in last if row["file"] == name)
    assert name in loaded.damaged[1] and "No such file" in loaded.damaged[1]
    (tmp_path / "000001-step-10" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be loaded\n.*\n.*\n.*manif"):
        load_newest(tmp_path)


def test_damage_is_warned_of(tmp_path):
    three_of_them(tmp_path)
    (tmp_path / "000003-step-30" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"000003-step-30 is damaged.*manifest\.json"):
        assert load_newest(tmp_path).step == 20


def test_no_byte_of_a_file_can_be_changed_unseen(tmp_path):
    """Every byte of a tensor file and of the manifest: damage, or the very same state."""
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(comm, 4, size=3), comm, step=4))
    (place,) = tmp_path.iterdir()

    def main(comm):
        try:
            return ringfold.load(tmp_path, {"v": None}, comm).values["v"]
        except CheckpointError:
            return None

    seen = 0
    for path in place.iterdir():
        data = path.read_bytes()
        for index in range(0, len(data), 3):
            flip(path, index)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *args, **kwargs: None)
                found = run_local(1, main)[0]
            path.write_bytes(data)
            if found is None:
                seen += 1
            else:
                same(found, numbers(None, 4, size=3)["v"])
    assert seen > 200


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


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")

    def main(comm):
        for folder in (tmp_path / "file", Path("/proc/ringfold")):
            with pytest.raises(CheckpointError, match=r"step 1 in .*: rank 0: \[Errno"):
                ringfold.save(folder, numbers(comm, 1), comm, step=1)
            with pytest.raises(CheckpointError, match="rank 0"):
                Checkpoints(folder, comm).probe()

    run_local(2, main)


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    three_of_them(tmp_path)
    real = os.statvfs(tmp_path)
    full = type("Full", (), {"f_bavail": 0, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(CheckpointError, match=r"the disk has 0 bytes free, the .* needs 160"):
        run_local(2, lambda comm: ringfold.save(tmp_path, numbers(comm, 40), comm, step=40))
    monkeypatch.undo()
    assert load_newest(tmp_path).step == 30


LIMITED = """
import resource, sys
import torch, ringfold
folder = sys.argv[1]
state = lambda step, n: {"v": {"step": step, "x": torch.full((n,), float(step))}}
ringfold.run_local(2, lambda comm: ringfold.save(folder, state(1, 10), comm, step=1, keep=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ringfold.run_local(2, lambda comm: ringfold.save(folder, state(2, 10**6), comm, step=2, keep=1))
except ringfold.CheckpointError as error:
    print(error)
print(ringfold.run_local(2, lambda comm: ringfold.load(folder, {"v": None}, comm).step))
"""


def test_a_disk_that_fills_up_while_writing_leaves_the_old_one(tmp_path):
    run = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 2" in done.stdout and "File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "[1, 1]"
    assert [path.name for path in tmp_path.iterdir()] == ["000001-step-1"]


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


def test_random_streams_go_on(tmp_path):
    import random

    def draw(streams):
        generator, twister = streams.generators["numpy"], streams.generators["torch"]
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            generator.random(3).tolist(),
            torch.rand(3, generator=twister).tolist(),
        )

    def streams():
        return RandomStreams(numpy=np.random.default_rng(5), torch=torch.Generator().manual_seed(6))

    def main(comm):
        own = streams()
        draw(own)
        ringfold.save(tmp_path, {"random": own}, comm)
        expected = draw(own)
        other = streams()
        ringfold.load(tmp_path, {"random": other}, comm)
        assert draw(other) == expected

    def read(comm):
        twister = torch.Generator()
        ringfold.load(tmp_path, {"random": RandomStreams(own=twister)}, comm)
        return torch.rand(1, generator=twister).item()

    with torch.random.fork_rng():
        run_local(1, main)
        on_two = run_local(2, read)
        assert len(set(on_two)) == 2 and on_two == run_local(2, read)


def test_an_epoch_goes_on_in_its_middle_where_its_loader_has_a_generator_of_its_own(tmp_path):
    """As docs/checkpoints.md has it: torch's loader draws from the global stream once an epoch."""
    data = TensorDataset(torch.arange(48.0).view(16, 3) / 48)

    def train(comm, resumed):
        torch.manual_seed(9 if resumed else 5)
        model = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 1))
        state = {"m": model, "o": torch.optim.SGD(model.parameters(), lr=0.1)}
        state["random"] = RandomStreams()
        sampler = GlobalBatchSampler(len(data), 4, comm.rank, comm.size)
        loader = DataLoader(data, batch_sampler=sampler, generator=torch.Generator())
        at = {"epoch": 0, "batch": 0}
        if resumed:
            at = ringfold.load(tmp_path, {**state, "at": None}, comm).values["at"]
        for epoch in range(at["epoch"], 3):
            sampler.set_epoch(epoch, done=at["batch"] if epoch == at["epoch"] else 0)
            for batch, (x,) in enumerate(loader, sampler.done):
                state["o"].zero_grad()
                model(x).square().mean().backward()
                state["o"].step()
                if (epoch, batch) == (1, 1) and not resumed:
                    place = {"epoch": epoch, "batch": batch + 1}
                    ringfold.save(tmp_path, {**state, "at": place}, comm)
        return dict(model.state_dict())

    with LOCK, torch.random.fork_rng():
        same(*(run_local(1, lambda comm, r=r: train(comm, r))[0] for r in (False, True)))


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        (None, r"random/1: the checkpoint of step 3 has no such value"),
        ({"other": 5}, r"random/1/generators/aug: the checkpoint of step 3 .* only \['other'\]"),
        ({"aug": np.random.default_rng(5)}, r"aug: expected a state of torch.Generator, .* PCG64"),
    ],
)
def test_streams_that_do_not_fit_are_refused_before_anything_is_changed(tmp_path, kept, complaint):
    def streams(generators):
        made = {k: torch.Generator() if v == 5 else v for k, v in generators.items()}
        return RandomStreams(**made)

    def main(comm):
        extra = {} if kept is None else {"random": streams(kept)}
        ringfold.save(tmp_path, {"m": network(1), **extra}, comm, step=3)
        model, augmentation = network(2), torch.Generator().manual_seed(7 + comm.rank)
        # Rank 0 has none of that name, and is told, too.
        own = {"aug": augmentation} if comm.rank == 1 or kept is None else {}
        before = [*model.state_dict().values(), augmentation.get_state()]
        before = [value.clone() for value in before]
        says = complaint if kept is not None else complaint.replace("1", "0", 1)
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path, {"m": model, "random": RandomStreams(**own)}, comm)
        same(before, [*model.state_dict().values(), augmentation.get_state()])

    run_local(2, main)


@pytest.mark.parametrize(("kept", "here"), [("PCG64", "MT19937"), ("MT19937", "torch.Generator")])
def test_a_stream_of_another_kind_is_refused_by_both_names(tmp_path, kept, here):
    def made(kind):
        if kind == "torch.Generator":
            return torch.Generator()
        return np.random.Generator(getattr(np.random, kind)(5))

    def main(comm):
        ringfold.save(tmp_path, {"random": RandomStreams(a=made(kept))}, comm)
        with pytest.raises(CheckpointError, match=f"a: expected a state of {here}, .* of {kept}"):
            ringfold.load(tmp_path, {"random": RandomStreams(a=made(here))}, comm)

    run_local(1, main)


@pytest.fixture
def pcg64():
    """Let NumPy's global stream draw by PCG64."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    yield
    np.random.set_bit_generator(before)


def test_numpys_global_stream_goes_on_with_another_bit_generator(tmp_path, pcg64):
    """After np.random.set_bit_generator a save ended in "too many values to unpack", and a resume
    on another number of ranks would have seeded it as only MT19937 can be."""

    def main(comm):
        np.random.normal()  # one more is kept for the next call
        ringfold.save(tmp_path, {"random": RandomStreams()}, comm)
        expected = np.random.normal(size=3).tolist(), np.random.rand(3).tolist()
        ringfold.load(tmp_path, {"random": RandomStreams()}, comm)
        assert (np.random.normal(size=3).tolist(), np.random.rand(3).tolist()) == expected

    draws = []
    with torch.random.fork_rng():
        run_local(1, main)
        for seed in (5, 6, 5):  # as a resume on another number of ranks does
            RandomStreams().seed(seed)
            draws.append(np.random.rand())
    assert draws[0] == draws[2] != draws[1]


def test_a_global_stream_of_another_kind_is_refused_by_both_names(tmp_path, pcg64):
    def main(comm):
        ringfold.save(tmp_path, {"random": RandomStreams()}, comm)
        np.random.set_bit_generator(np.random.MT19937(3))
        with pytest.raises(CheckpointError, match=r"/numpy: expected a state of MT19937, .* PCG64"):
            ringfold.load(tmp_path, {"random": RandomStreams()}, comm)

    run_local(1, main)


def test_a_manifest_reads_back_what_it_was_and_nothing_else():
    manifest = Manifest(
        3, 2, {"f": 10}, {"a/b": Entry("f", "F32", (2, 0), "00")}, {"v": {"mapping": [[1, None]]}}
    )
    text = to_text(manifest)
    assert from_text(text) == manifest
    huge = text.replace('"step": 3', '"step": 1e999')
    later = text.replace("checkpoint 1", "checkpoint 2")
    for other in ("", "[]", "null", text.replace("F32", "F64"), later, huge):
        if other != text:
            with pytest.raises(Damaged, match=r"manifest\.json"):
                from_text(other)


def test_writing_is_shared_out_evenly_over_the_holders():
    holders = {f"t{i}": (100 + i, [0, 1, 2]) for i in range(30)} | {"only": (5000, [1])}
    chosen = assign(holders, 3)
    load = [sum(holders[n][0] for n, r in chosen.items() if r == rank) for rank in range(3)]
    assert chosen["only"] == 1 and load[1] == 5000 and abs(load[0] - load[2]) <= 130


KILLED = """
import os, random, signal, sys, time, warnings
import torch, ringfold
folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
warnings.simplefilter("error")  # a damaged checkpoint would be warned of

def state(step):
    return {"v": {"step": step, "x": [torch.full((50_000,), float(step + i)) for i in range(4)]}}

def note(rank):
    return f"{folder}-done-{rank}"

def write(first):
    def main(comm):
        with ringfold.Checkpoints(folder, comm, keep=2) as checkpoints:
            for step in range(first, 10**9):
                checkpoints.save(state(step), step)
                with open(note(comm.rank), "w") as file:
                    file.write(str(step - 1))  # save() has waited for the one before
    ringfold.run_local(2, main)

def read(comm):
    if ringfold.Checkpoints(folder, comm).newest() is not None:
        return ringfold.load(folder, {"v": None}, comm)

def said():
    notes = [open(note(rank)).read() for rank in (0, 1) if os.path.exists(note(rank))]
    return max(int(text or 0) for text in [*notes, "0"])

def killed(first, enough):
    child = os.fork()
    if child == 0:
        write(first)
    while not enough():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

draw, step, within = random.Random(7), 0, 0
os.mkdir(folder)
begun = time.monotonic()
killed(1, lambda: said() > 0)
one = time.monotonic() - begun  # how long this machine takes until a checkpoint is written
for _ in range(kills):
    end = time.monotonic() + draw.uniform(0.0, 2 * one)
    killed(step + 1, lambda: time.monotonic() > end)
    within += any(name.startswith(".partial") for name in os.listdir(folder))
    claimed = said()
    loaded = ringfold.run_local(1, read)[0]
    if loaded is None:
        assert claimed == 0
        continue
    assert loaded.step >= max(step, claimed), (loaded.step, step, claimed)
    found = loaded.values["v"]
    assert found["step"] == loaded.step
    assert all(x.eq(loaded.step + i).all() for i, x in enumerate(found["x"]))
    step = loaded.step
print(step, within)
"""


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path, kills):
    run = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(kills)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    step, within = map(int, done.stdout.split())
    assert step > 0 and within > 0  # some were written, and some kills fell into the writing


def test_tensors_are_apart_where_half_of_their_samples_are_far_from_each_other():
    """By more than a sixteenth, as replicas of half width on other processors are not."""
    ones = [1.0] * 8
    assert are_apart([1.07] * 4 + ones[:4], ones) and are_apart(ones, [1.07] * 4 + ones[:4])
    assert not are_apart([1.07] * 3 + ones[:5], ones)
    assert not are_apart([1.06] * 8, ones) and not are_apart([float("nan")] * 8, ones)
    assert are_apart([1e-9], [0.0]) and not are_apart([0.0], [0.0]) and not are_apart([], [])


@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 100])
def test_samples_are_evenly_spaced_however_a_tensor_lies(number):
    row = torch.arange(float(2 * number))
    tensors = {"whole": row, "turned": row.reshape(2, number).t().contiguous().t()}
    tensors |= {"ints": row.long(), "none": row[:0], "sparse": row.to_sparse(), "half": row.half()}
    found = samples_of(tensors)
    step = max(1, 2 * number // 8)
    assert found["whole"] == found["turned"] == row[::step][:8].tolist() == found["half"]
    assert [found[name] for name in ("ints", "none", "sparse")] == [[], [], []]
    assert samples_of({}) == {}


def test_a_digest_is_of_the_bits_in_their_order_wherever_they_lie():
    some = torch.arange(1.0, 10_004.0)
    digest = digest_of(some)
    assert digest == digest_of(torch.cat([some[:1], some])[1:])  # at an odd place in memory
    assert digest == digest_of(some.view(-1, 1).expand(-1, 2)[:, 0])
    for changed in ((0, 1), (17, 4_112), (9_998, 10_002)):
        other = some.clone()
        other[list(changed)] = other[list(changed[::-1])]
        assert digest_of(other) != digest
    odd = [torch.tensor(1.0), torch.zeros(0, 3), torch.ones(3, dtype=torch.complex64).conj()]
    assert len({*map(digest_of, [*odd, torch.ones(5, dtype=torch.float8_e4m3fn)])}) == 4


def test_a_manifest_of_another_format_is_refused_by_both_names(monkeypatch):
    """Of a later version, whose checksum is right."""
    monkeypatch.setattr(manifest, "FORMAT", "ringfold checkpoint 2")
    text = to_text(Manifest(1, 1, {}, {}, {}))
    monkeypatch.undo()
    says = "expected format 'ringfold checkpoint 1', got 'ringfold checkpoint 2'"
    with pytest.raises(Damaged, match=says):
        from_text(text)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"v": {(1, 2): 3}}, "v: a tuple as a key cannot be kept"),
        ({"v": torch.ones(2, dtype=torch.complex128)}, "tensor v: torch.complex128 has no place"),
        ({"a/b": 1}, "expected names without slash or colon in a state, got 'a/b'"),
        ({"a:b": 1}, "expected names without slash or colon in a state, got 'a:b'"),
    ],
)
def test_what_has_no_place_in_a_checkpoint_is_refused_when_it_is_saved(tmp_path, state, says):
    with pytest.raises(CheckpointError, match=re.escape(says)):
        run_local(1, lambda comm: ringfold.save(tmp_path, state, comm))
