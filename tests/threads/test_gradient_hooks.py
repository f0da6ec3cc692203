"""What hooks of the owner do to gradients is reduced, whenever they were registered."""

import copy

import pytest
import torch
from torch import nn

from ringfold import DataParallel, Mesh, Pipeline, run_local

WIDTH = 520  # so that a weight is reduced where it lies
STEPS = 3
LIMIT = 1e-3


def layers(width: int) -> nn.Sequential:
    found = nn.Sequential(nn.Linear(width, width), nn.Tanh(), nn.Linear(width, 2))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in found.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) / width)
    return found


def batch(rank: int, step: int, width: int) -> torch.Tensor:
    return torch.randn(4, width, generator=torch.Generator().manual_seed(rank + 10 * step))


def clip(parameter: nn.Parameter) -> None:
    parameter.grad.clamp_(-LIMIT, LIMIT)


def hang(module: nn.Module) -> list:
    return [p.register_post_accumulate_grad_hook(clip) for p in module.parameters()]


@pytest.mark.parametrize("when", ["before", "after", "second step", "every step"])
@pytest.mark.parametrize(("width", "bucket_bytes"), [(8, 1), (8, 1 << 20), (WIDTH, 1)])
def test_gradients_are_clipped_before_they_are_reduced(width, bucket_bytes, when) -> None:
    """By a hook that came after the wrapper's, what had left was not, or only on some ranks."""

    def main(comm):
        module = layers(width)
        if when == "before":
            hang(module)
        model = DataParallel(module, comm, bucket_bytes=bucket_bytes)
        found = []
        for step in range(STEPS):
            handles = []
            if when == "every step" or (when, step) in {("after", 0), ("second step", 1)}:
                handles = hang(module)
            model.zero_grad()
            (model(batch(comm.rank, step, width)) * 100).sum().backward()
            found.append([p.grad.clone() for p in module.parameters()])
            if when == "every step":
                for handle in handles:
                    handle.remove()
        return found, model.last_step.overlapped

    expected = []
    for step in range(STEPS):
        module = layers(width)
        for rank in range(2):
            one = copy.deepcopy(module)
            (one(batch(rank, step, width)) * 100).sum().backward()
            for total, parameter in zip(module.parameters(), one.parameters(), strict=True):
                if when != "second step" or step > 0:
                    clip(parameter)
                mine = parameter.grad / 2
                total.grad = mine if total.grad is None else total.grad + mine
        expected.append([p.grad for p in module.parameters()])
    for found, overlapped in run_local(2, main):
        torch.testing.assert_close(found, expected)
        # Where the hooks stay, gradients leave while backward goes on, from the next step on.
        assert (overlapped > 0) == (bucket_bytes == 1 and when != "every step")


def test_wrappers_that_share_a_parameter_are_no_hooks_of_others() -> None:
    """None of them waits for another one's."""

    def main(comm):
        module = layers(8)
        models = [DataParallel(module, comm, bucket_bytes=1) for _ in range(2)]
        models[0](batch(comm.rank, 0, 8)).sum().backward()
        return max(model.last_step.overlapped for model in models)

    assert all(run_local(2, main))


@pytest.mark.parametrize("replaces", [False, True])
@pytest.mark.parametrize("width", [8, WIDTH])
def test_a_gradient_that_is_changed_after_it_has_left_is_refused(width: int, replaces) -> None:
    """As by a hook of a layer: each rank went on with another gradient, without a word."""

    def main(comm):
        module = layers(width)
        model = DataParallel(module, comm, bucket_bytes=1)
        model(batch(comm.rank, 0, width)).sum().backward()

        def change(_: torch.Tensor) -> None:
            bias = module[2].bias
            if replaces:
                bias.grad = bias.grad * 2
            else:
                bias.grad.mul_(2)

        model.zero_grad()
        hidden = module[:2](batch(comm.rank, 1, width))
        hidden.register_hook(change)
        with pytest.raises(RuntimeError, match=r"gradient of 2\.bias was written to or replaced"):
            module[2](hidden).sum().backward()

    run_local(2, main)


@pytest.mark.parametrize("replicas", [1, 2])
def test_hooks_of_a_pipeline_s_parameters(replicas: int) -> None:
    """As in the case of a wrapper, from the second step on."""

    def main(comm):
        found = {}
        for late in (False, True):
            module = layers(8)
            if not late:
                hang(module)
            mesh = Mesh(comm, data=replicas)
            mean = nn.functional.mse_loss
            engine = Pipeline(list(module), mesh, loss_fn=mean, microbatches=2, bucket_bytes=1)
            if late:
                hang(module)
            for step in range(STEPS):
                engine.zero_grad()
                x = batch(comm.rank, step, 8)
                engine.step(x, x[:, :2])
                found[late, step] = {n: p.grad.clone() for n, p in engine.named_parameters()}
        for step in range(STEPS):
            torch.testing.assert_close(found[True, step], found[False, step], rtol=0, atol=0)

    run_local(replicas, main)
