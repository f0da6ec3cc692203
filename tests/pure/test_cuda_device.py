"""What can be told of the CUDA device without one: the map of ranks, and what is missing."""

import gc
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_cupy
import numpy as np
import pytest
from fake_device import FakeArray, FakeGpu

from ringfold import CommError, run_local
from ringfold.comm.device import LEGACY_STREAM, DeviceArray, describe
from ringfold.comm.device_wait import following, reached, wait_here
from ringfold.comm.dtypes import DTYPES
from ringfold.comm.transport.device import CudaDevice, load_cupy, ordinal_of


def test_ranks_go_round_the_gpus() -> None:
    assert [ordinal_of(rank, 1) for rank in range(4)] == [0, 0, 0, 0]
    assert [ordinal_of(rank, 3) for rank in range(5)] == [0, 1, 2, 0, 1]
    with pytest.raises(ValueError, match="1 GPU or more"):
        ordinal_of(0, 0)


class Driverless(Exception):
    pass


def no_driver() -> int:
    raise Driverless("cudaErrorInsufficientDriver")


def cupy_that(count: Any) -> Any:
    return SimpleNamespace(cuda=SimpleNamespace(runtime=SimpleNamespace(getDeviceCount=count)))


@pytest.mark.parametrize(
    ("module", "words"),
    [
        (None, "CuPy cannot be imported"),
        (cupy_that(no_driver), "cudaErrorInsufficientDriver"),
        (cupy_that(lambda: 0), "the driver shows none"),
    ],
)
def test_a_missing_gpu_is_told(module: Any, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cupy", module)
    with pytest.raises(CommError, match=f"no GPU can be used: .*{words}"):
        load_cupy()
    with pytest.raises(CommError, match="no GPU can be used"):
        run_local(1, lambda comm: comm.empty(3, device="cuda"))
    with pytest.raises(CommError, match="no GPU can be used"):
        run_local(1, lambda comm: comm.allreduce(FakeArray(FakeGpu(), np.zeros(3))))


def test_a_device_is_cpu_or_cuda() -> None:
    with pytest.raises(ValueError, match="expected 'cpu' or 'cuda'"):
        run_local(1, lambda comm: comm.empty(3, device="tpu"))
    assert run_local(1, lambda comm: comm.empty(3, device="cpu"))[0].shape == (3,)


def current(stream: int) -> Any:
    return SimpleNamespace(current_stream=lambda ordinal: SimpleNamespace(cuda_stream=stream))


def test_the_callers_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    """The one that the array names comes first; torch's arrays name none, so torch is asked."""
    null = SimpleNamespace(ptr=0)
    cuda = SimpleNamespace(
        runtime=None, Device=lambda ordinal: None, get_current_stream=lambda: null
    )
    device = CudaDevice(SimpleNamespace(cuda=cuda), 0)
    assert device.caller(describe(FakeArray(FakeGpu(), np.zeros(2), stream=5), writable=True)) == 5

    class Tensor(FakeArray):
        __module__ = "torch"

    tensor = describe(Tensor(FakeGpu(), np.zeros(2), stream=None), writable=True)
    for stream, told in ((0, LEGACY_STREAM), (77, 77)):
        monkeypatch.setitem(sys.modules, "torch", SimpleNamespace(cuda=current(stream)))
        assert device.caller(tensor) == told
    unknown = describe(FakeArray(FakeGpu(), np.zeros(2), stream=None), writable=True)
    assert device.caller(unknown) == LEGACY_STREAM


def test_a_stream_that_a_program_has_left_is_followed(tmp_path: Path) -> None:
    """CuPy destroys a stream with the last reference to it, which may be before the wait.

    `with cupy.cuda.Stream(): work = comm.allreduce(x, blocking=False)` named a dead one from there.
    """
    runtime = fake_cupy.Runtime(tmp_path)
    cupy = fake_cupy.module(runtime)
    device = CudaDevice(cupy, 0)
    with cupy.cuda.Stream():
        array = describe(cupy.zeros(3), writable=True)
        follow = following(device, array, device.caller(array), device.record(1))
    gc.collect()
    assert len(runtime.streams) == 1
    follow(array.owner)
    follow(None)  # as where nobody waits
    del follow
    assert not runtime.streams
    with pytest.raises(fake_cupy.CUDARuntimeError, match="invalid resource handle"):
        device.record(100)


def test_a_stream_that_an_array_has_is_kept(tmp_path: Path) -> None:
    """Numba's name the stream that they were made on, and a result of theirs is CuPy's."""
    runtime = fake_cupy.Runtime(tmp_path)
    cupy = fake_cupy.module(runtime)
    device = CudaDevice(cupy, 0)
    stream = cupy.cuda.Stream()
    owner: Any = SimpleNamespace(stream=stream)
    caller = device.caller(DeviceArray(owner, 0, (), DTYPES["float32"], stream.ptr))
    del stream, owner
    device.record(caller)
    del caller
    assert not runtime.streams


def test_a_stream_goes_with_its_handle(tmp_path: Path) -> None:
    """Those of each communicator were kept for as long as the process lived."""
    runtime = fake_cupy.Runtime(tmp_path)
    device = CudaDevice(fake_cupy.module(runtime), 0)
    ran = threading.Event()
    stream = device.make_stream()
    runtime.put(stream, ran.set)
    event = device.record(stream)
    del stream
    assert not runtime.streams
    wait_here(event)  # what was on it has run
    assert ran.is_set()


@pytest.mark.timeout(20)
def test_what_fails_on_the_device_is_told_and_not_waited_for(tmp_path: Path) -> None:
    """An event behind it never ends, and by CuPy's `done` it is as one that has not ended yet."""
    runtime = fake_cupy.Runtime(tmp_path)
    device = CudaDevice(fake_cupy.module(runtime), 0)
    stream, others = device.make_stream(), device.make_stream()
    go = threading.Event()
    runtime.put(stream, go.wait)
    event = device.record(stream)
    assert not event.ended()
    go.set()
    wait_here(event)
    runtime.put(others, lambda: runtime.find(1, 8))
    event = device.record(others)
    words = "cuda:0: a kernel or copy .* has failed: cudaErrorIllegalAddress: an illegal memory"
    with pytest.raises(CommError, match=words):
        wait_here(event)
    with pytest.raises(CommError, match=words):
        for _ in reached(event, 0):
            pass
