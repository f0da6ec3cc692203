"""Device memory of a real GPU, staged; ranks are threads that share one card, but for training."""

from typing import Any

import numpy as np
import pytest
from contract import FOLDS, check_uneven_rows, data, expected, lengths
from gpu_job import run_ranks

from ringfold import Communicator, Settings, run_local
from ringfold.comm.chunks import bounds

pytestmark = pytest.mark.gpu

SIZES = (1, 2, 3)


def run(size: int, main: Any) -> None:
    run_local(size, main, settings=Settings(timeout=60))


@pytest.mark.parametrize("size", SIZES)
def test_no_byte_is_read_before_the_kernel_has_written_it(size: int) -> None:
    """MPI read memory that the queued kernel had not written yet (PR-12)."""
    import cupy

    def main(comm: Communicator) -> None:
        with cupy.cuda.Stream(non_blocking=True):
            x = cupy.full(4_000_000, 1.0, cupy.float32)
            for _ in range(50):
                x *= 1 / size if size != 3 else 0.25
                comm.allreduce(x)
                if size == 3:
                    x *= 4 / 3
            assert bool((abs(x - 1) < (1e-4 if size == 3 else 1e-9)).all())

    run(size, main)


@pytest.mark.parametrize("size", SIZES)
def test_reductions(size: int) -> None:
    import cupy

    def main(comm: Communicator) -> None:
        for count in lengths(size):
            for op in FOLDS:
                x = cupy.asarray(data(comm.rank, count, np.float32))
                assert comm.allreduce(x, op) is x
                wanted = expected(op, size, count, np.float32)
                np.testing.assert_array_equal(x.get(), wanted)
            part = comm.reduce_scatter(cupy.asarray(data(comm.rank, count, np.float64)))
            low, high = bounds(count, size, comm.rank)
            wanted = expected("sum", size, count, np.float64)
            np.testing.assert_array_equal(part.get(), wanted[low:high])

    run(size, main)


@pytest.mark.parametrize("size", SIZES)
def test_movements_and_messages(size: int) -> None:
    import cupy

    def main(comm: Communicator) -> None:
        for count in lengths(size):
            rows = np.stack([data(rank, count, np.float32) for rank in range(size)])
            x = cupy.asarray(rows[comm.rank])
            np.testing.assert_array_equal(comm.allgather(x).get(), rows)
            comm.broadcast(x, size - 1)
            np.testing.assert_array_equal(x.get(), rows[-1])
            y = cupy.zeros(count, cupy.float32)
            work = comm.irecv(y, (comm.rank - 1) % size)
            comm.isend(cupy.asarray(rows[comm.rank]), (comm.rank + 1) % size).wait()
            work.wait()
            np.testing.assert_array_equal(y.get(), rows[comm.rank - 1])

    run(size, main)


@pytest.mark.parametrize("size", SIZES)
def test_uneven_rows(size: int) -> None:
    import cupy

    run(size, lambda comm: check_uneven_rows(comm, cupy.asarray))


def test_a_stream_may_be_left_before_the_wait() -> None:
    """CuPy destroys it then, unless an operation that is to follow it keeps it."""
    import cupy

    def main(comm: Communicator) -> None:
        other = 1 - comm.rank
        with cupy.cuda.Stream(non_blocking=True):
            x, y = cupy.full(1000, 1.0, cupy.float32), cupy.zeros(1000, cupy.float32)
            works = [
                comm.allreduce(x, blocking=False),
                comm.isend(cupy.full(1000, 3.0, cupy.float32), other),
                comm.irecv(y, other),
            ]
        for work in works:
            work.wait()
        assert bool((x == 2).all()) and bool((y == 3).all())

    run(2, main)


def test_more_than_many_windows() -> None:
    import cupy

    def main(comm: Communicator) -> None:
        x = cupy.arange(20_000_003, dtype=cupy.float32) % 1000 + comm.rank
        work = comm.allreduce(x, blocking=False)
        work.wait()
        assert work.receipt.transport == "staged, local"
        wanted = 2 * (cupy.arange(20_000_003, dtype=cupy.float32) % 1000) + 1
        assert bool((x == wanted).all())

    run(2, main)


def test_torch_tensors_on_their_stream() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")

    def main(comm: Communicator) -> None:
        with torch.cuda.stream(torch.cuda.Stream()):
            for dtype in (torch.float32, torch.bfloat16, torch.float16):
                x = torch.ones(1_000_001, dtype=dtype, device="cuda", requires_grad=True)
                y = x.detach() * (comm.rank + 1)
                comm.allreduce(y)
                assert bool((y == 3).all())
            gathered = comm.allgather(y)
            assert gathered.is_cuda and gathered.dtype == dtype and bool((gathered == 3).all())

    run(2, main)


def test_memory_from_empty() -> None:
    import cupy

    def main(comm: Communicator) -> None:
        x = comm.empty(1000, np.float32, device="cuda")
        assert isinstance(x, cupy.ndarray)
        x[...] = comm.rank + 1
        comm.allreduce(x)
        assert bool((x == 3).all())

    run(2, main)


def test_gradients_are_those_of_the_host() -> None:
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    run_ranks(2, "gradients", NVIDIA_TF32_OVERRIDE="0")
