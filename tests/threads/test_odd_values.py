"""Odd values between stages, and gradients of them: each once went wrong, here or elsewhere."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import NamedTuple

import pytest
import torch
from little_layers import Call, Times
from torch import nn

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel.drift import check_replicas
from ringfold.parallel.plan import PLANS
from ringfold.parallel.tensors import flat_bytes

ONE_STAGE_A_RANK = [name for name in PLANS if name != "interleaved"]


class Both(Times):
    """Hand on the parameter itself beside the input."""

    def forward(self, x):
        return self.w, x


class Named(NamedTuple):
    """A named tuple."""

    x: torch.Tensor
    times: int
    rest: object = None


@dataclass(frozen=True)
class Rows:
    """A batch, or a part of one."""

    x: torch.Tensor
    flag: bool


# hands on, takes, loss and gradient of 0.w for x = 1, 2, 3 times 2
HANDED_ON = {
    "the same tensor twice": (lambda v: (v, v), lambda p: p[0] + 2 * p[1], 36, 18),
    "a tensor and what is made of it": (lambda v: (v, 3 * v), lambda p: p[0] + p[1], 48, 24),
    "no elements": (
        lambda v: (v, v[:0], v.new_zeros(3, 0) * v[:1].sum()),
        lambda p: p[0] + p[1].sum() + p[2].sum(),
        12,
        6,
    ),
    "no dimension, and plain values": (
        lambda v: (v, v.sum(), 7, "s", None, 0.5),
        lambda p: p[0] * p[2] + 0 * p[1] * p[5],
        84,
        42,
    ),
    "a gradient for some micro-batches only": (
        lambda v: v.detach() if v[0] > 5 else v,
        lambda v: 3 * v,
        36,
        9,
    ),
    "an expanded tensor, changed in place": (
        lambda v: v[:, None].expand(-1, 2),
        lambda v: v.add_(1),
        30,
        12,
    ),
    "values of other classes": (
        lambda v: Named(v, 2, OrderedDict(a=Rows(3 * v, True), b=v.view(1, -1).max(1))),
        lambda n: n.x * n.times + n.rest["a"].x * n.rest["a"].flag + n.rest["b"].values,
        72,
        36,
    ),
    "other dtypes": (
        lambda v: {"half": v.to(torch.bfloat16), "complex": torch.complex(v, v)},
        lambda d: d["half"].float() + d["complex"].real + d["complex"].imag,
        36,
        18,
    ),
}


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
@pytest.mark.parametrize("schedule", ONE_STAGE_A_RANK)
@pytest.mark.parametrize("case", HANDED_ON)
def test_what_a_stage_hands_on(case, schedule, reduction):
    """Micro-batches of one row each: a single element expanded has no view as bytes."""
    hand_on, take, loss, gradient = HANDED_ON[case]

    def main(comm):
        engine = Pipeline(
            [Times(2), Call(hand_on), Call(take)],
            Mesh(comm, pipe=2),
            loss_fn=lambda out, _: out.sum(),
            loss_reduction="sum",
            microbatches=3,
            schedule=schedule,
            reduction=reduction,
            boundaries=[2],
        )
        found = engine.step(torch.tensor([1.0, 2.0, 3.0])).item()
        return found, [p.grad.item() for p in engine.parameters() if p.numel()]

    assert run_local(2, main) == [(loss, [gradient]), (loss, [])]


def test_a_parameter_itself_is_handed_on():
    def main(comm):
        engine = Pipeline(
            [Both(2), Call(lambda pair: pair[0] * pair[1])],
            Mesh(comm, pipe=2),
            loss_fn=lambda out, _: out.sum(),
            loss_reduction="sum",
            microbatches=2,
        )
        return engine.step(torch.tensor([1.0, 2.0, 3.0])).item(), [
            p.grad.item() for p in engine.parameters() if p.numel()
        ]

    assert run_local(2, main) == [(12.0, [6.0]), (12.0, [])]


def test_a_batch_and_an_output_of_classes_of_their_own():
    def main(comm):
        engine = Pipeline(
            [Call(lambda rows: (rows.x, rows.flag)), Call(lambda pair: Named(*pair))],
            Mesh(comm, pipe=2),
            microbatches=2,
        )
        return engine.forward(Rows(torch.tensor([1.0, 2.0, 3.0]), True))

    for found in run_local(2, main):
        assert type(found) is Named and found.x.tolist() == [1, 2, 3] and found.times is True


def test_more_structures_than_an_edge_remembers():
    """The plain value differs in each of 70 micro-batches, and again in the next step."""

    def main(comm):
        engine = Pipeline(
            [Times(2), Call(lambda v: (v, int(v[0]))), Call(lambda p: p[0] * p[1])],
            Mesh(comm, pipe=2),
            loss_fn=lambda out, _: out.sum(),
            loss_reduction="sum",
            microbatches=70,
            boundaries=[2],
        )
        return [engine.step(torch.arange(1.0, 71.0) + k).item() for k in range(3)]

    expected = [float(sum((2 * (i + k)) ** 2 for i in range(1, 71))) for k in range(3)]
    assert run_local(2, main) == [expected] * 2


@pytest.mark.parametrize("num_data", [1, 2])
@pytest.mark.parametrize("reduction", ["bucket", "tree"])
def test_sparse_embedding_on_the_first_stage(num_data, reduction):
    def main(comm):
        embedding = nn.Embedding(4, 1, sparse=True)
        nn.init.ones_(embedding.weight)
        mesh = Mesh(comm, data=num_data, pipe=2)
        engine = Pipeline(
            [embedding, Times(3)],
            mesh,
            loss_fn=lambda out, _: out.sum(),
            loss_reduction="sum",
            microbatches=2,
            reduction=reduction,
        )
        rows = torch.tensor([1, 1, 2]) if mesh.data.rank == 0 else torch.tensor([3])
        if reduction == "tree":
            rows = torch.tensor([1, 2]) if num_data == 2 else rows
        engine.step(rows)
        return [p.grad.to_dense().reshape(-1).tolist() for p in engine.parameters()]

    results = run_local(2 * num_data, main)
    assert results[:2] == results[-2:]
    if reduction == "tree" and num_data == 2:
        assert results[:2] == [[[0, 6, 6, 0]], [[4]]]
    else:
        assert results[:2] == [[[0, 6, 3, 3 * (num_data - 1)]], [[2 + num_data]]]


@pytest.mark.parametrize(
    "value",
    [
        torch.tensor(2.0).expand(1),
        torch.tensor(2.0).expand(1, 1),
        torch.tensor([1.0, 2.0]).expand(3, 2),
        torch.arange(6.0).view(2, 3).t(),
        torch.tensor([1 + 2j, 3 - 4j]).conj(),
        torch.empty(0, 3),
        torch.tensor(True),
    ],
)
def test_bytes_of_any_layout(value):
    plain = torch.tensor(value.tolist(), dtype=value.dtype).reshape(value.shape)
    assert flat_bytes(value).tolist() == list(plain.numpy().tobytes())
    named = [("value", value)]
    hashes = set(run_local(2, lambda comm: check_replicas(comm, named)))
    assert hashes == {run_local(1, lambda comm: check_replicas(comm, [("value", plain)]))[0]}
