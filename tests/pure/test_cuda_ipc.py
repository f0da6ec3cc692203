"""What ipc asks of the kernels, in Numba's simulator, where addresses are the host's."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import gc, weakref
from types import SimpleNamespace
import numpy as np
from ringfold.comm.dtypes import DTYPES
from ringfold.comm.transport.cuda_ipc import CudaPeering
from ringfold.comm.transport.cuda_memory import CudaMemory

cupy = SimpleNamespace(cuda=SimpleNamespace(runtime=None, Device=lambda ordinal: None))
peering = CudaPeering(cupy, 0, CudaMemory(cupy, 0), None, None)
for count in (1, 3, 37):
    for op in ("sum", "mean", "min", "max", "prod"):
        for dtype, storage in (("float32", "f4"), ("float16", "f2"), ("float64", "f8")):
            assert DTYPES[dtype].on_devices
            rows = [((np.arange(count) % 7 + 1) * (r + 1)).astype(storage) for r in range(3)]
            wanted = {
                "sum": np.sum, "mean": np.mean, "min": np.min, "max": np.max, "prod": np.prod
            }[op](np.stack(rows).astype("f8"), axis=0).astype(storage)
            for turn in range(2):
                copies = [row.copy() for row in rows]
                places = [c.ctypes.data for c in copies]
                alone = np.zeros_like(rows[0])
                peering.fold(op, dtype, places, [alone.ctypes.data], count, 1)()
                np.testing.assert_array_equal(alone, wanted)
                peering.fold(op, dtype, places, places, count, 1)()
                for copy in copies:
                    np.testing.assert_array_equal(copy, wanted)
assert DTYPES["int8"].on_devices and DTYPES["bfloat16"].on_devices
assert not DTYPES["bool"].on_devices and not DTYPES["complex64"].on_devices
assert len(peering._tables) <= 256
places = [np.arange(5, dtype="f4") for _ in range(2)]
at = [place.ctypes.data for place in places]
peering._tables.clear()  # some may be of the same addresses
launch = peering.fold("sum", "float32", at, at[:1], 5, 1)
tables = [weakref.ref(read.table.owner) for read, _ in peering._tables.values()]
assert tables
peering._tables.clear()
gc.collect()
assert all(table() is not None for table in tables)  # a launch that is kept refers to them
launch()
assert (places[0] == 2 * np.arange(5)).all()
del launch
gc.collect()
assert all(table() is None for table in tables)
print("right")
"""


def test_folds_in_the_simulator() -> None:
    pytest.importorskip("numba.cuda")
    environment = os.environ | {"NUMBA_ENABLE_CUDASIM": "1"}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0 and done.stdout == "right\n", done.stdout + done.stderr
