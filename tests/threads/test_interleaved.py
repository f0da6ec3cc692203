"""Several stages on a rank: one process alone too, with plans of one's own, and by name."""

import pytest
import torch
from torch import nn

from ringfold import Mesh, Pipeline, run_local
from ringfold.parallel.plan import PLANS, PlanError, plan_function, whole_plan
from ringfold.parallel.plan_check import check_plan
from ringfold.parallel.plan_text import parse_plan

ROWS = 12


def network():
    torch.manual_seed(1)
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(8)))


NETWORK = network().state_dict()


def batch():
    generator = torch.Generator().manual_seed(7)
    return torch.randn(2, ROWS, 4, generator=generator)


def gradients(size, num_data=1, **options):
    """Return the loss, the whole model's gradients and every rank's record of one step."""

    def main(comm):
        mesh = Mesh(comm, data=num_data, pipe=size // num_data)
        layers = [nn.Linear(4, 4) for _ in range(8)]
        options_here = {"microbatches": 6, "reduction": "tree", **options}
        engine = Pipeline(layers, mesh, loss_fn=nn.functional.mse_loss, **options_here)
        engine.load_state_dict({n: v for n, v in NETWORK.items()})
        share = ROWS // num_data
        x, y = batch()[:, mesh.data.rank * share : (mesh.data.rank + 1) * share]
        loss = engine.step(x, y).item()
        norm = engine.clip_grad_norm_(1e9).item()
        output = engine.forward(batch()[0])
        grads = {n: p.grad for n, p in engine.named_parameters()}
        return loss, norm, output, grads, engine.own_stages, engine.last_step

    results = run_local(size, main)
    assert all(r[:2] == results[0][:2] for r in results)
    assert all(torch.equal(r[2], results[0][2]) for r in results)
    whole = {name: grad for r in results for name, grad in r[3].items()}
    return results[0][0], whole, [r[4] for r in results], [r[5] for r in results]


def assert_same(found, expected):
    assert found[0] == expected[0]
    assert found[1].keys() == expected[1].keys()
    assert [n for n, g in expected[1].items() if not torch.equal(found[1][n], g)] == []


ALONE = gradients(1, schedule="gpipe")


@pytest.mark.parametrize("microbatches", [6, 3, 1])
@pytest.mark.parametrize(
    ("size", "num_data", "stages_per_rank"),
    [(1, 1, 1), (1, 1, 2), (1, 1, 8), (2, 1, 2), (2, 1, 4), (3, 1, 2), (4, 1, 2), (2, 2, 4)],
)
def test_any_number_of_stages_a_rank_gives_the_same_bits(
    size, num_data, stages_per_rank, microbatches
):
    if microbatches % num_data:
        pytest.skip("a micro-batch would lie on two replicas")
    options = {"schedule": "interleaved", "stages_per_rank": stages_per_rank}
    found = gradients(size, num_data, microbatches=microbatches, **options)
    alone = gradients(1, schedule="gpipe", microbatches=microbatches)
    assert_same(found, alone)
    pipe = size // num_data
    assert found[2] == [
        tuple(range(rank % pipe, pipe * stages_per_rank, pipe)) for rank in range(size)
    ]
    plan = whole_plan(plan_function("interleaved", stages_per_rank), pipe, microbatches // num_data)
    report = check_plan(plan, microbatches // num_data)
    for rank, record in enumerate(found[3]):
        assert record.actions == plan[rank % pipe]
        assert record.peak_in_flight == report.peak_activations[rank % pipe]


def test_without_the_tree_replicas_reduce_each_stage_once_it_is_done():
    loss, grads, _, _ = gradients(4, 2, schedule="interleaved", reduction="bucket", bucket_bytes=1)
    assert loss == pytest.approx(ALONE[0])
    for name, grad in ALONE[1].items():
        torch.testing.assert_close(grads[name], grad)


@pytest.mark.parametrize(
    "text",
    [
        # GPipe, and 1F1B with split backwards on some stages.
        """rank 0: F0@0 F1@0 F0@2 F1@2 B0@2 B1@2 B0@0 B1@0
           rank 1: F0@1 F1@1 F0@3 F1@3 B0@3 B1@3 B0@1 B1@1""",
        """rank 0: F0@0 F1@0 F0@2 I0@2 F1@2 B1@2 B0@0 W0@2 B1@0
           rank 1: F0@1 F1@1 F0@3 I0@3 F1@3 B1@3 W0@3 I0@1 I1@1 W1@1 W0@1""",
    ],
)
def test_a_plan_of_ones_own(text):
    text = "\n".join(line.strip() for line in text.splitlines())
    found = gradients(2, schedule=parse_plan(text), microbatches=2)
    assert_same(found, gradients(1, microbatches=2))


def test_refused_by_name():
    def main(comm):
        options = {"loss_fn": nn.functional.mse_loss, "microbatches": 2}
        mesh = Mesh(comm, pipe=2)
        layers = list(network())
        with pytest.raises(ValueError, match="'gpipe' has one stage a rank, not 2"):
            Pipeline(layers, mesh, schedule="gpipe", stages_per_rank=2, **options)
        with pytest.raises(ValueError, match="says itself which stages"):
            Pipeline(layers, mesh, schedule=PLANS["gpipe"], stages_per_rank=2, **options)
        with pytest.raises(ValueError, match="stage 8 of 10 is left without layers"):
            Pipeline(layers, mesh, schedule="interleaved", stages_per_rank=5, **options)
        with pytest.raises(ValueError, match="expected 3 boundaries for 4 stages"):
            Pipeline(layers, mesh, schedule="interleaved", boundaries=[4], **options)
        stuck = parse_plan("rank 0: F0@2 F0@0 B0@2 B0@0\nrank 1: F0@1 F0@3 B0@3 B0@1")
        with pytest.raises(PlanError, match="rank 0 is stuck at F0@2, waiting for F0 of stage 1"):
            Pipeline(layers, mesh, schedule=stuck, **{**options, "microbatches": 1})
        return True

    assert run_local(2, main) == [True, True]
