"""Every device kernel in Numba's CUDA simulator, with grids smaller than the work."""

import numpy as np
import pytest
from device_contract import *  # noqa: F403
from numba import config

pytestmark = [
    pytest.mark.skipif(
        not config.ENABLE_CUDASIM,
        reason="NUMBA_ENABLE_CUDASIM=1 must be set before numba is imported: make test-simulator",
    ),
    pytest.mark.filterwarnings("ignore::RuntimeWarning"),  # scalars that overflow, as on a GPU
]


@pytest.fixture
def launcher():
    from ringfold.kernels.device.launch import Launcher

    return Launcher(blocks=2, threads=4)


def test_a_place_beyond_four_giga_elements(kernels, launcher):
    check_a_place_beyond_four_giga_elements(kernels, launcher)  # noqa: F405


def test_elements_before_both_sides_are_aligned():
    from ringfold.kernels.device import move

    head = move.head_of(4, 2, 8)
    assert head(64, 64) == 0
    assert head(68, 66) == 7
    assert head(68, 64) == -1


def test_lanes_that_a_gpu_would_refuse_are_refused_here():
    """Otherwise a wrong alignment of the vectors would pass in the simulator."""
    from ringfold.kernels.device import simulated

    with pytest.raises(ValueError, match="not aligned to 16"):
        simulated.load_lanes(72, np.float32)
    with pytest.raises(ValueError, match="not aligned to 16"):
        simulated.store_lanes(72, (np.float32(1),) * 4)
    with pytest.raises(TypeError, match="16 bytes of one type"):
        simulated.store_lanes(64, (np.float64(1),) * 4)
