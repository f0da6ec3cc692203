"""Whatever memory a user passes, seen as one flat buffer."""

import array
import mmap
import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from ringfold.comm.buffer import allocate, wrap
from ringfold.comm.dtypes import DTYPES, dtype_named

TORCH = [
    name for name, row in DTYPES.items() if hasattr(torch, name) and not name.startswith("uint")
] + ["uint8"]


@pytest.mark.parametrize("name", TORCH)
def test_a_tensor_is_seen_without_a_copy(name: str) -> None:
    x = torch.arange(6).to(getattr(torch, name)).reshape(2, 3)
    buffer = wrap(x, writable=True)
    assert buffer.dtype.name == name and buffer.shape == (2, 3) and buffer.family == "torch"
    assert buffer.flat.__array_interface__["data"][0] == x.data_ptr()
    buffer.flat[:] = 0
    assert not x.any()
    made = buffer.like((4, 2))
    assert isinstance(made, torch.Tensor) and made.dtype == x.dtype and made.shape == (4, 2)


def test_strided_tensors_are_staged_by_logical_element() -> None:
    x = torch.arange(6.0).reshape(2, 3).T
    buffer = wrap(x, writable=True)
    buffer.stage()
    assert buffer.staged and buffer.flat.tolist() == [0, 3, 1, 4, 2, 5]
    buffer.flat[:] = 10 * buffer.flat
    buffer.commit()
    assert x.tolist() == [[0, 30], [10, 40], [20, 50]]
    half = torch.arange(6).to(torch.bfloat16)[::2]
    wrap(half, writable=True)


def test_what_is_not_aligned_is_staged() -> None:
    """Kernels refuse it, on the one rank that has it and only once the others have begun."""
    x = np.zeros(9, np.uint8)[1:].view(np.float16)
    assert not x.flags.aligned
    x[...] = [1, 2, 3, 4]
    buffer = wrap(x, writable=True)
    buffer.stage()
    assert buffer.staged and buffer.flat.flags.aligned and buffer.flat.tolist() == [1, 2, 3, 4]
    buffer.flat[:] = 10 * buffer.flat
    buffer.commit()
    assert x.tolist() == [10, 20, 30, 40]


@pytest.mark.filterwarnings("ignore:the matrix subclass:PendingDeprecationWarning")
def test_arrays_of_derived_classes() -> None:
    class Own(torch.Tensor):
        pass

    class OwnArray(np.ndarray):
        pass

    matrix = np.matrix([[1.0, 2.0], [3.0, 4.0]])  # whose reshape(-1) has two dimensions
    assert wrap(matrix, writable=True).flat.shape == (4,)
    assert wrap(torch.ones(2).as_subclass(Own), writable=True).family == "torch"
    assert wrap(np.ones(2).view(OwnArray), writable=True).family == "numpy"
    with pytest.raises(TypeError, match="masked array"):
        wrap(np.ma.masked_array([1.0, 2.0], [True, False]), writable=False)


def test_the_view_keeps_the_memory_alive() -> None:
    buffer = wrap(torch.full((100_000,), 3.0), writable=False)
    flat = buffer.flat
    del buffer
    clutter = [torch.zeros(100_000) for _ in range(5)]
    assert (flat == 3).all() and len(clutter) == 5


def test_a_parameter_is_seen_through_its_gradient_tracking() -> None:
    parameter = torch.nn.Parameter(torch.ones(3))
    wrap(parameter, writable=True).flat[:] = 2
    assert parameter.tolist() == [2, 2, 2]


def test_empty_scalar_and_one_element_arrays() -> None:
    for x in (np.empty((2, 0)), torch.empty(0, 3), np.array(5.0), torch.tensor(5.0)):
        buffer = wrap(x, writable=True)
        assert buffer.flat.ndim == 1 and buffer.flat.size == np.prod(x.shape, dtype=int)


@pytest.mark.parametrize(
    "x", [array.array("d", [1, 2]), bytearray(8), memoryview(bytearray(4)), mmap.mmap(-1, 16)]
)
def test_the_buffer_protocol(x: object) -> None:
    wrap(x, writable=True).flat[:] = 1


@pytest.mark.parametrize(
    "x, error, text",
    [
        ([1.0, 2.0], TypeError, "expected an array .*got list"),
        (3.0, TypeError, r"got float; pass it as np.array\(\[x\]\)"),
        (3, TypeError, r"got int; pass it as np.array\(\[x\]\)"),
        (np.sum(np.ones(3)), ValueError, r"a NumPy scalar is read-only; pass it as np.array"),
        (np.array(["a"]), TypeError, "dtype str"),
        (np.array([None]), TypeError, "dtype object"),
        (np.zeros(3, ">f4"), TypeError, "byte order"),
        (b"abc", ValueError, "read-only"),
        (np.broadcast_to(np.zeros(3), (4, 3)), ValueError, "read-only"),
        (torch.zeros(3).expand(4, 3), ValueError, "several elements to one address"),
        (torch.zeros(9).as_strided((3, 3), (2, 1)), ValueError, "several elements to one address"),
        (torch.zeros(3).to(torch.float8_e5m2), TypeError, "dtype float8_e5m2 is not.* uint8"),
        (torch.zeros(3).to(torch.float8_e4m3fn), TypeError, "dtype float8_e4m3fn is not"),
        (torch.zeros(3).to_sparse(), TypeError, None),
        (torch.zeros(3, device="meta"), TypeError, None),
    ],
)
def test_what_cannot_be_a_target_is_refused(
    x: object, error: type[Exception], text: str | None
) -> None:
    with pytest.raises(error, match=text):
        wrap(x, writable=True)


class Exporter:
    """An array of another library, which speaks DLPack: of version 1, or of version 0 alone."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> Any:
        return self.array.__dlpack_device__()

    def __dlpack__(self, **asked: Any) -> Any:
        return self.array.__dlpack__(**asked)


class OldExporter(Exporter):
    def __dlpack__(self, stream: Any = None) -> Any:
        return self.array.__dlpack__()


def test_immutable_arrays_of_other_libraries_are_no_targets() -> None:
    """Arrays of JAX and Arrow changed under all who held them; a mapped file's ended the process.

    Before version 1 DLPack does not tell; torch's tensors may be written to all the same.
    """
    fixed = np.arange(3.0)
    fixed.flags.writeable = False
    assert wrap(Exporter(fixed), writable=False).flat.tolist() == [0, 1, 2]
    old = OldExporter(np.arange(3.0))
    assert wrap(old, writable=False).flat.tolist() == [0, 1, 2]
    for x in (Exporter(fixed), old):
        with pytest.raises(ValueError, match="read-only"):
            wrap(x, writable=True)
    fine = np.zeros(3)
    wrap(Exporter(fine), writable=True).flat[:] = 5
    assert fine.tolist() == [5, 5, 5]

    class OldTensor(torch.Tensor):
        def __dlpack__(self, stream: Any = None) -> Any:
            return self.as_subclass(torch.Tensor).__dlpack__()

    tensor = torch.zeros(3).as_subclass(OldTensor)
    wrap(tensor, writable=True).flat[:] = 5
    assert tensor.tolist() == [5, 5, 5]


def test_gpu_memory_is_refused_by_name() -> None:
    class OnDevice:
        __cuda_array_interface__ = {"shape": (1,), "data": (16, False)}  # noqa: RUF012

    with pytest.raises(TypeError, match=r"OnDevice lies in GPU memory"):
        wrap(OnDevice(), writable=False)


def test_any_strides_without_overlap_are_accepted() -> None:
    base = np.zeros((4, 6, 5))
    for view in (base.T, base[::2, ::-3], base[:, 1], base.transpose(1, 0, 2)[::-1], base[:, :0]):
        wrap(view, writable=True)


def test_allocate_by_family() -> None:
    made = allocate("torch", (2, 3), dtype_named("bfloat16"))
    assert isinstance(made, torch.Tensor) and made.dtype == torch.bfloat16
    assert allocate("numpy", (2,), dtype_named("int16")).dtype == np.int16
    assert allocate("array", (2,), dtype_named("float64")).dtype == np.float64


def test_bfloat16_of_numpy_is_allocated_as_the_extension_has_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What a scatter's root has passed so was an array of uint16 on the other ranks."""
    extension = np.dtype([("bits", np.uint16)])  # stands for the type that it adds
    monkeypatch.setitem(sys.modules, "ml_dtypes", SimpleNamespace(bfloat16=extension))
    assert allocate("numpy", (2,), dtype_named("bfloat16")).dtype == extension
    assert allocate("numpy", (2,), dtype_named("float16")).dtype == np.float16
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    assert allocate("numpy", (2,), dtype_named("bfloat16")).dtype == np.uint16


def test_ops_and_types_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="unknown op 'avg'; there is: sum, mean, min, max, prod"):
        dtype_named("float32").require("avg")
    with pytest.raises(TypeError, match=r"'mean' is not defined for int32; allowed: sum, min"):
        dtype_named("int32").require("mean")
    with pytest.raises(TypeError, match=r"'max' is not defined for complex64; allowed: sum, mean$"):
        dtype_named("complex64").require("max")
