"""Plain values, arrays and tensors in a checkpoint: what comes back, and what is refused."""

import pickle
import re
from collections import Counter

import numpy as np
import pytest
import torch
from checkpointed import same, trained
from torch import nn

import ringfold
from ringfold import CheckpointError, run_local
from ringfold.parallel.checkpoint import files

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
