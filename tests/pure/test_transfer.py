"""Packing by torch, which device memory takes, gives what the host's kernel gives."""

import pytest
import torch

from ringfold.parallel.device_transfer import pack_by_torch, unpack_by_torch
from ringfold.parallel.transfer import are_few, pack_few, transfer_of

FLOATS, HALVES = (torch.float64, torch.float32), (torch.bfloat16, torch.float16)
PAIRS = [
    *((torch.float64, flat) for flat in (*FLOATS, *HALVES)),
    *((torch.float32, flat) for flat in (torch.float32, *HALVES)),
    *((half, flat) for half in HALVES for flat in (half, torch.float32)),
]
SHAPES = ((3,), (), (0, 4), (5, 7), (1,))


def members(dtype: torch.dtype) -> list[tuple[torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(5)
    tensors = [torch.randn(shape, generator=generator).to(dtype) * 3 for shape in SHAPES]
    offsets = [2]
    for tensor in tensors:
        offsets.append(offsets[-1] + tensor.numel() + 1)
    return list(zip(tensors, offsets, strict=False))


@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize(("dtype", "flat_dtype"), PAIRS)
def test_both_give_the_same_bits(dtype: torch.dtype, flat_dtype: torch.dtype, scale: float) -> None:
    pack, unpack = transfer_of(torch.empty(0))
    by_kernel, by_torch = torch.full((70,), -9.0, dtype=flat_dtype), torch.empty(0)
    by_torch = by_kernel.clone()
    pack(members(dtype), by_kernel, scale)
    assert pack_by_torch(members(dtype), by_torch, scale) is None
    assert torch.equal(by_kernel, by_torch) and (by_kernel == -9.0).sum() >= len(SHAPES)
    first, second = members(dtype), members(dtype)
    for tensor, _ in (*first, *second):
        tensor.zero_()
    unpack(first, by_kernel)
    unpack_by_torch(second, by_torch)
    for (one, _), (other, _) in zip(first, second, strict=True):
        assert torch.equal(one, other) and (one != 0).all()


@pytest.mark.parametrize("odd", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("scale", [1.0, 1 / 3])
@pytest.mark.parametrize("dtype", FLOATS)
def test_few_elements_take_no_kernel_and_give_its_bits(
    dtype: torch.dtype, scale: float, odd: float
) -> None:
    by_kernel, by_torch = (torch.full((70,), -9.0, dtype=dtype) for _ in range(2))
    tensors = members(dtype)
    tensors[0][0][1] = odd
    places = [by_torch[offset : offset + tensor.numel()] for tensor, offset in tensors]
    assert are_few(tensors, by_torch)
    # What lies beside them is no reason, whatever the sum of all is.
    by_torch[-1] = float("inf")
    assert pack_few(tensors, places, by_torch, scale) == (odd == 0.0)
    by_torch[-1] = -9.0
    pack, _ = transfer_of(by_kernel)
    assert pack(tensors, by_kernel, scale) == (odd == 0.0)
    assert by_kernel.numpy().tobytes() == by_torch.numpy().tobytes()


def test_what_the_kernel_does_otherwise_is_not_few() -> None:
    flat = torch.empty(1 << 18)
    half = torch.ones(1 << 16)
    assert are_few([(half, 0), (half, 1 << 16)], flat)
    assert not are_few([(half, 0), (half, 1 << 16), (torch.ones(1), 1 << 17)], flat)
    assert not are_few([(torch.ones(1), place) for place in range(17)], flat)
    assert not are_few([(torch.ones(3, dtype=torch.float64), 0)], flat)
    assert not are_few([(torch.ones(3, dtype=torch.bfloat16), 0)], flat.bfloat16())
    assert not are_few([(torch.ones(3), 0)], flat.to("meta"))


def test_a_device_that_nothing_moves_is_refused() -> None:
    with pytest.raises(TypeError, match="gradients on device meta: expected one of: cpu, cuda"):
        transfer_of(torch.empty(3, device="meta"))
