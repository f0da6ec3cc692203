"""Engines whose tensors lie on a GPU, pretended: equal to the same engines on the host's."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from fake_cuda import CUDA, CudaTensor, find_anywhere, on_cuda, pretend, to_cuda
from fake_device import FakeNode
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from ringfold import Communicator, DataParallel, Mesh, Pipeline, Settings, run_local
from ringfold.comm import device_nesting
from ringfold.comm.errors import OutOfMemory
from ringfold.comm.transport import device
from ringfold.comm.transport.local import LocalTransport
from ringfold.parallel import (
    ShardedOptimizer,
    SyncBatchNorm,
    broadcast_optimizer,
    carriers,
    data_parallel,
    gpu_threads,
    pipeline,
)
from ringfold.parallel.buffer_copies import LARGE_BYTES
from ringfold.parallel.random_keys import Dropout

SETTINGS = Settings(timeout=60)

# Words that overflow, where kernels run in the simulator.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(autouse=True)
def cuda_everywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    find_anywhere(monkeypatch)


LAYERS = [
    nn.Linear(6, 9),
    nn.Tanh(),
    nn.Linear(9, 5, bias=False),
    Dropout(0.25),
    nn.BatchNorm1d(5),
    nn.Linear(5, 3),
]


def layers() -> list[nn.Module]:
    """Made once: threads that seed torch's generator disturb each other."""
    return copy.deepcopy(LAYERS)


def plain_layers() -> list[nn.Module]:
    return [layer for layer in layers() if not isinstance(layer, Dropout)]


def batch(rank: int, step: int, rows: int = 8) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(rows, 6, generator=generator), torch.randn(rows, 3, generator=generator)


Train = Callable[[Communicator, Callable[[Any], Any], Callable[[Tensor], Tensor]], list[Tensor]]


def on_both(size: int, train: Train) -> None:
    """Run on the host and on the GPU, and compare what is returned."""
    on_host = run_local(size, lambda comm: train(comm, lambda m: m, lambda t: t), settings=SETTINGS)

    def main(comm: Communicator) -> list[Tensor]:
        with pretend():
            return train(comm, to_cuda, on_cuda)

    on_gpu = run_local(size, main, settings=SETTINGS)
    for host, gpu in zip(on_host, on_gpu, strict=True):
        assert len(host) == len(gpu) > 0
        for one, other in zip(host, gpu, strict=True):
            assert isinstance(other, CudaTensor), type(other)
            torch.testing.assert_close(one, other.cpu(), rtol=1e-5, atol=1e-6)


def of_model(model: Any) -> list[Tensor]:
    return [p.detach() for _, p in model.named_parameters()]


@pytest.mark.parametrize("wire", [None, "bf16", "fp16", "powersgd:2", "topk:0.3"])
def test_data_parallel(wire: str | None) -> None:
    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        module = move(nn.Sequential(*plain_layers()))
        model = DataParallel(module, comm, bucket_bytes=150, wire=wire, check_finite=True)
        if wire == "powersgd:2":
            model._reducer.wire.hook.start_step = 1  # type: ignore[union-attr]
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        for step in range(3):
            x, y = map(put, batch(comm.rank, step))
            optimizer.zero_grad()
            with model.weighted(comm.rank + 1.0):
                (model(x) - y).square().mean().backward()
            assert all(p.grad.device == p.device for p in model.parameters())
            optimizer.step()
        model.check_replicas()
        return of_model(model)

    on_both(2, train)


def test_buckets_where_no_memory_is_left_to_register(monkeypatch: pytest.MonkeyPatch) -> None:
    """On one rank: backward ended with a CommError, though torch had memory of its own."""
    empty = device.empty

    def full(node_rank: int, *arguments: Any) -> Tensor:
        if node_rank == 1:
            raise OutOfMemory("no bytes of GPU memory are left")
        return empty(node_rank, *arguments)

    monkeypatch.setattr(device, "empty", full)

    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        model = DataParallel(move(nn.Sequential(*plain_layers())), comm, bucket_bytes=150)
        for step in range(2):
            x, y = map(put, batch(comm.rank, step))
            (model(x) - y).square().mean().backward()
        return [p.grad for p in model.parameters()]

    with pytest.warns(RuntimeWarning, match="rank 1: a bucket .* no bytes of GPU memory"):
        on_both(2, train)


class Waits(TorchFunctionMode):
    """Counts how often the host reads what a GPU has computed, for which it waits."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("item", "tolist", "cpu", "__float__", "__int__", "__bool__", "equal"):
            self.count += isinstance(args[0], CudaTensor)
        return func(*args, **(kwargs or {}))


def test_the_host_does_not_wait_for_each_micro_batch_or_gradient() -> None:
    def train(comm: Communicator, depth: int) -> tuple[int, int]:
        plain = nn.Sequential(*[nn.Linear(6, 6) for _ in range(depth)])
        plain[0].register_buffer("table", torch.zeros(LARGE_BYTES))
        made = to_cuda(plain)
        mesh = Mesh(comm, data=1, pipe=1)
        loss_fn = nn.functional.mse_loss
        engine = Pipeline(made, mesh, loss_fn=loss_fn, microbatches=depth, recompute=True)
        x = on_cuda(torch.randn(12, 6))
        waits = Waits()
        with waits:
            loss = engine.step(x, x * 0)
        stepped = waits.count
        assert loss > 0
        with waits:
            assert engine.clip_grad_norm_(1e-3) > 1e-3
        return stepped, waits.count - stepped

    def main(comm: Communicator) -> None:
        with pretend():
            assert train(comm, 2) == train(comm, 6)

    run_local(1, main, settings=SETTINGS)


@pytest.mark.parametrize("wire", ["powersgd:2", "topk:0.3"])
def test_the_host_does_not_wait_for_each_gradient_of_a_wire(wire: str) -> None:
    def train(comm: Communicator, depth: int) -> int:
        made = to_cuda(nn.Sequential(*[nn.Linear(6, 6, bias=False) for _ in range(depth)]))
        model = DataParallel(made, comm, wire=wire)
        if wire == "powersgd:2":
            model._reducer.wire.hook.start_step = 0  # type: ignore[union-attr]
        model(on_cuda(torch.ones(2, 6))).sum().backward()
        with Waits() as waits:
            model.reduce_gradients()
        return waits.count

    def main(comm: Communicator) -> None:
        with pretend():
            assert 0 < train(comm, 2) == train(comm, 6)

    run_local(2, main, settings=SETTINGS)


@pytest.mark.parametrize("size", [1, 3])
def test_statistics_of_all_ranks_are_waited_for_once(size: int) -> None:
    def main(comm: Communicator) -> None:
        layer = SyncBatchNorm(4, comm)
        rows = torch.arange(40.0).reshape(10, 4) * (comm.rank + 1)
        with pretend(), Waits() as waits:
            out = to_cuda(layer)(on_cuda(rows))
        assert waits.count == 1 and isinstance(out, CudaTensor)

    run_local(size, main, settings=SETTINGS)


def test_a_large_gradient_goes_by_way_of_registered_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch's own memory, which no other rank opens, would be staged through the host's."""
    given: list[tuple[int, int]] = []
    empty = device.empty

    def noted(*args: Any) -> Tensor:
        made: Tensor = empty(*args)
        given.append((made.data_ptr(), made.data_ptr() + made.nbytes))
        return made

    monkeypatch.setattr(device, "empty", noted)
    # Of what pretends, torch counts more uses.
    monkeypatch.setattr(carriers, "in_place", lambda gradient, _: gradient.detach().view(-1))

    def main(comm: Communicator) -> None:
        with pretend():
            model = DataParallel(to_cuda(nn.Linear(513, 512)), comm, bucket_bytes=1 << 20)
            for scale in (1.0, 2.0):
                model.zero_grad()
                model(on_cuda(torch.full((2, 513), scale * (comm.rank + 1)))).sum().backward()
                gradient = model.module.weight.grad
                assert bool((gradient == 3 * scale).all())
                assert any(low <= gradient.data_ptr() < high for low, high in given)

    run_local(2, main, settings=SETTINGS)


@pytest.mark.parametrize("wire", [None, "bf16"])
def test_data_parallel_over_nodes(wire: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four ranks on two nodes, whose buckets are reduced over ipc there."""
    nodes = [FakeNode(), FakeNode()]

    def world_rank(transport: Any) -> int:
        return int(transport._members[transport.rank])

    find_anywhere(monkeypatch, lambda comm: nodes[world_rank(comm._transport) // 2])
    monkeypatch.setattr(
        LocalTransport, "node", lambda self: self.split(world_rank(self) // 2, self.rank)
    )
    monkeypatch.setattr(device_nesting, "NEST_BYTES", 4)
    prepare, nested = device_nesting.Nested.allreduce, []
    monkeypatch.setattr(
        device_nesting.Nested, "allreduce", lambda *args: nested.append(1) or prepare(*args)
    )

    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        model = DataParallel(
            move(nn.Sequential(*plain_layers())), comm, bucket_bytes=150, wire=wire
        )
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(3):
            x, y = map(put, batch(comm.rank, step))
            optimizer.zero_grad()
            (model(x) - y).square().mean().backward()
            optimizer.step()
        model.check_replicas()
        return of_model(model)

    on_both(4, train)
    assert len(nested) >= 4 * 3


@pytest.mark.parametrize(
    ("data", "pipe", "schedule", "reduction"),
    [
        (1, 2, "gpipe", "bucket"),
        (2, 2, "1f1b", "bucket"),
        (1, 2, "interleaved", "bucket"),
        (1, 2, "zero-bubble", "bucket"),
        (2, 1, "1f1b", "tree"),
        (1, 3, "1f1b", "tree"),
    ],
)
def test_pipeline(data: int, pipe: int, schedule: str, reduction: str) -> None:
    """Activations and gradients go from device to device, and dropout's masks to where they are."""
    recompute = schedule in ("gpipe", "1f1b")

    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        whole = move(nn.Sequential(*layers()))
        engine = Pipeline(
            whole,
            Mesh(comm, data=data, pipe=pipe),
            loss_fn=nn.functional.mse_loss,
            microbatches=4,
            schedule=schedule,
            reduction=reduction,
            recompute=recompute,
            bucket_bytes=150,
        )
        engine.train()
        for step in range(2):
            x, y = map(put, batch(engine.mesh.data.rank, step))
            for parameter in engine.parameters():
                parameter.grad = None
            engine.step(x, y)
            engine.clip_grad_norm_(0.5)
            with torch.no_grad():
                for parameter in engine.parameters():
                    if parameter.grad is not None:
                        parameter -= 0.1 * parameter.grad
        engine.eval()
        output = engine.forward(x)
        assert output.device == x.device
        return [output.detach(), *of_model(engine)]

    on_both(data * pipe, train)


def test_values_that_stages_hand_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks and indices come to the device of the stage, also those that were made on the host."""

    class First(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.tensor([2.0]))

        def forward(self, x: Tensor) -> Any:
            return self.weight * x, x > 1.5, {"index": torch.tensor([0, 1, 1, 0])}, None

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.tensor([10.0, 100.0]))

        def forward(self, value: Any) -> Tensor:
            h, mask, inside, nothing = value
            assert nothing is None and mask.dtype == torch.bool
            assert h.device == mask.device == inside["index"].device == self.table.device
            return (h * self.table[inside["index"]])[mask]

    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        engine = Pipeline(
            move(nn.Sequential(First(), Second())),
            Mesh(comm, pipe=2),
            loss_fn=lambda output, _: output.sum(),
            loss_reduction="sum",
            microbatches=1,
        )
        x = put(torch.tensor([1.0, 2.0, 3.0, 4.0]))
        assert float(engine.step(x, x)) == 1080.0
        return [p.grad for p in engine.parameters()]

    on_both(2, train)


def test_tied_weights() -> None:
    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        first, last = nn.Linear(6, 6), nn.Linear(6, 6)
        with torch.no_grad():
            first.weight.copy_(torch.arange(36.0).view(6, 6) / 36)
            first.bias.zero_()
            last.bias.zero_()
        whole = move(nn.Sequential(first, nn.Tanh(), last))
        last.weight = first.weight
        engine = Pipeline(whole, Mesh(comm, pipe=2), loss_fn=lambda y, _: y.mean(), microbatches=2)
        x, y = map(put, batch(0, 0))
        engine.step(x, y)
        return [p.grad for p in engine.parameters() if p.grad is not None]

    on_both(2, train)


def test_sharded_optimizer_and_its_state() -> None:
    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        module = move(nn.Sequential(*plain_layers()))
        optimizer = ShardedOptimizer(module.named_parameters(), comm, torch.optim.Adam, lr=0.01)
        for step in range(3):
            x, y = map(put, batch(comm.rank, step))
            optimizer.zero_grad()
            (module(x) - y).square().mean().backward()
            optimizer.step()
            if step == 1:
                optimizer.load_state_dict(optimizer.state_dict())
        return of_model(module)

    on_both(2, train)


def test_optimizer_state_is_sent_to_where_the_parameters_are() -> None:
    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        module = move(nn.Sequential(*plain_layers()))
        optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
        if comm.rank == 0:
            x, y = map(put, batch(0, 0))
            (module(x) - y).square().mean().backward()
            optimizer.step()
        broadcast_optimizer(optimizer, comm, root=0)
        states = [optimizer.state[p] for p in module.parameters()]
        assert not any(isinstance(state["step"], CudaTensor) for state in states)
        return [state["exp_avg"] for state in states]

    on_both(2, train)


def test_checkpoints_are_of_no_device(tmp_path: Path) -> None:
    """Written from the GPU's memory, and read into it."""
    import ringfold

    def train(comm: Communicator, move: Any, put: Any) -> list[Tensor]:
        module = move(nn.Sequential(*plain_layers()))
        model = DataParallel(module, comm)
        folder = tmp_path / str(next(iter(model.parameters())).device).replace(":", "")
        wanted = [p.detach().clone() for p in model.parameters()]
        ringfold.save(folder, {"model": model}, comm)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.zero_()
        ringfold.load(folder, {"model": model}, comm)
        for parameter, before in zip(model.parameters(), wanted, strict=True):
            assert torch.equal(parameter.detach(), before) and parameter.device == before.device
        return wanted

    on_both(2, train)


def test_threads_that_share_a_gpu_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """There, autograd has one thread for all of them: one rank's backward would await another's."""
    for module in (data_parallel, pipeline):
        monkeypatch.setattr(module, "check_gpu_threads", gpu_threads.check_gpu_threads)

    def main(comm: Communicator) -> None:
        module, words = plain_layers()[0], "ranks 0, 2 are threads of one process .* on cuda:0"
        with pretend():
            moved = to_cuda(module) if comm.rank != 1 else module
            before = [p.detach().clone() for p in moved.parameters()]
            with pytest.raises(ValueError, match=words):
                DataParallel(moved, comm, root=2)
            assert all(torch.equal(p, q) for p, q in zip(moved.parameters(), before, strict=True))
            stages = [to_cuda(one) for one in plain_layers()[:2]]
            with pytest.raises(ValueError, match="ranks 0, 1, 2 are threads"):
                Pipeline(stages, Mesh(comm, pipe=1), loss_fn=nn.MSELoss(), microbatches=1)

    run_local(3, main, settings=SETTINGS)


def test_what_mixes_devices_is_refused_here_as_on_a_gpu() -> None:
    with pretend():
        x = torch.zeros(3, device=CUDA)
        assert isinstance(x * 2 + 1.0, CudaTensor) and isinstance(x.cpu() + torch.ones(3), Tensor)
        with pytest.raises(RuntimeError, match="one device"):
            x + torch.ones(3)
        with pytest.raises(TypeError, match="numpy"):
            x.numpy()


@pytest.mark.parametrize("words", ["", "--pipe 2", "--wire topk:0.5", "--reduction tree"])
def test_what_train_py_builds(words: str) -> None:
    """Batches are made on the host, and outputs come back there."""
    from ringfold.workloads import load
    from ringfold.workloads.command_line import parse
    from ringfold.workloads.engines import layers_of, make_engine
    from ringfold.workloads.options import grid_of
    from ringfold.workloads.workload import Share

    options = parse(["--batch-size", "32", *words.split()])
    workload = load("digits")
    whole = layers_of(workload, options)
    grid = grid_of(options, 2)

    def losses(comm: Communicator, device: str) -> list[float]:
        mesh = Mesh(comm, data=grid.data, pipe=grid.pipe)
        data = workload.data(Share(32, mesh.data.rank, mesh.data.size, 0))
        layers = copy.deepcopy(whole)
        engine = make_engine(layers, workload, mesh, options, grid, data, device)
        optimizer = workload.optimizer([p for _, p in engine.named_parameters()], 0.1)
        found = []
        for x, y in list(data.batches(0))[:2]:
            optimizer.zero_grad()
            found.append(engine.step(x, y))
            optimizer.step()
        output = engine.predict(x)
        assert output is None or not isinstance(output, CudaTensor)
        assert all(p.device.type == device[:4].strip(":") for _, p in engine.named_parameters())
        return found

    def on_gpu(comm: Communicator) -> list[float]:
        with pretend():
            return losses(comm, "cuda:0")

    host = run_local(2, lambda comm: losses(comm, "cpu"), settings=SETTINGS)
    for one, other in zip(host, run_local(2, on_gpu, settings=SETTINGS), strict=True):
        assert other == pytest.approx(one, rel=1e-5)
