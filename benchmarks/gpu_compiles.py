"""Compile one of the kernels for GPUs, without one: can this Python's Numba, NumPy and NVVM do it?

Says for which GPU; ends with 1, and why in one line, where they cannot.
"""

import argparse
import sys
from types import SimpleNamespace

TARGET = (9, 0)


def compile_one() -> str:
    """Return the PTX."""
    from numba import cuda, types
    from numba.cuda import dispatcher

    from ringfold.kernels.device.masks import mask_kernel

    # Numba asks the driver which GPU it compiles inner functions for.
    dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=TARGET)
    kernel = mask_kernel()
    i, u = types.int64, types.uint64
    ptx, _ = cuda.compile(
        kernel.py_func,
        types.void(i, i, i, i, u, u, u, i),
        cc=TARGET,
        device=False,
        abi="numba",
        launch_bounds=kernel.targetoptions["launch_bounds"],
    )
    return str(ptx)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__).parse_args()
    try:
        print(compile_one().split(".target")[1].split()[0].rstrip(","))
    except Exception as error:
        said = str(error).strip().splitlines() or ["no reason given"]
        sys.exit(f"{type(error).__name__}: {said[0]}")
