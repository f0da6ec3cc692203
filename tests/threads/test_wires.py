"""Wire hooks: the user's own, PowerSGD and top-k, with errors kept and bytes by the formula."""

import copy
import dataclasses
import functools

import numpy as np
import pytest
import torch
from torch import nn

from ringfold import DataParallel, Mesh, Pipeline, run_local
from ringfold.parallel.hooks import Rounds, wire_format
from ringfold.parallel.powersgd import PowerSGD, factor_shapes
from ringfold.parallel.topk import TopK, num_kept

FLAG = 4  # bytes per flag beside a hook's bucket


class Planted(nn.Module):
    """Parameters whose gradients the test gives."""

    def __init__(self, **shapes):
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))

    def forward(self, gradients):
        return sum((self.get_parameter(n) * g).sum() for n, g in gradients.items())


def planted(rank, step, shapes, scale=1.0):
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return {n: scale * torch.randn(shape, generator=generator) for n, shape in shapes.items()}


SHAPES = {"w": (12, 3, 5), "b": (12,), "v": (9, 20), "s": (), "e": (0, 4)}


def means(size, step, shapes=SHAPES):
    rows = [planted(rank, step, shapes) for rank in range(size)]
    return {name: sum(row[name] for row in rows) / size for name in shapes}


def own_mean(bucket, comm):
    return comm.allreduce(bucket.flat, op="mean", blocking=False)


def own_halves(bucket, comm):
    half = bucket.flat.to(torch.bfloat16)

    def rounds():
        yield comm.allreduce(half, op="mean", blocking=False)
        bucket.flat.copy_(half)

    return Rounds(rounds())


@pytest.mark.parametrize(("hook", "rtol"), [(own_mean, 1e-6), (own_halves, 0.02)])
@pytest.mark.parametrize("bucket_bytes", [1, 1 << 20])
def test_a_users_hook(hook, rtol, bucket_bytes):
    size = 3

    def main(comm):
        seen = []

        def noted(bucket, comm):
            seen.append((bucket.names, [tuple(t.shape) for t in bucket.tensors()]))
            return hook(bucket, comm)

        model = DataParallel(Planted(**SHAPES), comm, bucket_bytes=bucket_bytes, wire=noted)
        for step in range(3):
            model.zero_grad()
            model(planted(comm.rank, step, SHAPES)).backward()
            for name, p in model.named_parameters():
                torch.testing.assert_close(p.grad, means(size, step)[name], rtol=rtol, atol=rtol)
        assert model.last_step.reductions == (5 if bucket_bytes == 1 else 1)
        return [dict(zip(names, shapes, strict=True)) for names, shapes in seen]

    for seen in run_local(size, main):
        assert all(shapes[name] == SHAPES[name] for shapes in seen for name in shapes)


def test_hook_with_weights_missing_gradients_and_a_late_parameter():
    def main(comm):
        module = Planted(a=(2, 2), b=(3,), c=(2,))
        module.c.requires_grad_(False)
        model = DataParallel(module, comm, wire=own_mean)
        ones = {"a": torch.ones(2, 2) * (comm.rank + 1), "b": torch.ones(3), "c": torch.ones(2)}
        with model.weighted(comm.rank):  # 0, 1, 2
            model({"a": ones["a"]} if comm.rank else ones).backward()
        assert module.a.grad.unique().tolist() == [pytest.approx((1 * 2 + 2 * 3) / 3)]
        assert module.b.grad.tolist() == [0, 0, 0] and module.c.grad is None
        assert model.last_step.partial == ("b",)
        module.zero_grad()
        module.c.requires_grad_(True)
        model({name: ones[name] for name in "ac"}).backward()
        assert module.b.grad is None
        assert module.c.grad.tolist() == [1, 1]
        assert module.a.grad.unique().tolist() == [2]
        assert model.last_step.partial == ()

    run_local(3, main)


@pytest.mark.parametrize(
    ("word", "dtypes"),
    [
        ("fp32", ["float32", torch.float32, np.float32, np.dtype("float32")]),
        ("bf16", ["bfloat16", torch.bfloat16]),
        ("fp16", ["float16", torch.float16, np.float16, np.dtype("float16")]),
    ],
)
def test_a_dtype_says_what_its_word_does(word, dtypes):
    """Neither torch's nor a full name was one; NumPy's class was taken for a hook."""

    def main(comm):
        for dtype in dtypes:
            own = word if comm.rank else dtype
            model = DataParallel(nn.Linear(2, 1), comm, wire_dtype=own)
            model(torch.ones(1, 2)).sum().backward()
            assert model.module.weight.grad.tolist() == [[1.0, 1.0]]
            mesh = Mesh(comm, data=2)
            Pipeline([nn.Linear(2, 1)], mesh, loss_fn=nn.functional.mse_loss, wire_dtype=own)

    run_local(2, main)
    assert {wire_format(dtype) for dtype in dtypes} == {wire_format(word)}


def test_bad_wires():
    for wire, message in (
        ("powersgd:0", "powersgd:RANK: expected rank >= 1, got 0"),
        ("powersgd:x", "powersgd:RANK"),
        ("topk:2", "topk:RATIO: expected a ratio above 0 and at most 1, got 2"),
        ("top", "unknown wire dtype 'top'.*topk:RATIO"),
    ):
        with pytest.raises(ValueError, match=message):
            wire_format(wire)
    for no_wire, got in ((3, "int"), (PowerSGD, "the class PowerSGD"), (float, "the class float")):
        with pytest.raises(TypeError, match=f"got {got}$"):
            wire_format(no_wire)
    for dtype in (torch.float64, np.int8, np.dtype("float64")):
        with pytest.raises(ValueError, match=r"unknown wire dtype '(float64|int8)'.*fp32, bf16"):
            wire_format(dtype)

    def main(comm):
        with pytest.raises(
            ValueError, match=r"wire PowerSGD\(rank=2.*on rank 0; wire None on rank"
        ):
            DataParallel(nn.Linear(2, 2), comm, wire="powersgd:2" if comm.rank == 0 else None)
        with pytest.raises(ValueError, match="got both"):
            DataParallel(nn.Linear(2, 2), comm, wire="bf16", wire_dtype="bf16")

    run_local(2, main)


def train_planted(comm, hook, steps, shapes=SHAPES, bucket_bytes=256, skip=lambda rank, step: ()):
    """Return the sum of all results, and the records of the steps."""
    model = DataParallel(Planted(**shapes), comm, bucket_bytes=bucket_bytes, wire=hook)
    total = {name: torch.zeros(shape) for name, shape in shapes.items()}
    records = []
    for step in range(steps):
        model.zero_grad()
        left_out = skip(comm.rank, step)
        gradients = planted(comm.rank, step, shapes)
        model({n: g for n, g in gradients.items() if n not in left_out}).backward()
        for name, p in model.named_parameters():
            if p.grad is not None:
                total[name] += p.grad
        records.append(model.last_step)
    return total, records


def skipping(rank, step):
    return ("w",) if step % 3 == rank else ("v",) if step == 3 else ()


@pytest.mark.parametrize("make", [lambda: PowerSGD(2, start_step=1), lambda: TopK(0.1)])
@pytest.mark.parametrize("skip", [lambda rank, step: (), skipping])
@pytest.mark.parametrize("size", [2, 3])
def test_nothing_is_lost_what_was_not_applied_is_in_the_errors(make, skip, size):
    """Sum of results + mean of the errors == sum of the mean gradients, for every parameter."""
    steps = 7

    def main(comm):
        hook = make()
        total, _ = train_planted(comm, hook, steps, skip=skip)
        return total, {name: hook.error(name) for name in SHAPES}

    results = run_local(size, main)
    for name, shape in SHAPES.items():
        given = torch.zeros(shape)
        for step in range(steps):
            for rank in range(size):
                if name not in skip(rank, step):
                    given += planted(rank, step, SHAPES)[name] / size
        errors = [errors[name] for _, errors in results if errors[name] is not None]
        left = sum(error.reshape(shape) for error in errors) / size if errors else 0
        for total, _ in results:
            assert torch.equal(total[name], results[0][0][name])
            torch.testing.assert_close(total[name] + left, given, rtol=1e-4, atol=1e-5)
        if name in "wv":
            assert any(error.abs().max() > 0.01 for error in errors)


def test_powersgd_is_exact_at_full_rank_and_for_low_rank_gradients():
    shapes = {"w": (12, 16)}

    def main(comm):
        hook = PowerSGD(2, start_step=0)
        model = DataParallel(Planted(**shapes), comm, wire=hook)
        rows = planted(0, 5, {"l": (12, 2), "r": (2, 16)})
        low = rows["l"] @ rows["r"] * (comm.rank + 1)
        model({"w": low}).backward()
        torch.testing.assert_close(model.module.w.grad, 1.5 * low / (comm.rank + 1))
        assert hook.error("w").abs().max() < 1e-4

    run_local(2, main)


def test_powersgd_comes_close_to_the_best_approximation():
    """The warm start turns one multiplication per step into a power iteration."""

    def main(comm):
        hook = PowerSGD(2, start_step=0)
        model = DataParallel(Planted(w=(20, 30)), comm, wire=hook)
        matrix = planted(3, 1, {"w": (20, 30)})["w"]
        u, s, v = torch.linalg.svd(matrix, full_matrices=False)
        s = torch.tensor([10.0, 5.0] + [0.5**k for k in range(18)])
        matrix = u @ s.diag() @ v
        distances = []
        for _ in range(4):
            hook._memory.get("w") and hook._memory["w"].error.zero_()
            model.zero_grad()
            model({"w": matrix}).backward()
            distances.append(torch.linalg.norm(model.module.w.grad - matrix).item())
        return distances, torch.linalg.norm(s[2:]).item()

    for distances, best in run_local(2, main):
        assert distances[0] > 1.05 * best
        assert best <= distances[-1] * (1 + 1e-5) < 1.01 * best


def expected_powersgd_bytes(names, rank):
    total = 0
    for name in names:
        (n, r), (m, _) = factor_shapes(SHAPES[name], rank)
        count = torch.Size(SHAPES[name]).numel()
        total += 4 * min((n + m) * r, count) + FLAG
    return total


def test_bytes_on_the_wire_are_those_of_the_formula():
    def main(comm):
        _, records = train_planted(comm, PowerSGD(3, start_step=2), 4, bucket_bytes=1 << 20)
        names = list(SHAPES)
        dense = sum(4 * torch.Size(s).numel() + FLAG for s in SHAPES.values()) + FLAG
        low = expected_powersgd_bytes(names, 3) + FLAG  # and the flag of a change
        assert [r.bucket_nbytes for r in records] == [(dense,), (dense,), (low,), (low,)]
        assert low < dense / 1.5
        _, records = train_planted(comm, TopK(0.05), 2, bucket_bytes=1 << 20)
        kept = [num_kept(torch.Size(s).numel(), 0.05) for s in SHAPES.values()]
        assert kept == [9, 1, 9, 1, 0]
        assert [r.nbytes for r in records] == [8 * sum(kept) + FLAG * (len(SHAPES) + 1)] * 2

    run_local(3, main)


@pytest.mark.parametrize(
    ("ratio", "count", "kept"),
    [(0.07, 100, 7), (0.55, 100, 55), (0.07, 101, 8), (1.0, 3, 3), (1e-9, 3, 1), (0.5, 0, 0)],
)
def test_a_ratio_is_what_it_reads_as(ratio, count, kept):
    """0.07 as a float is above 0.07: of 100 elements 8 were sent, where docs say 7."""
    assert num_kept(count, ratio) == kept


def test_topk_sends_the_largest_of_gradient_and_error():
    def main(comm):
        hook = TopK(0.25)
        model = DataParallel(Planted(w=(4,)), comm, wire=hook)
        found = []
        for _ in range(3):
            model.zero_grad()
            model({"w": torch.tensor([[5.0, 3, 1, 0], [0, -1, 2, 5]][comm.rank])}).backward()
            found.append(model.module.w.grad.tolist())
        return found, hook.error("w").tolist()

    (found, zero), (other, one) = run_local(2, main)
    # Rank 0 sends 5 then 3 + 3; rank 1 sends 5, 5, then 2 + 2 + 2.
    assert found == other == [[2.5, 0, 0, 2.5], [0, 3, 0, 2.5], [5, 0, 3, 0]]
    assert zero == [0, 3, 3, 0] and one == [0, -3, 0, 5]


@pytest.mark.parametrize("make", [lambda: PowerSGD(1, start_step=0), lambda: TopK(0.2)])
def test_a_gradient_that_is_not_finite_shows_and_is_forgotten(make):
    def main(comm):
        hook = make()
        model = DataParallel(Planted(w=(6, 8)), comm, wire=hook)

        def step(number, spoil):
            model.zero_grad()
            gradient = planted(comm.rank, number, {"w": (6, 8)})["w"]
            gradient[2, 3] = float("nan") if spoil and comm.rank == 1 else gradient[2, 3]
            model({"w": gradient}).backward()
            return model.module.w.grad

        step(0, False)
        before = copy.deepcopy(hook)
        assert not step(1, True).isfinite().all()
        assert not model.last_step.finite or comm.rank == 0
        assert torch.equal(hook.error("w"), before.error("w"))
        assert step(2, False).isfinite().all()

    run_local(2, main)


@pytest.mark.parametrize("make", [lambda: PowerSGD(1, start_step=0), lambda: TopK(0.1)])
def test_errors_beyond_the_gradients_dtype_are_sent_by_and_by(make):
    """In float16 the largest is 65504, and what waits for its turn has grown beyond that."""
    steps, size = 12, 2

    def main(comm):
        hook = make()
        model = DataParallel(Planted(w=(9, 9)).half(), comm, wire=hook)
        block = torch.full((3, 3), 26000.0 + 2048 * comm.rank)
        gradient = torch.block_diag(block, block + 512, block - 512)
        total = torch.zeros(9, 9)
        largest = []
        for _ in range(steps):
            model.zero_grad()
            model({"w": gradient}).backward()
            largest.append(model.module.w.grad.abs().max().item())
            total += model.module.w.grad
        left = hook.error("w").reshape(9, 9).clone()
        comm.allreduce(left, op="mean")
        return total + left, largest

    block = torch.full((3, 3), steps * 27024.0)
    given = torch.block_diag(block, block + steps * 512, block - steps * 512)
    for found, largest in run_local(size, main):
        assert max(largest) == 65504
        torch.testing.assert_close(found, given, rtol=1e-4, atol=0.1)


@pytest.mark.filterwarnings("ignore:Complex modules are a new feature")
@pytest.mark.parametrize("wire", ["powersgd:2", "topk:0.3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.complex64])
def test_other_dtypes(wire, dtype):
    def main(comm):
        module = nn.Linear(8, 6, bias=False).to(dtype)
        model = DataParallel(module, comm, wire=wire)
        found = []
        for step in range(12):
            model.zero_grad()
            gradient = planted(comm.rank, step, {"w": (6, 8)})["w"].to(dtype)
            (module.weight * gradient).sum().abs().backward()
            found.append(module.weight.grad.clone())
            assert module.weight.grad.dtype == dtype
        return found

    one, two = run_local(2, main)
    assert all(map(torch.equal, one, two))
    assert all(torch.view_as_real(g).isfinite().all() if g.is_complex() else g.isfinite().all()
               for g in one)  # fmt: skip


@pytest.mark.parametrize("wire", [own_mean, "powersgd:1", "topk:0.5"])
def test_everything_frozen_then_unfrozen(wire):
    def main(comm):
        module = Planted(w=(3, 4))
        module.w.requires_grad_(False)
        model = DataParallel(module, comm, wire=wire)
        model.reduce_gradients()
        module.w.requires_grad_(True)
        model({"w": torch.ones(3, 4)}).backward()
        return module.w.grad.sum().item()

    assert run_local(2, main) == [6.0 if wire == "topk:0.5" else 12.0] * 2


def test_a_hook_that_returns_no_work():
    def blocking(bucket, comm):
        return comm.allreduce(bucket.flat, op="mean")

    def main(comm):
        model = DataParallel(Planted(w=(2,)), comm, wire=blocking)
        with pytest.raises(TypeError, match=r"blocking: expected .* Work or Rounds, got Tensor"):
            model({"w": torch.ones(2)}).backward()

    run_local(2, main)


def scaled_mean(factor, bucket, comm, more=None):
    return comm.allreduce(bucket.flat, op="mean", blocking=False)


class CallableHook:
    def __init__(self, state=None):
        self.state = state

    def __call__(self, bucket, comm):
        return comm.allreduce(bucket.flat, op="mean", blocking=False)


@dataclasses.dataclass
class SetHook(CallableHook):
    ratio: float = 0.5
    state: object = None


@pytest.mark.parametrize(
    ("make", "shown"),
    [
        (lambda rank: CallableHook(), "CallableHook"),
        (lambda rank: CallableHook().__call__, "CallableHook.__call__"),
        (lambda rank: functools.partial(scaled_mean, 2), "scaled_mean with (0=2)"),
        (lambda rank: functools.partial(CallableHook(), more=CallableHook()), "CallableHook with"),
        (lambda rank: SetHook(0.1, object()), "SetHook(ratio=0.1)"),
        (lambda rank: SetHook(0.1 + rank), None),
        (lambda rank: functools.partial(scaled_mean, rank), None),
        (lambda rank: scaled_mean if rank else CallableHook(), None),
    ],
)
def test_hooks_are_compared_by_what_they_are_not_by_address(make, shown):
    def main(comm):
        hook = make(comm.rank)
        if shown is None:
            with pytest.raises(ValueError, match=r"settings .* entry 1: wire"):
                DataParallel(nn.Linear(1, 1), comm, wire=hook)
        else:
            assert str(wire_format(hook)).startswith(shown)
            DataParallel(nn.Linear(1, 1), comm, wire=hook)

    run_local(2, main)
