"""train.py --device cuda on pretended tensors has the losses of the same run on the host."""

import json
from pathlib import Path

import pytest

from ringfold.compare import compare

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "options",
    [
        ("--workload", "digits", "--pipe", "2", "--recompute", "--wire", "bf16", "--check-finite"),
    ],
    ids=" ".join,
)
def test_the_losses_are_those_of_the_host(job, tmp_path, options):
    reports = []
    train = (TESTS.parent / "train.py").resolve()
    for device, program in (("cpu", [train]), ("cuda", [TESTS / "pretended_cuda_job.py", train])):
        reports.append(tmp_path / f"{device}.json")
        more = ("--steps", 2, "--device", device, "--report", reports[-1])
        done = job(2, program[0], *program[1:], *options, *more)
        assert done.returncode == 0, done.output
    assert "training on GPUs, 2 ranks on 1" in done.output
    assert not compare(*reports, rtol=1e-5)


def test_the_benchmark_of_training(job, tmp_path):
    out = tmp_path / "found.json"
    program = (TESTS.parent / "benchmarks" / "train_step.py").resolve()
    options = ("--device", "cuda", "--scale", 16, "--budget", 0.5, "--peers", "", "--json", out)
    done = job(2, TESTS / "pretended_cuda_job.py", program, *options)
    assert done.returncode == 0, done.output
    rows = json.loads(out.read_text())["rows"]
    assert {row["model"] for row in rows} == {"mlp", "transformer"}
    assert all(row["wrong"] == 0 and row["device"] == "a pretended GPU" for row in rows)


def test_the_gradients_are_those_of_the_host(job):
    done = job(2, TESTS / "pretended_cuda_job.py", TESTS / "gradients_job.py")
    assert done.returncode == 0 and done.output.count("right") == 2, done.output


def test_gradients_of_another_size_are_found(job):
    """Of which the losses of text, whose optimizer is Adam, say nothing."""
    done = job(2, TESTS / "pretended_cuda_job.py", TESTS / "gradients_job.py", 0.99)
    assert done.returncode != 0
    assert "digits, 0.weight: the gradient is off by 0.01 of its norm" in done.output
