"""Comparing runs names the first step and tensor that differ, and nothing where none does."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

from ringfold.cli import main
from ringfold.compare import Unreadable, compare


@pytest.fixture
def run(tmp_path):
    """Write a report, and a dump of steps split over stages, of which some numbers may differ."""

    def write(name, losses=(3.0, 2.0, 1.0), change=None, stages=1, dump=True, **report):
        folder = tmp_path / name
        folder.mkdir()
        for step in range(1, len(losses) + 1):
            weights = {f"{k}.weight": torch.arange(6.0).reshape(2, 3) + k * step for k in range(4)}
            weights["3.half"] = torch.tensor(1.5 * step, dtype=torch.bfloat16)
            if change and step >= change[0]:
                weights[change[1]] = change[2](weights[change[1]])
            names = sorted(weights)
            for stage in range(stages):
                part = {n: weights[n].contiguous() for n in names[stage::stages]}
                save_file(part, folder / f"step{step:08d}.stage{stage}.safetensors")
        report = {
            "workload": "digits", "steps": len(losses), "losses": losses, "weights_sha256": "ab",
            "final_metric": {"test_accuracy": 0.5}, **report,
        }  # fmt: skip
        path = tmp_path / f"{name}.json"
        path.write_text(json.dumps(report | ({"dump": str(folder)} if dump else {})))
        return path

    return write


def test_equal_runs_on_different_grids(run, capsys):
    first, second = run("a"), run("b", stages=3)
    assert compare(first, second) == []
    assert main(["compare", str(first), str(second)]) == 0
    assert capsys.readouterr().out == "no difference\n"


def test_the_first_step_and_tensor_are_named(run, capsys):
    def one_off(tensor):
        tensor = tensor.clone()
        tensor[1, 2] *= 1 + 2.0**-20
        return tensor

    first, second = run("a"), run("b", (3.0, 2.0, 1.5), change=(2, "1.weight", one_off))
    weights, loss = compare(first, second)
    assert (weights.step, weights.what) == (2, "1.weight")
    assert (
        "1 of 6 elements, largest relative difference 9.54e-07 at [1, 2]: 7.0 against"
        in weights.how
    )
    assert str(loss) == "step 3: loss: 1.0 against 1.5, relative difference 0.333"
    assert main(["compare", str(first), str(second)]) == 1
    assert "step 2: 1.weight: 1 of 6" in capsys.readouterr().out
    assert [d.what for d in compare(first, second, rtol=1e-6)] == ["loss"]


@pytest.mark.parametrize(
    "change, how",
    [
        (lambda x: x.double(), r"torch.float32 \(2, 3\) against torch.float64 \(2, 3\)"),
        (lambda x: x * math.nan, "6 of 6 elements, largest relative difference inf"),
        (lambda x: x * -1.0, "5 of 6 elements"),
    ],
)
def test_other_differences(run, change, how):
    (found,) = compare(run("a"), run("b", change=(1, "0.weight", change)), 0.1)
    assert found.step == 1
    import re

    assert re.search(how, found.how), found.how


def test_a_negative_zero_is_a_difference_of_bits(run):
    first, second = run("a"), run("b", change=(1, "0.weight", lambda x: x - 0.0 * x - x * 0.0))
    assert compare(first, second) == []
    third = run("c", change=(3, "0.weight", lambda x: torch.where(x == 0, -x, x)))
    (found,) = compare(first, third)
    assert found.step == 3 and "0 of 6 elements" in found.how


def test_without_dumps_the_digests_count(run):
    first, second = run("a", dump=False), run("b", dump=False, weights_sha256="cd")
    (found,) = compare(first, second)
    assert "ab against cd; runs with --dump DIR tell" in found.how
    longer = run("c", (3.0, 2.0), dump=False, workload="text", final_metric={"bits": 1.0})
    whats = [found.what for found in compare(first, longer)]
    assert whats == ["workload", "steps", "loss", "bits"]


@pytest.mark.parametrize("rtol", ["nan", "inf", "-0.5"])
def test_a_tolerance_that_is_none_is_refused(run, rtol, capsys):
    """Not a number hid every difference, and a negative one made equal runs differ."""
    first, second = run("a", dump=False), run("b", (3.0, 2.0, 9.0), dump=False)
    for other in (first, second):
        assert main(["compare", str(first), str(other), f"--rtol={rtol}"]) == 2
        assert "expected an rtol that is 0 or more and finite" in capsys.readouterr().err


def test_what_only_one_run_has_is_a_difference(run):
    """Losses and steps of dumps were looked at as far as both runs had them, and no further."""
    first, other = run("a"), run("b", final_metric={"test_accuracy": 0.5, "bits": math.nan})
    for step in (2, 3):
        (other.with_suffix("") / f"step{step:08d}.stage0.safetensors").unlink()
    lacking, metric = map(str, compare(first, other))
    assert lacking == "step 2: dump: only in the first run"
    assert metric == "bits: only in the second run"
    assert str(compare(other, first)[0]) == "step 2: dump: only in the second run"
    shorter = run("c", (3.0, 2.0), steps=3, dump=False)
    (loss,) = compare(first, shorter)
    assert str(loss) == "step 3: loss: only in the first run"
    assert [str(loss)] == [str(one) for one in compare(first, shorter, 0.5)]


def test_the_digest_counts_where_no_dumped_tensor_differs(run):
    """Of what is in no dump, as buffers; it was not looked at where both runs have one."""
    first, second = run("a"), run("b", weights_sha256="cd")
    (found,) = compare(first, second)
    assert (found.what, found.how) == (
        "weights_sha256",
        "ab against cd; no tensor that both dumped differs",
    )
    assert compare(first, second, 1e-6) == []
    third = run("c", change=(1, "0.weight", lambda x: -x), weights_sha256="cd")
    assert [found.what for found in compare(first, third)] == ["0.weight"]


def test_what_cannot_be_read_is_named(run, tmp_path, capsys):
    good = run("a")
    (tmp_path / "empty").mkdir()
    for text in (
        "{", "[]", "{}", '{"losses": 3}', '{"losses": [null]}', '{"losses": [1, "2"]}',
        '{"losses": [], "final_metric": null}', '{"losses": [], "final_metric": {"a": "b"}}',
        json.dumps({"losses": [], "dump": str(tmp_path / "empty")}),
    ):  # fmt: skip
        bad = tmp_path / "bad.json"
        bad.write_text(text)
        with pytest.raises(Unreadable):
            compare(good, bad)
    assert main(["compare", str(good), str(tmp_path / "none.json")]) == 2
    assert "none.json" in capsys.readouterr().err
    assert main(["compare", str(good), str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert told == f"ringfold: {tmp_path}: expected a report of train.py: Is a directory\n"
    with pytest.raises(SystemExit, match="2"):
        main(["compare", "", str(good)])
    assert "argument A: expected a path, got ''" in capsys.readouterr().err
    next((tmp_path / "a").iterdir()).write_bytes(b"damaged")
    with pytest.raises(Unreadable, match="safetensors"):
        compare(good, run("b"))
