"""--device: what is said where there is no GPU, and what a run can use one for."""

import pytest

from ringfold import run_local
from ringfold.workloads.command_line import parse
from ringfold.workloads.devices import assign, gpus_for, lacking
from ringfold.workloads.options import UsageError


def two() -> int:
    return 2


def none() -> int:
    raise UsageError("no GPU can be used: the driver shows none")


def test_cpu_asks_nobody() -> None:
    assert gpus_for(parse(["--device", "cpu"]), none) == 0


def test_auto_takes_what_there_is() -> None:
    assert gpus_for(parse([]), none) == 0
    assert gpus_for(parse([]), two) == 2
    assert gpus_for(parse(["--pipe", "2"]), two) == 2
    assert gpus_for(parse(["--elastic"]), two) == 0


def test_cuda_has_to_have_one() -> None:
    assert gpus_for(parse(["--device", "cuda"]), two) == 2
    with pytest.raises(UsageError, match="--device cuda: no GPU can be used: the driver shows"):
        gpus_for(parse(["--device", "cuda"]), none)


@pytest.mark.parametrize(
    "words",
    ["--balance time --pipe 2", "--elastic", "--membership 1:2"],
)
def test_what_needs_the_host_is_named(words: str) -> None:
    options = parse(["--device", "cuda", *words.split()])
    assert lacking(options) and words.split()[0] in lacking(options)
    with pytest.raises(UsageError, match=f"{words.split()[0]}.*: works on the host only"):
        gpus_for(options, two)
    for fine in ("--pipe 2", "--reduction tree", "--wire topk:0.1", "--checkpoint there"):
        assert lacking(parse(fine.split())) == ""


class Cards:
    """A module as much of it as assigning ranks to cards needs."""

    def __init__(self) -> None:
        self.chosen: list[str] = []

    def set_device(self, device: str) -> None:
        self.chosen.append(device)


@pytest.mark.parametrize(
    ("cards", "wanted", "shared"),
    [
        (1, ["cuda:0"] * 4, ", 4 ranks on 1"),
        (3, ["cuda:0", "cuda:1", "cuda:2", "cuda:0"], ", 4 ranks on 3"),
        (8, ["cuda:0", "cuda:1", "cuda:2", "cuda:3"], ""),
    ],
)
def test_ranks_go_round_the_cards_of_their_node(
    cards: int, wanted: list[str], shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = Cards()
    torch = pytest.importorskip("torch")
    monkeypatch.setattr(torch, "cuda", module)
    told = run_local(4, lambda comm: assign(comm, cards))
    assert told == [(device, f"training on GPUs{shared}") for device in wanted]
    assert sorted(module.chosen) == sorted(wanted)


def test_all_nodes_or_none() -> None:
    assert run_local(3, lambda comm: assign(comm, comm.rank)) == [("cpu", "")] * 3
