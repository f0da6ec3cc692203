"""--device: what is said where there is no GPU, and what a run can use one for."""

import pytest

from ringfold import run_local
from ringfold.workloads.devices import assign, gpus_for, lacking
from ringfold.workloads.options import UsageError, parse


def two() -> int:
    return 2


def none() -> int:
    raise UsageError("no GPU can be used: the driver shows none")


def test_cpu_asks_nobody() -> None:
    assert gpus_for(parse(["--device", "cpu"]), none) == 0


def test_auto_takes_what_there_is() -> None:
    assert gpus_for(parse([]), none) == 0
    assert gpus_for(parse([]), two) == 2
    assert gpus_for(parse(["--pipe", "2"]), two) == 0


def test_cuda_has_to_have_one() -> None:
    assert gpus_for(parse(["--device", "cuda"]), two) == 2
    with pytest.raises(UsageError, match="--device cuda: no GPU can be used: the driver shows"):
        gpus_for(parse(["--device", "cuda"]), none)


@pytest.mark.parametrize(
    "words",
    ["--pipe 2", "--reduction tree", "--dropout 0.1", "--wire topk:0.1", "--checkpoint there"],
)
def test_what_needs_the_host_is_named(words: str) -> None:
    options = parse(["--device", "cuda", *words.split()])
    assert lacking(options) and words.split()[0] in lacking(options)
    with pytest.raises(UsageError, match=f"{words.split()[0]}.*: works on the host only"):
        gpus_for(options, two)
    assert lacking(parse(["--wire", "bf16"])) == ""


def test_all_nodes_or_none() -> None:
    assert run_local(3, lambda comm: assign(comm, comm.rank)) == [("cpu", "")] * 3
