"""Every device kernel on a real GPU: the bodies of the simulator, and sizes too large for it."""

import numpy as np
import pytest
from device_contract import *  # noqa: F403
from device_contract import agrees, noise, same

from ringfold.kernels import reference
from ringfold.kernels.storage import STORAGE
from ringfold.kernels.table import PAIRS, PointerTable

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["small", "default"])
def launcher(request):
    """A small grid and the default one, of equal blocks, so that each kernel compiles once."""
    from ringfold.kernels.device.launch import Launcher

    return Launcher(blocks=3) if request.param == "small" else Launcher()


@pytest.mark.parametrize("bucket_dtype", PAIRS["float32"])
@pytest.mark.parametrize("count", [(1 << 20) - 1, (1 << 22) + 12345])
def test_a_bucket_larger_than_the_grid(kernels, launcher, bucket_dtype, count):
    values = noise(count, "float32", 4)
    source = kernels.table.place(values, launcher)
    into = kernels.table.place(np.zeros(count, STORAGE[bucket_dtype]), launcher)
    table = PointerTable(np.array([source.span.address]), np.array([count]), np.array([0]), 4)
    tiles = kernels.table.Tiles.of(table, "float32", bucket_dtype, launcher)
    learned = kernels.table.ByProducts.of(launcher)
    kernels.pack.pack(tiles, into.span, launcher, scale=0.3, learned=learned)
    wanted = np.zeros(count, STORAGE[bucket_dtype])
    told = reference.pack(PointerTable.of([values]), "float32", wanted, bucket_dtype, 0.3)
    assert same(into.read(), wanted, bucket_dtype)
    agrees(learned.read(launcher), told, count)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_threshold_of_a_large_bucket(kernels, launcher, dtype):
    values = noise(1_000_003, dtype, 5)
    source = kernels.table.place(values, launcher)
    selection = kernels.threshold.Selection.of(launcher)
    for wanted in (1, 10_000, values.size):
        kernels.threshold.threshold(source.span, dtype, wanted, selection, launcher)
        expected = reference.threshold(values, dtype, wanted)
        assert tuple(selection.read(launcher)) == expected


def test_a_place_beyond_four_giga_elements(kernels, launcher):
    from numba import cuda

    place = (1 << 32) + 5
    with cuda.gpus[launcher.device]:
        free, _ = cuda.current_context().get_memory_info()
        if free < 2 * place + (1 << 30):
            pytest.skip(f"needs 9 GiB of device memory, {free >> 30} GiB are free")
        room = cuda.device_array(place + 8, np.uint16)
    source = kernels.table.place(np.array([1.0, -2.0, 3.0], np.float32), launcher)
    table = PointerTable(np.array([source.span.address]), np.array([3]), np.array([place]), 4)
    tiles = kernels.table.Tiles.of(table, "float32", "bfloat16", launcher)
    span = kernels.table.Span(int(room.device_ctypes_pointer.value), place + 8)
    kernels.pack.pack(tiles, span, launcher)
    assert room[place : place + 3].copy_to_host().tolist() == [0x3F80, 0xC000, 0x4040]


def test_dropout_drops_what_it_drops_on_the_host():
    torch = pytest.importorskip("torch")
    if not torch.cuda.is_available():
        pytest.skip("torch is built without CUDA")
    from ringfold.parallel import Dropout, show_samples
    from ringfold.parallel.random_keys import Samples

    layer, found = Dropout(0.3, seed=4), []
    for device in ("cpu", "cuda"):
        show_samples(layer, Samples(7, 100, 33))
        found.append(layer(torch.ones(33, 1001, device=device)).cpu())
    assert torch.equal(*found)
