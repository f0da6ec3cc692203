"""What Numba compiles of the device kernels, run as PTX on the host: no GPU needed.

The simulator runs their Python, in which every number has another type than on a GPU.
"""

import dataclasses
import importlib.util
from types import SimpleNamespace

import numpy as np
import pytest
from device_contract import *  # noqa: F403
from ptx_machine import Machine, MachineError, Memory

from ringfold.kernels.device.launch import Launcher
from ringfold.kernels.table import PointerTable

MISSING = [name for name in ("numba_cuda", "nvidia") if importlib.util.find_spec(name) is None]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"not installed: {', '.join(MISSING)} (extra gpu-test)"
    ),
    pytest.mark.timeout(300),
    pytest.mark.filterwarnings("ignore:Grid size"),
]
MEMORY = Memory()
MACHINES: dict[object, Machine] = {}
TARGET = (9, 0)


def compiled(kernel, arguments, leave_out=None):
    """The machine for a kernel and arguments of these types."""
    from numba import cuda, types

    kinds = tuple(getattr(types, np.dtype(type(one)).name) for one in arguments)
    key = kernel, kinds, leave_out
    if key not in MACHINES:
        ptx, _ = cuda.compile(
            kernel.py_func,
            types.void(*kinds),
            cc=TARGET,
            device=False,
            abi="numba",
            launch_bounds=kernel.targetoptions["launch_bounds"],
        )
        MACHINES[key] = Machine(ptx, leave_out)
    return MACHINES[key]


@dataclasses.dataclass(frozen=True)
class OnMachine(Launcher):
    """Launch on the machine, at once. leave_out, warp, seed: see `Machine`."""

    leave_out: str | None = None
    warp: int = 32
    seed: int = 1

    def prepared(self, kernel, wanted, *arguments, keeps=None):
        grid = self.grid(wanted)
        if grid == 0:
            return lambda: False

        def launch(_keeps=keeps):
            configured = kernel[grid, self.threads, 0]
            machine = compiled(configured.dispatcher, arguments, self.leave_out)
            machine.run(grid, self.threads, arguments, MEMORY, self.warp, self.seed)
            return True

        return launch


@pytest.fixture(scope="module", autouse=True)
def without_a_driver():
    """Let Numba compile for TARGET, and device memory be the host's, known to the machine."""
    if MISSING:
        yield
        return
    from numba.cuda import cuda_paths, dispatcher
    from numba.cuda.cudadrv import nvrtc

    from ringfold.kernels.device import fold, launch, table, threshold

    known = table.place

    def place(array, launcher):
        placed = known(array, launcher)
        if placed.span.count:
            MEMORY.add(placed.owner)
        return placed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cuda_paths, "_get_nvrtc_path", lambda: None)
        patch.setattr(
            nvrtc, "get_arch_option", lambda major, minor, suffix="": f"compute_{major}{minor}"
        )
        device = SimpleNamespace(compute_capability=TARGET)
        patch.setattr(dispatcher, "get_current_device", lambda: device)
        for module in (launch, table, threshold):
            patch.setattr(module, "simulating", lambda: True)
        for module in (fold, table, threshold):
            patch.setattr(module, "place", place)
        yield
    MEMORY.spans.clear()


@pytest.fixture
def launcher():
    MEMORY.spans.clear()
    return OnMachine(blocks=2, threads=4)


def test_a_place_beyond_four_giga_elements(kernels, launcher):
    check_a_place_beyond_four_giga_elements(kernels, launcher, MEMORY.add)  # noqa: F405


H200 = 132 * 4 * 32 * 1.8e9 / 4.8e12
"""Instructions of a thread that it can issue for each byte that its memory can move: 6.3."""


def moving(kernels, launcher, count):
    """Yield name, bytes an element, and a launch over count elements, of kernels that only move."""
    pack, fold, Span = kernels.pack, kernels.fold, kernels.table.Span
    a, b, c, d = (
        kernels.table.place(np.ones(4 * count // size, f"u{size}"), launcher).span
        for size in (4, 4, 2, 2)
    )
    for dtype, span, size in (("float32", b, 4), ("bfloat16", c, 2), ("float16", c, 2)):
        table = PointerTable(np.array([a.address]), np.array([count]), np.array([0]), 4)
        tiles = kernels.table.Tiles.of(table, "float32", dtype, launcher, tile=count // 2)
        learned = kernels.table.ByProducts.of(launcher)
        bucket, out = Span(span.address, count), (Span(span.address, count), dtype)
        yield f"pack {dtype}", 4 + size, lambda t=tiles, s=bucket: pack.pack(t, s, launcher)
        yield (
            f"pack {dtype}, measured",
            4 + size,
            lambda t=tiles, s=bucket, m=learned: pack.pack(t, s, launcher, scale=0.3, learned=m),
        )
        yield (
            f"unpack {dtype}",
            4 + size,
            lambda t=tiles, s=bucket: pack.unpack(t, s, launcher, divisor=2.0),
        )
        if size == 2:
            yield f"to {dtype}", 6, lambda o=out: pack.cast(a, "float32", *o, launcher)
            yield f"from {dtype}", 6, lambda o=out: pack.cast(*o, a, "float32", launcher)
    for dtype, ones, size in (("float32", (a, b), 4), ("bfloat16", (c, d), 2)):
        spans = [Span(one.address, count) for one in ones]
        peers = fold.Peers.of(tuple(span.address for span in spans), launcher)
        yield (
            f"combine {dtype}",
            3 * size,
            lambda t=dtype, s=spans: kernels.combine.combine("sum", t, *s, launcher),
        )
        yield (
            f"fold {dtype}",
            4 * size,
            lambda t=dtype, p=peers: fold.fold("mean", t, p, p, count, launcher, last=2.0),
        )


def test_kernels_have_few_enough_instructions_to_wait_for_memory_alone(kernels):
    """An H200 issues them in 60 % of the time that its memory takes for the bytes."""
    launcher, count = OnMachine(blocks=2, threads=32), 4096
    for name, nbytes, launch in moving(kernels, launcher, count):
        done = sum(counts.sum() for _, counts in watched(launch))
        assert 0 < done / count / nbytes < 0.6 * H200, (name, done / count)


def watched(launch):
    """Launch, and return the machines that ran, with how often each of their instructions was."""
    before = {machine: machine.done.copy() for machine in MACHINES.values()}
    launch()
    ran = ((m, m.done - before.get(m, 0)) for m in MACHINES.values())
    return [(machine, counts) for machine, counts in ran if counts.any()]


def test_nearly_all_is_loaded_64_bytes_at_a_time(kernels):
    """Also where a span is two or three times as long as a vector for each thread."""
    launcher = OnMachine(blocks=16, threads=32)
    for count in (4096 - 128, 6144):
        for name, _, launch in moving(kernels, launcher, count):
            together = alone = 0
            for machine, counts in watched(launch):
                for loads in stretches(machine):
                    done = sum(int(counts[at]) for at in loads)
                    together, alone = (
                        (together + done, alone) if len(loads) >= 4 else (together, alone + done)
                    )
            assert together > 0.8 * (together + alone) > 0, (name, count, together, alone)


def stretches(machine):
    """Yield the loads of 16 bytes of every stretch of code without a store or a label."""
    loads = []
    for at, instruction in enumerate(machine.code):
        if at in machine.starts or "st.global" in instruction.text:
            yield loads
            loads = []
        if "ld.global.v4" in instruction.text:
            loads.append(at)
    yield loads


def learn(kernels, launcher):
    """Pack over several blocks, and see what they learned together."""
    case = Bucket(kernels, launcher, ("float32", "float32"), [144, 37, 60])  # noqa: F405
    kernels.pack.pack(case.tiles, case.bucket.span, launcher, learned=case.learned)
    wanted = float(sum((array.astype(np.float64) ** 2).sum() for array in case.arrays))
    np.testing.assert_allclose(case.learned.read(launcher).square_norm, wanted, rtol=1e-9)


def select(kernels, launcher):
    values = noise(200, "float32", 3)  # noqa: F405
    there = kernels.table.place(values, launcher)
    selection = kernels.threshold.Selection.of(launcher)
    kernels.threshold.threshold(there.span, "float32", 20, selection, launcher)
    found = selection.read(launcher).value
    assert found == np.sort(np.abs(values))[-20]


@pytest.mark.parametrize(
    ("work", "leave_out"), [(learn, "membar"), (learn, "bar.sync"), (select, "bar.sync")]
)
def test_a_fence_or_a_barrier_that_is_left_out_is_told(kernels, work, leave_out):
    """Mutation: the machine has to say no to it, in one order of blocks at least."""
    for seed in range(24):
        MEMORY.spans.clear()
        launcher = OnMachine(blocks=3, threads=16, warp=4, seed=seed)
        work(kernels, launcher)
        try:
            work(kernels, dataclasses.replace(launcher, leave_out=leave_out))
        except (MachineError, AssertionError):
            return
    pytest.fail(f"nobody misses {leave_out}")


def test_memory_that_is_not_the_kernels_is_told(kernels, launcher):
    a, b = (kernels.table.place(np.ones(8, np.float32), launcher) for _ in range(2))
    longer = [dataclasses.replace(one.span, count=9) for one in (a, b)]
    with pytest.raises(MachineError, match="illegal access of 4 bytes"):
        kernels.combine.combine("sum", "float32", *longer, launcher)
    kernel, size = kernels.combine.combine_kernel("sum", "float32", "float32"), np.int64(4)
    odd = (np.int64(a.span.address + 2), np.int64(b.span.address), size, size)
    with pytest.raises(MachineError, match="not aligned"):
        compiled(kernel, odd).run(1, 4, odd, MEMORY)


DIFFERENT_BARRIERS = """
.visible .entry two(
	.param .u64 unused
)
{
	.reg .pred %p<2>;
	.reg .b32 %r<2>;

	mov.u32 %r1, %tid.x;
	setp.lt.s32 %p1, %r1, 2;
	@%p1 bra $L1;
	bar.sync 0;
	ret;
$L1:
	bar.sync 0;
	ret;
}
"""


def test_threads_at_different_barriers_are_told():
    with pytest.raises(MachineError, match="different barriers"):
        Machine(DIFFERENT_BARRIERS).run(1, 4, [np.int64(0)], MEMORY)
    Machine(DIFFERENT_BARRIERS).run(1, 2, [np.int64(0)], MEMORY)


def test_what_the_machine_does_not_know_is_an_error():
    with pytest.raises(MachineError, match="sin"):
        Machine(DIFFERENT_BARRIERS.replace("mov.u32", "sin.approx.f32"))
