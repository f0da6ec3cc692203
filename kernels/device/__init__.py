"""The kernels for device memory: Numba CUDA, on addresses and stream handles of any array library.

Every function checks on the host, launches on the stream of a `Launcher`, and returns without
waiting. All but `launch` and `table` import Numba, so import them where they are needed;
nothing imports CuPy. docs/gpu.md tells what was run on hardware, and what was not.
"""

__all__ = ["combine", "fold", "launch", "masks", "pack", "table", "threshold"]
