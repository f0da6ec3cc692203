"""Packing of gradients by the device's kernels, in Numba's simulator: addresses are the host's."""

import pytest
import torch
from numba import config

from ringfold.kernels.device import usable
from ringfold.kernels.device.launch import Launcher
from ringfold.parallel import device_transfer, transfer
from ringfold.parallel.device_transfer import DevicePacker

pytestmark = pytest.mark.skipif(
    not config.ENABLE_CUDASIM,
    reason="NUMBA_ENABLE_CUDASIM=1 must be set before numba is imported: make test-simulator",
)


def packer() -> DevicePacker:
    return DevicePacker(lambda: 1, 0, blocks=2, threads=4)


def members(dtype: torch.dtype) -> list[tuple[torch.Tensor, int]]:
    torch.manual_seed(4)
    counts, at, found = [5, 0, 37, 1, 64], 0, []
    for count in counts:
        found.append((torch.randn(count, dtype=torch.float64).to(dtype), at))
        at += count
    return found


@pytest.mark.parametrize(
    ("dtype", "wire"),
    [
        (torch.float32, torch.float32),
        (torch.float32, torch.bfloat16),
        (torch.float64, torch.float16),
    ],
)
def test_as_the_hosts_kernels_do(dtype: torch.dtype, wire: torch.dtype) -> None:
    one = packer()
    found = members(dtype)
    for scale in (1.0, 0.3):  # the second time with the table of the first
        flat, wanted = torch.zeros(110, dtype=wire), torch.zeros(110, dtype=wire)
        pack, unpack = transfer.transfer_of(wanted)
        assert one.pack(found, flat, scale)() is True
        pack(found, wanted, scale)
        assert torch.equal(flat, wanted)
        back = [(torch.zeros_like(tensor), at) for tensor, at in found]
        expected = [(torch.zeros_like(tensor), at) for tensor, at in found]
        one.unpack(back, flat)
        unpack(expected, wanted)
        assert all(torch.equal(a, b) for (a, _), (b, _) in zip(back, expected, strict=True))


def test_what_is_not_finite_is_told_by_bucket() -> None:
    one, flats = packer(), [torch.zeros(110), torch.zeros(110)]
    bad = members(torch.float32)
    bad[2][0][3] = float("inf")
    answers = [one.pack(bad, flats[0], 1.0), one.pack(members(torch.float32), flats[1], 1.0)]
    assert [answer() for answer in answers] == [False, True]


def test_a_bucket_of_nothing_is_finite() -> None:
    empty = [(torch.zeros(0), 0)]
    assert packer().pack(empty, torch.zeros(0), 1.0)() is True


def test_tables_do_not_grow_without_end() -> None:
    one, flat = packer(), torch.zeros(8)
    kept = [torch.ones(1) for _ in range(300)]
    for tensor in kept:
        one.unpack([(tensor, 3)], flat)
    assert len(one._tables) <= 256


def test_kernels_that_cannot_be_launched_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What imports may still fail to compile: then torch's operations pack, and masks are moved."""

    def prepared(*_: object, **__: object) -> None:
        raise AttributeError("numpy has no row_stack\nwhich it had")

    try:
        with monkeypatch.context() as patch:
            patch.setattr(Launcher, "prepared", prepared)
            usable._tried.cache_clear()
            device_transfer._packer.cache_clear()
            assert usable.why_not(0) == "AttributeError: numpy has no row_stack"
            assert device_transfer._packer(0) is None
            assert device_transfer.launcher_of(torch.device("cuda", 0)) is None
        assert usable.why_not(0) == "AttributeError: numpy has no row_stack"  # it is tried once
    finally:
        usable._tried.cache_clear()
        device_transfer._packer.cache_clear()
    assert usable.why_not(0) == ""
