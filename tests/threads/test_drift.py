"""Replicas that have drifted apart are named, and gradients that some ranks alone have."""

import copy

import pytest
import torch
from torch import nn

from ringfold import DataParallel, run_local
from ringfold.comm.errors import MismatchError
from ringfold.parallel.drift import check_replicas


def network():
    return nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda m: m[2].weight[0, 1].add_(1e-6), "1 of 9 tensors, first in 2.weight"),
        (lambda m: m[1].running_var[1].mul_(2), "1 of 9 tensors, first in 1.running_var"),
        (lambda m: m[1].num_batches_tracked.add_(1), "first in 1.num_batches_tracked"),
        (lambda m: (m[0].bias.add_(1), m[2].bias.add_(1)), "2 of 9 tensors, first in 0.bias"),
    ],
)
def test_the_first_tensor_that_differs_is_named_with_its_ranks(spoil, message):
    def main(comm):
        model = DataParallel(network(), comm)
        digest = model.check_replicas()
        if comm.rank == 1:
            with torch.no_grad():
                spoil(model.module)
        with pytest.raises(MismatchError) as caught:
            model.check_replicas()
        return digest, str(caught.value)

    results = run_local(3, main)
    assert len({digest for digest, _ in results}) == 1
    for _, text in results:
        assert message in text and text.endswith(": ranks 0, 2 from rank 1")


def test_bits_count_and_every_dtype_has_them():
    tensors = {
        "nan": torch.tensor([float("nan")]),
        "empty": torch.empty(0, 2),
        "scalar": torch.tensor(True),
        "half": torch.ones(3, dtype=torch.bfloat16),
        "complex": torch.ones(2, dtype=torch.complex64).conj(),
        "turned": torch.arange(6.0).view(2, 3).t(),
    }

    def main(comm):
        assert check_replicas(comm, tensors.items()) == check_replicas(comm, tensors.items())
        zero = torch.tensor([0.0 if comm.rank else -0.0])
        with pytest.raises(MismatchError, match="1 of 1 tensors, first in zero"):
            check_replicas(comm, [("zero", zero)])
        with pytest.raises(MismatchError, match="1 of 2 tensors, first in b: rank 0 from rank 1"):
            check_replicas(comm, [("a", zero.abs()), ("b", zero)][: 1 + comm.rank])

    run_local(2, main)


def test_report_of_gradients_on_some_ranks_only():
    class Branches(nn.ModuleDict):
        def forward(self, names):
            return sum(self[name](torch.ones(1, 1)).sum() for name in names)

    def main(comm):
        module = Branches({name: nn.Linear(1, 1, bias=False) for name in "abcd"})
        model = DataParallel(module, comm)
        assert not model.gradient_report().partial
        model(["ab", "ac", "a"][comm.rank]).backward()
        assert sorted(model.last_step.partial) == ["b.weight", "c.weight"]
        report = model.gradient_report()
        assert report.partial == {"b.weight": (0,), "c.weight": (1,)}
        assert report.unused == ("d.weight",)
        assert "b.weight: gradient on rank 0 of 3, zeros for the others" in str(report)
        model.zero_grad()
        model("abcd").backward()
        assert str(model.gradient_report()) == "every parameter had a gradient on every rank"
        with pytest.raises(ValueError, match="no ranks to compare"):
            copy.deepcopy(model).check_replicas()

    run_local(3, main)
