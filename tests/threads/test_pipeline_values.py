"""What may pass from stage to stage: structures, dtypes, layouts, memory that is used again."""

import time

import pytest
import torch
from little_layers import Call, Table, Times, grad, mean_output, sum_output
from torch import nn

from ringfold import Mesh, Pipeline, StageError, run_local


@pytest.mark.parametrize("kind", [tuple, list, dict])
@pytest.mark.parametrize("microbatches", [1, 2])
def test_pr23_bool_mask_integers_and_none_between_stages(kind, microbatches):
    """Masks were cast to half, third outputs dropped, and integers asked for gradients."""

    def main(comm):
        mask = torch.tensor([True, False, True, True])
        idx = torch.tensor([0, 1, 1, 0])
        first = Times(2)

        def hand_on(rows):
            values = (rows["h"], rows["mask"], rows["idx"], None)
            return dict(zip("abcd", values, strict=True)) if kind is dict else kind(values)

        seen = []
        layers = [
            Call(lambda rows: {**rows, "h": first(rows["h"])}),
            Call(hand_on),
            Table(seen),
        ]
        layers[0].first = first
        engine = Pipeline(
            layers,
            Mesh(comm, pipe=2),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=microbatches,
            boundaries=[2],
        )
        x = {"h": torch.tensor([1.0, 2.0, 3.0, 4.0]), "mask": mask, "idx": idx}
        return engine.step(x).item(), grad(engine), seen

    (loss, w, _), (same, table, seen) = run_local(2, main)
    assert loss == same == 700.0
    assert w == {"0.first.w": 350.0}
    assert table == {"2.table": [10.0, 6.0]}
    assert seen == [(kind, torch.bool, torch.int64, None)] * microbatches


def test_pr08_buffers_in_flight_are_not_overwritten():
    """A stage that ran ahead reused the memory of what it was still sending."""

    def main(comm):
        seen = []

        def slow(x):
            time.sleep(0.05)
            seen.append(sorted(set(x.flatten().tolist())))
            return x

        layers = [Times(1), nn.Sequential(Call(slow), Times(1))]
        engine = Pipeline(
            layers, Mesh(comm, pipe=2), loss_fn=mean_output, microbatches=4, schedule="gpipe"
        )
        x = torch.arange(1.0, 5.0).view(4, 1).expand(4, 50_000)
        engine.step(x)
        return seen

    assert run_local(2, main)[1] == [[1.0], [2.0], [3.0], [4.0]]


class Cache(nn.Module):
    """Hand on memory of its own, which the next micro-batch is written to."""

    def __init__(self):
        super().__init__()
        self.memory = torch.zeros(1, 50_000)

    def forward(self, x):
        return self.memory.copy_(x)


@pytest.mark.parametrize("training", [True, False])
def test_a_layer_may_hand_on_its_own_memory(training):
    """The next stage saw what later micro-batches had written there."""

    def main(comm):
        seen = []

        def slow(x):
            time.sleep(0.01)
            seen.append(sorted(set(x.flatten().tolist())))
            return x

        layers = [Cache(), nn.Sequential(Call(slow), Times(1))]
        mesh = Mesh(comm, pipe=2)
        engine = Pipeline(layers, mesh, loss_fn=mean_output, microbatches=4, schedule="gpipe")
        x = torch.arange(1.0, 5.0).view(4, 1).expand(4, 50_000)
        engine.step(x) if training else engine.forward(x)
        return seen

    assert run_local(2, main)[1] == [[1.0], [2.0], [3.0], [4.0]]


@pytest.mark.parametrize("pipe", [1, 2])
@pytest.mark.parametrize("last", [lambda x: x, lambda x: {"x": x, "none": None}])
def test_the_last_layer_may_hand_on_its_own_memory(pipe, last):
    """All micro-batches had what the last one had written there."""

    def main(comm):
        layers = [Cache(), nn.Sequential(Cache(), Call(last))]
        engine = Pipeline(layers, Mesh(comm, pipe=pipe), microbatches=3)
        found = engine.forward(torch.arange(1.0, 4.0).view(3, 1).expand(3, 50_000))
        return (found["x"] if isinstance(found, dict) else found)[:, 0].tolist()

    assert run_local(pipe, main) == [[1.0, 2.0, 3.0]] * pipe


def test_shapes_change_from_step_to_step_and_between_microbatches():
    def main(comm):
        pool = Call(lambda x: x[:, : int(x[0, 0].detach())])  # as wide as the data say
        engine = Pipeline(
            [Times(1), pool, Times(2)],
            Mesh(comm, pipe=3),
            loss_fn=sum_output,
            loss_reduction="sum",
            microbatches=2,
        )
        losses = []
        for width in (4, 2, 3):
            x = torch.ones(2, 5)
            x[0] = width
            losses.append(engine.step(x).item())
        return losses

    for losses in run_local(3, main):
        assert losses == [2.0 * (w * w + 1) for w in (4, 2, 3)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16, torch.complex64])
def test_dtypes_and_layouts_between_stages(dtype):
    def main(comm):
        turn = Call(lambda x: (x.t().conj(), x[:, :1].expand(-1, 4)))
        join = Call(lambda pair: pair[0].t().abs().float() + pair[1].abs().float())
        layers = [Times(2).to(dtype), turn, join]
        engine = Pipeline(
            layers, Mesh(comm, pipe=2), loss_fn=sum_output, boundaries=[2], microbatches=1
        )
        x = torch.arange(1.0, 9.0).view(2, 4).to(dtype)
        loss = engine.step(x).item()
        return loss, grad(engine)

    (loss, grads), (same, _) = run_local(2, main)
    assert loss == same == 2 * (36 + 4 * (1 + 5))
    assert grads == {"0.w": 60}


def test_the_last_output_may_be_what_the_loss_takes():
    def main(comm):
        spread = Call(lambda x: torch.distributions.Normal(x, 1.0))
        engine = Pipeline(
            [Times(2), Times(3), spread],
            Mesh(comm, pipe=2),
            loss_fn=lambda found, _: -found.log_prob(torch.zeros(())).sum(),
            loss_reduction="sum",
        )
        engine.step(torch.tensor([1.0, 3.0]))
        with pytest.raises(StageError, match="output of the last stage: a Normal cannot be"):
            engine.forward(torch.ones(2))
        return grad(engine)

    # Of -log p = x^2 / 2 + ..., of which x = 6 a.
    assert run_local(2, main) == [{"0.w": 180.0}, {"1.w": 120.0}]


def test_output_that_needs_no_gradient_gets_none_back():
    """With the first stage frozen there is nothing to send back, and nobody may wait for it."""

    def main(comm):
        layers = [Times(2), Times(3)]
        layers[0].w.requires_grad_(False)
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_output, microbatches=2)
        # As with LoRA: optimizers refuse an empty list, and here one stage has nothing to train.
        trained = [p for p in engine.parameters() if p.requires_grad]
        optimizer = torch.optim.SGD(trained, lr=0.5)
        loss = engine.step(torch.tensor([1.0, 3.0])).item()
        gradients = grad(engine)
        optimizer.step()
        return loss, gradients, sum(p.sum().item() for p in engine.parameters())

    assert run_local(2, main) == [(12.0, {}, 2.0), (12.0, {"1.w": 4.0}, 1.0)]


def test_received_value_that_is_not_used():
    def main(comm):
        layers = [Times(2), Call(lambda x: (x, x * 5)), Call(lambda pair: pair[0]), Times(3)]
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=mean_output, boundaries=[2])
        return engine.step(torch.tensor([1.0, 3.0])).item(), grad(engine)

    assert run_local(2, main) == [(12.0, {"0.w": 6.0}), (12.0, {"3.w": 4.0})]


def test_nested_outputs_are_joined_on_every_rank():
    def main(comm):
        split = Call(lambda x: {"twice": x * 2, "both": (x, None, x > 2, "name")})
        engine = Pipeline([Times(1), split], Mesh(comm, pipe=2), microbatches=3)
        with pytest.raises(ValueError, match="without loss_fn"):
            engine.step(torch.ones(2))
        return engine.forward(torch.arange(4.0) if comm.rank == 0 else None)

    for output in run_local(2, main):
        assert output["twice"].tolist() == [0, 2, 4, 6]
        assert not output["twice"].requires_grad
        assert output["both"][2].tolist() == [False, False, False, True]
        assert (output["both"][1], output["both"][3]) == (None, "name")
