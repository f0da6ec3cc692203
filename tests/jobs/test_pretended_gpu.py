"""train.py --device cuda on pretended tensors has the losses of the same run on the host."""

from pathlib import Path

import pytest

from ringfold.compare import compare

TESTS = Path(__file__).parent.parent


@pytest.mark.parametrize(
    "options",
    [
        ("--workload", "digits", "--wire", "bf16", "--check-finite"),
        ("--workload", "text", "--pipe", "2", "--recompute"),
    ],
    ids=" ".join,
)
def test_the_losses_are_those_of_the_host(job, tmp_path, options):
    reports = []
    for device, program in (("cpu", "../train.py"), ("cuda", "train_cuda_job.py")):
        reports.append(tmp_path / f"{device}.json")
        more = ("--steps", 4, "--device", device, "--report", reports[-1])
        done = job(2, (TESTS / program).resolve(), *options, *more)
        assert done.returncode == 0, done.output
    assert "training on GPUs, 2 ranks on 1" in done.output
    assert not compare(*reports, rtol=1e-5)
