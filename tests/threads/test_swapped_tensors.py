"""Parameters whose tensors torch swaps for others are reduced as before."""

from contextlib import contextmanager

import pytest
import torch
from torch import nn

from ringfold import DataParallel, Mesh, NotFinite, Pipeline, ShardedOptimizer, run_local


@contextmanager
def swapping():
    torch.__future__.set_swap_module_params_on_conversion(True)
    try:
        yield
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)


def load(module):
    module.load_state_dict({name: value.clone() for name, value in module.state_dict().items()})


def convert(module):
    module.to(torch.float64).to(torch.float32)


def swap(module):
    for parameter in module.parameters():
        torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))


def swap_one(module):
    parameter = next(module.parameters())
    torch.utils.swap_tensors(parameter, nn.Parameter(parameter.detach().clone()))


def gradients_of(module, comm, value=1.0):
    module.zero_grad()
    module(torch.full((2, 3), value + comm.rank)).sum().backward()
    return [p.grad.flatten().tolist() for p in module.parameters()]


@pytest.mark.parametrize("change", [load, convert, swap, swap_one])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_are_reduced_after_a_swap(change, frozen):
    """Hooks went with the tensors, and each rank kept its own gradients, without a word."""

    def main(comm):
        module = DataParallel(nn.Linear(3, 1), comm)
        before = gradients_of(module, comm)
        module.zero_grad()
        module.requires_grad_(not frozen)
        for _ in range(2):  # the second may find the memory, and the address, of the first
            change(module)
            module.requires_grad_(True)
            assert gradients_of(module, comm) == before
            module.zero_grad()
            module.requires_grad_(not frozen)
        return before

    with swapping():
        assert run_local(2, main) == [[[3.0] * 3, [2.0]]] * 2


def test_two_parameters_that_are_swapped():
    """The hook of each told of the other's gradient, and a bucket left without its own."""

    def main(comm):
        layers = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
        module = DataParallel(layers, comm, bucket_bytes=1)
        gradients_of(module, comm)
        module.zero_grad()
        torch.utils.swap_tensors(layers[0].weight, layers[1].weight)
        return gradients_of(module, comm), module.last_step.overlapped

    first, second = run_local(2, main)
    assert first == second


def test_hooks_of_others_go_on_after_a_swap():
    """What parameters told of their hooks was no longer so."""

    def main(comm):
        module, seen = DataParallel(nn.Linear(3, 1), comm), []
        weight = module.module.weight
        handle = weight.register_post_accumulate_grad_hook(lambda p: seen.append(p is weight))
        swap(module)
        gradients_of(module, comm)
        handle.remove()
        gradients_of(module, comm)
        return seen

    assert run_local(2, main) == [[True]] * 2


def test_check_finite_of_one_rank_after_a_swap():
    """With one rank nothing is reduced, but gradients are looked at, by the same hooks."""

    def main(comm):
        module = DataParallel(nn.Linear(3, 1), comm, check_finite=True)
        swap(module)
        with pytest.raises(NotFinite):
            gradients_of(module, comm, float("nan"))

    run_local(1, main)


@pytest.mark.parametrize("reduction", ["bucket", "tree"])
def test_pipeline_with_replicas_after_a_swap(reduction):
    """What each replica has is reduced at the end in any case, but no bucket left early."""

    def main(comm):
        mesh = Mesh(comm, data=2, pipe=1)
        engine = Pipeline(
            [nn.Linear(3, 3, bias=False), nn.Linear(3, 1)],
            mesh,
            loss_fn=lambda output, _: output.sum(),
            microbatches=2,
            reduction=reduction,
        )
        x, found = torch.full((2, 3), 1.0 + comm.rank), []
        for _ in range(3):
            engine.zero_grad()
            engine.step(x)
            found.append([p.grad.tolist() for p in engine.parameters()])
            engine.zero_grad()
            engine.load_state_dict({k: v.clone() for k, v in engine.state_dict().items()})
        assert found[0] == found[1] == found[2]
        return found[0]

    with swapping():
        first, second = run_local(2, main)
    assert first == second


def test_optimizer_of_one_stage_refuses_to_clip_after_a_swap():
    """The mark went with the tensors, and each stage was clipped by a norm of its own."""

    def main(comm):
        engine = Pipeline(
            [nn.Linear(3, 3), nn.Linear(3, 1)],
            Mesh(comm, pipe=2),
            loss_fn=lambda output, _: output.sum(),
        )
        optimizer = ShardedOptimizer(engine.named_parameters(), engine.mesh.data, torch.optim.SGD)
        swap(engine.layers)
        engine.step(torch.ones(2, 3))
        with pytest.raises(ValueError, match="one stage of a pipeline"):
            optimizer.clip_grad_norm_(1.0)

    run_local(2, main)


def test_pipeline_refuses_parameters_that_were_replaced():
    """Nobody waited for their gradients, and replicas drifted apart."""

    def main(comm):
        layers = [nn.Linear(3, 3), nn.Linear(3, 1)]
        engine = Pipeline(layers, Mesh(comm, data=2), loss_fn=lambda output, _: output.sum())
        engine.layers[1].weight = nn.Parameter(torch.ones(1, 3))
        with pytest.raises(RuntimeError, match=r"parameter 1\.weight was added or replaced"):
            engine.step(torch.ones(2, 3))

    run_local(2, main)
