"""Device kernels compiled to PTX for three generations of GPUs, none of which need be here.

In a process of its own: Numba asks the driver which GPU it compiles inner functions for, and NVRTC,
a large library that is needed for nothing else, for the names of architectures; both answers are
put in place there. PTX is not machine code: the toolkit's assembler, which is the driver's too,
tells what becomes of it.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

TARGETS = ((7, 5), (9, 0), (10, 0))
MISSING = [name for name in ("numba_cuda", "nvidia") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra gpu-test)"
    ),
    pytest.mark.timeout(300),
]


COMPILE = """
import json, sys
from types import SimpleNamespace
from numba import cuda, types
from numba.cuda import cuda_paths, dispatcher
from numba.cuda.cudadrv import nvrtc
from ringfold.kernels.device import combine, fold, masks, pack, threshold

i, f, u = types.int64, types.float32, types.uint64
peers = (i,) * 7 + (f, f, i)
tiles = (i, i, i, f, i)
move = pack.transfer_kernel
kernels = {
    "pack": (move("float32", "bfloat16", "pack", "multiply", 256, True), tiles),
    "pack half": (move("float32", "float16", "pack", "multiply", 256, False), tiles),
    "unpack": (move("float32", "float16", "unpack", "divide", 256, False), tiles),
    "add": (move("float32", "float32", "pack", "add", 256, False), tiles),
    "combine": (combine.combine_kernel("sum", "float32", "float32"), (i,) * 4),
    "combine halves": (combine.combine_kernel("max", "bfloat16", "bfloat16"), (i,) * 4),
    "fold floats": (fold.fold_kernel("sum", "float32"), peers),
    "fold": (fold.fold_kernel("mean", "bfloat16"), peers),
    "digit": (threshold.digit_kernel("float32", 20, 11, 256), (i,) * 3),
    "mask": (masks.mask_kernel(), (i, i, i, i, u, u, u, i)),
}
cuda_paths._get_nvrtc_path = lambda: None
nvrtc.get_arch_option = lambda major, minor, suffix="": f"compute_{major}{minor}{suffix}"
found = []
for target in map(tuple, json.loads(sys.argv[1])):
    dispatcher.get_current_device = lambda target=target: SimpleNamespace(compute_capability=target)
    found.append({
        name: cuda.compile(
            kernel.py_func, types.void(*kinds), cc=target, device=False, abi="numba",
            launch_bounds=kernel.targetoptions["launch_bounds"],
        )[0]
        for name, (kernel, kinds) in kernels.items()
    })
print(json.dumps(found))
"""


LATER_NUMPY = """
import numpy as np
if hasattr(np, "row_stack"):
    del np.row_stack
    np.__all__ = [name for name in np.__all__ if name != "row_stack"]
from types import SimpleNamespace
from numba import cuda, types
from numba.cuda import cuda_paths, decorators, dispatcher
from numba.cuda.cudadrv import nvrtc
from ringfold.kernels.device.masks import mask_kernel
decorators._have_nvjitlink = lambda: True  # which is why Numba would
cuda_paths._get_nvrtc_path = lambda: None
nvrtc.get_arch_option = lambda major, minor, suffix="": f"compute_{major}{minor}{suffix}"
dispatcher.get_current_device = lambda: SimpleNamespace(compute_capability=(9, 0))
i, u = types.int64, types.uint64
kernel = mask_kernel()
ptx, _ = cuda.compile(
    kernel.py_func, types.void(i, i, i, i, u, u, u, i), cc=(9, 0), device=False, abi="numba"
)
print(".entry" in ptx, hasattr(np, "row_stack"), kernel.targetoptions["lto"])
"""


def test_kernels_compile_beside_numpy_2_5():
    """Which has no row_stack any more, that numba-cuda 0.30 refers to; nor has it afterwards.

    Nor does Numba optimize at link time, so that the machine code is what is looked at here.
    """
    done = subprocess.run(
        [sys.executable, "-c", LATER_NUMPY], capture_output=True, text=True, timeout=100
    )
    assert (done.returncode, done.stdout) == (0, "True False False\n"), done.stderr


@pytest.fixture(scope="module")
def every_target():
    result = subprocess.run(
        [sys.executable, "-c", COMPILE, json.dumps(TARGETS)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert result.returncode == 0, result.stderr
    return dict(zip(TARGETS, json.loads(result.stdout), strict=True))


@pytest.fixture(scope="module", params=TARGETS, ids=lambda target: "sm_{}{}".format(*target))
def compiled(request, every_target):
    return request.param, every_target[request.param]


def instructions(ptx):
    """The lines that do something: no names of symbols, which contain anything."""
    return [line.strip() for line in ptx.splitlines() if line[:1] in "\t @" and "_ZN" not in line]


def count(ptx, pattern):
    return sum(bool(re.search(pattern, line)) for line in instructions(ptx))


OTHERS = {"mask"}
"""Its time goes into random words."""

RATIOS = {"pack": 2, "pack half": 2, "add": 2, "combine": 2, "combine halves": 2, "unpack": 0.5}
"""Accesses of 16 bytes: loads for each store."""

LOAD, STORE = r"^(@.* )?ld\.global\.v4\.[bfu]32", r"^(@.* )?st\.global\.v4\.[bfu]32"


def test_kernels_move_sixteen_bytes_at_a_time(compiled):
    _, kernels = compiled
    for name, ptx in kernels.items():
        loads, stores = count(ptx, LOAD), count(ptx, STORE)
        if name in OTHERS:
            continue
        assert loads and (stores or name == "digit"), name
        # A vector of 8 elements is one access of the half width and two of float32.
        ratio = RATIOS.get(name)
        if ratio:
            assert loads == ratio * stores, name


def test_a_thread_asks_for_64_bytes_before_it_stores(compiled):
    """Fewer would leave memory idle: see lanes.BYTES_IN_FLIGHT."""
    for name, ptx in compiled[1].items():
        most = run = 0
        for line in instructions(ptx):
            run = 0 if re.search(STORE, line) else run + bool(re.search(LOAD, line))
            most = max(most, run)
        assert most >= 4 or name in OTHERS, name


def test_kernels_use_no_local_memory_and_call_nothing(compiled):
    for name, ptx in compiled[1].items():
        assert not re.search(r"\.local\b", ptx), name
        assert count(ptx, r"\bcall\b") == 0, name


def test_addresses_have_sixty_four_bits(compiled):
    target, kernels = compiled
    for name, ptx in kernels.items():
        assert f".target sm_{target[0]}{target[1]}" in ptx, name
        assert ".address_size 64" in ptx, name
        access = r"(ld|st|atom)\S*\.global\S*"
        assert count(ptx, access) == count(ptx, access + r"[^\[]*\[%rd\d+") > 0, name


def test_floats_are_not_made_inexact(compiled):
    """No flush to zero, no approximate division, and no multiplication fused into an addition."""
    _, kernels = compiled
    for name, ptx in kernels.items():
        assert count(ptx, r"\.ftz\b|\bdiv\.(approx|full)") == 0, name
        assert count(ptx, r"\bfma\S*\.f32") == 0, name
    assert count(kernels["unpack"], r"\bdiv\.rn\.f32") > 0


def tool(name):
    """Where a tool of the toolkit lies, as its wheel installs it; None where it is not."""
    import nvidia

    found = [Path(place, "cu13", "bin", name) for place in nvidia.__path__]
    return next((path for path in found if path.exists()), None)


MULTIPROCESSOR_REGISTERS = 65536
BLOCK = 256


@pytest.fixture(scope="module")
def assembled(compiled, tmp_path_factory):
    """What the assembler says of each kernel, and its machine code, a line for each instruction."""
    ptxas, nvdisasm = tool("ptxas"), tool("nvdisasm")
    if ptxas is None or nvdisasm is None:
        pytest.skip("not installed: nvidia-cuda-nvcc, nvidia-cuda-nvdisasm (extra gpu-test)")
    (major, minor), kernels = compiled
    found, folder = {}, tmp_path_factory.mktemp("machine-code")
    for name, ptx in kernels.items():
        source, code = folder / f"{name}.ptx", folder / "out"
        source.write_text(ptx)
        told = output(ptxas, "-v", f"-arch=sm_{major}{minor}", source, "-o", code)
        lines = output(nvdisasm, "-c", code).splitlines()
        found[name] = told, [line for line in lines if re.match(r"\s+/\*[0-9a-f]{4,}\*/", line)]
    return found


def output(*command):
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_machine_code_leaves_room_for_768_threads(assembled):
    """With 64 bytes of each on their way, that is 48 KB; and nothing is spilled to memory."""
    for name, (told, _) in assembled.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in told, name
        registers = int(re.search(r"Used (\d+) registers", told).group(1))
        # They are given to a warp by eights.
        threads = MULTIPROCESSOR_REGISTERS // (-(-registers // 8) * 8 * BLOCK) * BLOCK
        assert threads >= 768, (name, registers)


def test_machine_code_loads_64_bytes_at_once(assembled):
    """The assembler leaves the loads together: nothing between them could wait for one of them."""
    for name, (_, code) in assembled.items():
        at = [i for i, line in enumerate(code) if re.search(r"\bLDG\S*\.128", line)]
        if name in OTHERS:
            assert not at, name
            continue
        assert min(last - first for first, last in zip(at, at[3:], strict=False)) <= 12, name


def test_random_words_are_multiplied_at_full_width(compiled):
    """Ten rounds of two products, their upper halves by one instruction each, but one of them 0."""
    assert count(compiled[1]["mask"], r"mul\.hi\.u64") >= 19
