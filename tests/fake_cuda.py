"""Torch tensors that say they lie on a GPU, over host memory, for engines without one.

They compute as CPU tensors do, and differ in what goes wrong on a GPU: an operation that mixes them
with tensors of the host is refused, and so is a view as NumPy memory. `cuda:0` in a factory, `to`
and comm.empty gives such tensors within `pretend`. Communicators take them by address, on a device
that runs at once what is put on a stream. In Numba's simulator, kernels of GPUs run on them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from fake_device import UNAWARE, FakeEvent, FakeGpu, FakeNode, at
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten

from ringfold import Communicator
from ringfold.comm.device import DeviceArray
from ringfold.comm.device_operations import DeviceOperations
from ringfold.comm.device_ways import DeviceWays
from ringfold.kernels.device.launch import Launcher
from ringfold.kernels.device.primitives import simulating
from ringfold.parallel.device_transfer import DevicePacker

CUDA = torch.device("cuda", 0)
_GRAD: Any = Tensor.grad


class CudaTensor(Tensor):
    """A tensor of the pretended GPU."""

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    @property
    def grad(self) -> Tensor | None:  # type: ignore[override]
        """What autograd has made of this, which knows of no subclass, is the GPU's as well."""
        with torch._C.DisableTorchFunctionSubclass():
            found = _GRAD.__get__(self)
            if found is not None and not isinstance(found, CudaTensor):
                found = found.as_subclass(CudaTensor)
                _GRAD.__set__(self, found)
        return found

    @grad.setter
    def grad(self, value: Tensor | None) -> None:
        with torch._C.DisableTorchFunctionSubclass():
            _GRAD.__set__(self, value)

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.requires_grad:
            raise RuntimeError("can't get __cuda_array_interface__ on a tensor that requires grad")
        bits = _plain(self).view(torch.uint16) if self.dtype == torch.bfloat16 else _plain(self)
        return {
            "version": 3,
            "shape": tuple(self.shape),
            "typestr": bits.numpy().dtype.str,
            "data": (self.data_ptr() if self.numel() else 0, False),
            "strides": None if self.is_contiguous() else bits.numpy().strides,
        }

    def numpy(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy")

    __array__ = __dlpack__ = numpy

    def backward(self, gradient: Tensor | None = None, *args: Any, **kwargs: Any) -> None:  # type: ignore[override]
        """Not by way of __torch_function__, which would end the pretending for what hooks do."""
        torch.autograd.backward(self, gradient, *args, **kwargs)

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """Hooks run where the pretending is off."""
        with torch._C.DisableTorchFunctionSubclass():
            return super().register_post_accumulate_grad_hook(lambda x: _pretending(hook)(x))  # type: ignore[no-untyped-call]

    def cpu(self, *args: Any, **kwargs: Any) -> Tensor:
        return _plain(self).clone()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        _refuse_mixed(func, args, kwargs)
        found = super().__torch_function__(func, types, args, kwargs)
        # What copies into memory of the host's returns that.
        return args[0] if getattr(func, "__name__", "") == "copy_" else found


def _pretending(function: Any) -> Any:
    """Return a function that pretends, whatever is off where it is called."""

    def call(*args: Any) -> Any:
        if torch._C._is_torch_function_mode_enabled():
            return function(*args)
        with torch._C._EnableTorchFunction(), _Factories():
            return function(*args)

    return call


class _Engine:
    """Autograd's engine, but what is queued at its end pretends."""

    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def queue_callback(self, function: Any) -> None:
        self._engine.queue_callback(_pretending(function))

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)


def _plain(tensor: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.detach().as_subclass(Tensor)


def on_cuda(tensor: Tensor) -> CudaTensor:
    """Say that a tensor's memory is the GPU's."""
    with torch._C.DisableTorchFunctionSubclass():
        return tensor.as_subclass(CudaTensor)


_ACROSS = ("copy_", "__set__", "to", "cpu", "is_same_size", "__get__", "backward")


def _refuse_mixed(func: Any, args: Any, kwargs: Any) -> None:
    """As torch does: only tensors of no dimension may be the host's, and sources of copies.

    Gradients within a backward are those of autograd, which knows of no subclass.
    """
    if getattr(func, "__name__", "") in _ACROSS:
        return
    tensors = [leaf for leaf in tree_flatten((args, kwargs))[0] if isinstance(leaf, Tensor)]
    here = [t for t in tensors if not isinstance(t, CudaTensor) and t.dim()]
    if here and len(here) < len(tensors):
        raise RuntimeError(
            f"{func.__name__}: expected all tensors on one device, found cuda:0 and cpu"
        )


class _Factories(TorchFunctionMode):
    """Let device="cuda:0" mean the pretended GPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        name = getattr(func, "__name__", "")
        if name == "to" and len(args) > 1:
            return _to(func, args, kwargs)
        device = kwargs.get("device")
        if device is not None and torch.device(device).type == "cuda":
            kwargs["device"] = "cpu"
            made = func(*args, **kwargs)
            return on_cuda(made) if isinstance(made, Tensor) else made
        return func(*args, **kwargs)


def _to(func: Any, args: Any, kwargs: Any) -> Any:
    x, where, *rest = args
    kwargs.pop("non_blocking", None)
    if isinstance(where, Tensor):
        where, rest = where.device, [where.dtype]
    if isinstance(where, str | torch.device):
        cuda = torch.device(where).type == "cuda"
        moved = x if cuda == isinstance(x, CudaTensor) else x.clone()
        if cuda:
            moved = on_cuda(moved)
        elif isinstance(moved, CudaTensor):
            with torch._C.DisableTorchFunctionSubclass():
                moved = moved.as_subclass(Tensor)
        dtypes = [one for one in rest if isinstance(one, torch.dtype)]
        return moved.to(dtypes[0]) if dtypes else moved
    return func(*args, **kwargs)


class EagerGpu(FakeGpu):
    """A device that runs at once what is put on its streams, over any memory of this process."""

    def memory(self, address: int, nbytes: int) -> np.ndarray:
        return at(address, nbytes)

    def like(self, array: DeviceArray, shape: tuple[int, ...]) -> Any:
        return on_cuda(torch.empty(shape, dtype=array.owner.dtype))

    def to_host(self, target: np.ndarray, address: int, stream: int) -> None:
        self._require_pinned(target)
        target[:] = self.memory(address, target.nbytes)

    def to_device(self, address: int, source: np.ndarray, stream: int) -> None:
        self._require_pinned(source)
        self.memory(address, source.nbytes)[:] = source

    def _put(self, stream: int, job: Any) -> None:
        if isinstance(job, FakeEvent):
            job.reached = True
        elif callable(job):
            job()


def to_cuda(module: nn.Module) -> nn.Module:
    """Move a module, in place."""
    for part in module.modules():
        for name, parameter in list(part._parameters.items()):
            if parameter is not None:
                moved = on_cuda(parameter.detach().clone())
                part._parameters[name] = nn.Parameter(moved, parameter.requires_grad)
        for name, buffer in list(part._buffers.items()):
            if buffer is not None:
                part._buffers[name] = on_cuda(buffer.clone())
    return module


@contextmanager
def pretend() -> Iterator[None]:
    """Let this thread make tensors of the GPU."""
    with _Factories():
        yield


def simulated_packer(monkeypatch: Any) -> DevicePacker:
    """Return what launches kernels in Numba's simulator, which runs one at a time."""
    prepared, lock = Launcher.prepared, threading.Lock()

    def alone(self: Launcher, kernel: Any, wanted: int, *arguments: Any, keeps: Any = None) -> Any:
        launch = prepared(self, kernel, wanted, *arguments, keeps=keeps)

        def locked() -> bool:
            with lock:
                return launch()

        return locked

    monkeypatch.setattr(Launcher, "prepared", alone)
    return DevicePacker(lambda: 1, 0, blocks=2, threads=4)


def find_anywhere(
    monkeypatch: Any, node_of: Callable[[Communicator], FakeNode | None] = lambda comm: None
) -> None:
    """Let every communicator of this process take the tensors, and give such as registered.

    node_of: return what the devices of a rank's node share; None where they share nothing.
    """
    from ringfold.comm.transport import device, gpu_aware
    from ringfold.parallel import data_parallel, device_transfer, pipeline

    def ways(comm: Communicator) -> DeviceWays:
        gpu = EagerGpu(node_of(comm))

        def find(array: DeviceArray) -> EagerGpu:
            return gpu

        return DeviceWays(comm, find, DeviceOperations(comm, find), lambda: UNAWARE)

    def empty(node_rank: int, shape: tuple[int, ...], dtype: Any) -> Tensor:
        return on_cuda(torch.empty(shape, dtype=dtype))

    move = nn.Module.to

    def moved(module: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        to_gpu = args and torch.device(args[0]).type == "cuda"
        return to_cuda(module) if to_gpu else move(module, *args, **kwargs)

    monkeypatch.setattr(nn.Module, "to", moved)
    engine = torch.autograd.Variable._execution_engine
    monkeypatch.setattr(torch.autograd.Variable, "_execution_engine", _Engine(engine))
    packer = simulated_packer(monkeypatch) if simulating() else None  # else torch's operations
    monkeypatch.setattr(device_transfer, "_packer", lambda ordinal: packer)
    for module in (data_parallel, pipeline):  # backward runs in the thread that calls it
        monkeypatch.setattr(module, "check_gpu_threads", lambda comm, tensors: None)
    monkeypatch.setattr(gpu_aware, "cuda_ways", ways)
    monkeypatch.setattr(device, "empty", empty)
