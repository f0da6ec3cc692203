"""A machine that runs PTX on the host, a thread of numpy lanes per thread of a block.

It runs what Numba compiles for a GPU, where the simulator runs the kernels' Python: types, shifts,
conversions and addresses are those of the GPU. It is as strict as a GPU may be, and stricter:

- an access outside of the memory that is known to it, or not aligned to its size, is an error;
- threads of a block that wait at different barriers are an error;
- blocks take turns at random, and so do the warps of a block; a block sees another's stores only
  once the thread that made them has fenced them or ended (additions in memory are seen at once); a
  plain load gives what this block has loaded from there before.

    Machine(ptx).run(grid, threads, [np.int64(address), np.float32(0.5)], memory)

(PTX ISA 8.x, chapter 9. Instructions that it does not know are an error.)
"""

from __future__ import annotations

import ctypes
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Lanes = np.ndarray
KINDS = {
    **{f"{letter}{bits}": np.dtype(f"u{bits // 8}") for letter in "ub" for bits in (8, 16, 32, 64)},
    **{f"s{bits}": np.dtype(f"i{bits // 8}") for bits in (8, 16, 32, 64)},
    "f16": np.dtype("f2"), "f32": np.dtype("f4"), "f64": np.dtype("f8"), "pred": np.dtype("?"),
}  # fmt: skip
SHARED = 1 << 40
"""Where the window of shared memory begins."""

TURN = 6
"""Stretches between branches that a block runs at most until another one may have its turn."""


class MachineError(Exception):
    """What a GPU would not do, or need not do as the kernel hopes."""


class Memory:
    """The device memory that kernels may touch, by address on the host."""

    def __init__(self) -> None:
        self.spans: dict[int, tuple[int, object]] = {}

    def add(self, owner: np.ndarray) -> None:
        """Let kernels touch an array, which is kept alive."""
        self.spans[owner.ctypes.data] = owner.nbytes, owner

    def find(self, address: int, nbytes: int) -> Any:
        for base, (size, _) in self.spans.items():
            if base <= address and address + nbytes <= base + size:
                return (ctypes.c_uint8 * nbytes).from_address(address)
        raise MachineError(f"illegal access of {nbytes} bytes at {address:#x}")


@dataclass
class Block:
    """One block of threads, at work."""

    index: int
    threads: int
    grid: int
    arguments: dict[str, Any]
    memory: Memory
    shared: np.ndarray
    registers: dict[str, Lanes] = field(default_factory=dict)
    unseen: dict[int, tuple[int, int]] = field(default_factory=dict)
    loaded: dict[tuple[int, int], bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.pc = np.zeros(self.threads, np.int64)
        self.waits, self.ended = np.zeros((2, self.threads), bool)

    # -- memory ------------------------------------------------------------------------------

    def load(self, address: int, nbytes: int, space: str, fresh: bool) -> bytes:
        if address % nbytes:
            raise MachineError(f"an access of {nbytes} bytes at {address:#x} is not aligned")
        if space == "shared":
            at = self._within(address, nbytes)
            return self.shared[at : at + nbytes].tobytes()
        found = bytes(self.memory.find(address, nbytes))
        if not fresh:
            found = self.loaded.setdefault((address, nbytes), found)
        if self.unseen:
            own = [self.unseen.get(address + i) for i in range(nbytes)]
            found = bytes(found[i] if own[i] is None else own[i][0] for i in range(nbytes))
        return found

    def store(self, address: int, data: bytes, space: str, thread: int) -> None:
        if address % len(data):
            raise MachineError(f"an access of {len(data)} bytes at {address:#x} is not aligned")
        if space == "shared":
            at = self._within(address, len(data))
            self.shared[at : at + len(data)] = np.frombuffer(data, np.uint8)
            return
        self.memory.find(address, len(data))
        for i, byte in enumerate(data):
            self.unseen[address + i] = byte, thread

    def fence(self, threads: set[int]) -> None:
        """Let all blocks see what these threads have stored."""
        for address, (byte, thread) in list(self.unseen.items()):
            if thread in threads:
                self.memory.find(address, 1)[0] = byte
                del self.unseen[address]

    def add(self, address: int, value: np.generic, space: str) -> bytes:
        """Add at once, for all to see; return what was there."""
        nbytes = value.dtype.itemsize
        if space == "shared":
            before = self.load(address, nbytes, space, True)
            after = np.frombuffer(before, value.dtype)[0] + value
            self.store(address, after.tobytes(), space, 0)
            return before
        if any(address + i in self.unseen for i in range(nbytes)):
            raise MachineError("an atomic addition to what was stored without a fence")
        place = self.memory.find(address, nbytes)
        before = bytes(place)
        place[:] = (np.frombuffer(before, value.dtype)[0] + value).tobytes()
        return before

    def _within(self, address: int, nbytes: int) -> int:
        at = address - SHARED
        if not 0 <= at <= self.shared.size - nbytes:
            raise MachineError(f"illegal access of {nbytes} bytes of shared memory at {at}")
        return at

    # -- registers ---------------------------------------------------------------------------

    def read(self, name: str, kind: np.dtype[Any]) -> Lanes:
        """Return an operand in all threads as a type: a register, a number, or a name."""
        if name in _SPECIAL:
            return _SPECIAL[name](self).astype(kind)
        if name[0] == "%":
            lanes = self.registers[name]
            if lanes.dtype.itemsize == kind.itemsize:
                return lanes.view(kind)
            if lanes.dtype.itemsize < kind.itemsize:
                raise MachineError(f"{name} is narrower than {kind}")
            return lanes.view(f"u{lanes.dtype.itemsize}").astype(f"u{kind.itemsize}").view(kind)
        if name[:2] in ("0f", "0F", "0d", "0D"):
            bits = np.array([int(name[2:], 16)], f"u{len(name[2:]) // 2}")
            value = bits.view(f"f{bits.itemsize}").astype(kind)
        elif name in self.arguments:
            value = np.array([self.arguments[name]]).astype(kind)
        else:
            value = np.array([int(name, 0) & (1 << 8 * kind.itemsize) - 1]).astype(object)
            value = value.astype(f"u{kind.itemsize}").view(kind)
        return np.repeat(value, self.threads)

    def write(self, name: str, value: Lanes, mask: Lanes) -> None:
        """Write a register in some threads; what is narrower than it is extended."""
        lanes = self.registers[name]
        if value.dtype.itemsize < lanes.dtype.itemsize:
            value = value.astype(f"{'i' if value.dtype.kind == 'i' else 'u'}{lanes.itemsize}")
        np.copyto(lanes, value.view(lanes.dtype), where=mask)


_SPECIAL: dict[str, Callable[[Block], Lanes]] = {
    "%tid.x": lambda block: np.arange(block.threads),
    "%ctaid.x": lambda block: np.full(block.threads, block.index),
    "%ntid.x": lambda block: np.full(block.threads, block.threads),
    "%nctaid.x": lambda block: np.full(block.threads, block.grid),
}

# -- what instructions compute ---------------------------------------------------------------


def _quotient(a: Lanes, b: Lanes) -> Lanes:
    """Towards zero, as C's; by zero in threads that do not take part."""
    if a.dtype.kind == "f":
        return a / b
    safe = np.where(b == 0, 1, b).astype(b.dtype)
    magnitude = np.abs(a) // np.abs(safe)
    return np.where((a < 0) != (safe < 0), -magnitude, magnitude).astype(a.dtype)


def _remainder(a: Lanes, b: Lanes) -> Lanes:
    return (a - _quotient(a, b) * np.where(b == 0, 1, b)).astype(a.dtype)


def _high(a: Lanes, b: Lanes) -> Lanes:
    wide = a.astype(object) * b.astype(object)
    return (wide >> 8 * a.itemsize).astype(a.dtype)


def _fused(a: Lanes, b: Lanes, c: Lanes) -> Lanes:
    """Rounded once, but for what a long double rounds; kernels use it for norms alone."""
    wide = np.longdouble if a.dtype == np.float64 else np.float64
    return (a.astype(wide) * b.astype(wide) + c.astype(wide)).astype(a.dtype)


def _shifted(a: Lanes, b: Lanes, left: bool) -> Lanes:
    bits = 8 * a.itemsize
    amount = np.minimum(b.view(np.uint32), bits)
    near = np.minimum(amount, bits - 1).astype(a.dtype)
    if left:
        return np.where(amount == bits, 0, a << near).astype(a.dtype)
    far = np.where(a < 0, -1, 0) if a.dtype.kind == "i" else 0
    return np.where(amount == bits, far, a >> near).astype(a.dtype)


def _inserted(a: Lanes, b: Lanes, at: int, length: int) -> Lanes:
    ones = ((1 << length) - 1) << at
    mask = a.dtype.type(ones)
    return (b & ~mask) | ((a << a.dtype.type(at)) & mask)


def _permuted(a: Lanes, b: Lanes, selector: Lanes) -> Lanes:
    """Choose four of eight bytes, or the sign of one of them, repeated."""
    both = np.stack([a, b], axis=1).view(np.uint8).astype(np.int64)
    result = np.zeros_like(a)
    for at in range(4):
        chosen = selector >> np.uint32(4 * at)
        byte = np.take_along_axis(both, (chosen & 7).astype(np.int64)[:, None], axis=1)[:, 0]
        byte = np.where(chosen & 8, np.where(byte & 128, 255, 0), byte)
        result |= byte.astype(np.uint32) << np.uint32(8 * at)
    return result


_TWO: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "add": np.add, "sub": np.subtract, "mul": np.multiply, "div": _quotient, "rem": _remainder,
    "and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor,
    "min": np.minimum, "max": np.maximum,
}  # fmt: skip
_COMPARISONS: dict[str, Callable[[Lanes, Lanes], Lanes]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal,
    "gt": np.greater, "ge": np.greater_equal,
}  # fmt: skip


def _compare(how: str, a: Lanes, b: Lanes) -> Lanes:
    if a.dtype.kind != "f":
        return _COMPARISONS[{"lo": "lt", "ls": "le", "hi": "gt", "hs": "ge"}.get(how, how)](a, b)
    unordered = np.isnan(a) | np.isnan(b)
    if how in ("nan", "num"):
        return unordered if how == "nan" else ~unordered
    if how in _COMPARISONS:
        return _COMPARISONS[how](a, b) & ~unordered
    return _COMPARISONS[how.removesuffix("u")](a, b) | unordered


def _converted(a: Lanes, to: np.dtype[Any], modes: Sequence[str]) -> Lanes:
    if to.kind in "iu" and a.dtype.kind == "f":
        if "rzi" not in modes:
            raise MachineError(f"cvt with {modes}")
        limits = np.iinfo(to)
        return np.array([min(max(int(x), limits.min), limits.max) if x == x else 0 for x in a], to)
    return a.astype(to)


# -- instructions ----------------------------------------------------------------------------

Step = Callable[[Block, Lanes], None]


@dataclass(frozen=True)
class Instruction:
    """One line: what it does to the threads of a mask, or where it leads them.

    guard: the predicate, and the value that it must have.
    """

    text: str
    guard: tuple[str, bool] | None
    step: Step | None = None
    target: str = ""
    barrier: bool = False


_LINE = re.compile(r"\s*(?:@(!?)(%p\d+)\s+)?([a-z][\w.:]*)\s*(.*?);\s*$")
_PARTS = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s]+")


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.strip("{}").split(",")]


def _place(text: str) -> tuple[str, int]:
    """Read an address: a register or a name, with or without an offset."""
    base, _, offset = text.strip("[]").partition("+")
    return base.strip(), int(offset or 0)


def _computing(words: list[str], operands: list[str]) -> Step:
    """Return what an instruction without memory does."""
    name, modes, kind = words[0], words[1:-1], KINDS[words[-1]]
    into, *sources = operands

    if name == "mov" and "{" in into + sources[0]:
        return _repacking(kind, into, sources[0])
    if name == "cvt":
        to, kind = KINDS[words[-2]], KINDS[words[-1]]
        return lambda block, mask: block.write(
            into, _converted(block.read(sources[0], kind), to, modes), mask
        )
    if name == "setp":
        return lambda block, mask: block.write(
            into, _compare(modes[0], *(block.read(s, kind) for s in sources)), mask
        )
    if name == "selp":
        return lambda block, mask: block.write(
            into,
            np.where(
                block.read(sources[2], KINDS["pred"]),
                block.read(sources[0], kind),
                block.read(sources[1], kind),
            ),
            mask,
        )
    if name in ("shl", "shr"):
        return lambda block, mask: block.write(
            into,
            _shifted(
                block.read(sources[0], kind), block.read(sources[1], KINDS["u32"]), name == "shl"
            ),
            mask,
        )
    if name == "bfi":
        at, length = int(sources[2]), int(sources[3])
        return lambda block, mask: block.write(
            into, _inserted(*(block.read(s, kind) for s in sources[:2]), at, length), mask
        )
    functions: dict[str, Callable[..., Lanes]] = {
        "mov": lambda a: a,
        "neg": np.negative,
        "not": np.invert,
        "abs": np.abs,
        "fma": _fused,
        "mad": lambda a, b, c: a * b + c,
        "prmt": _permuted,
        "copysign": lambda sign, magnitude: np.copysign(magnitude, sign),
        **_TWO,
    }
    if name not in functions or set(modes) - {"lo", "hi", "wide", "rn"}:
        raise MachineError(f"{'.'.join(words)} is not known")
    function = functions[name]
    if "wide" in modes:
        wide = np.dtype(f"{kind.kind}{2 * kind.itemsize}")
        return lambda block, mask: block.write(
            into, np.multiply(*(block.read(s, kind).astype(wide) for s in sources)), mask
        )
    if "hi" in modes:
        function = _high
    return lambda block, mask: block.write(
        into, function(*(block.read(s, kind) for s in sources)), mask
    )


def _repacking(kind: np.dtype[Any], into: str, source: str) -> Step:
    """Put registers together to a wider one, or take one apart; the lowest bits come first."""

    def join(block: Block, mask: Lanes) -> None:
        parts = _names(source)
        narrow = np.dtype(f"u{kind.itemsize // len(parts)}")
        lanes = np.stack([block.read(part, narrow) for part in parts], axis=1)
        block.write(into, np.ascontiguousarray(lanes).view(kind)[:, 0], mask)

    def part(block: Block, mask: Lanes) -> None:
        parts = _names(into)
        narrow = np.dtype(f"u{kind.itemsize // len(parts)}")
        lanes = np.ascontiguousarray(block.read(source, kind)).view(narrow).reshape(-1, len(parts))
        for at, name in enumerate(parts):
            if name != "_":
                block.write(name, np.ascontiguousarray(lanes[:, at]), mask)

    return part if "{" in into else join


def _accessing(words: list[str], operands: list[str]) -> Step:
    """Return what a load, a store or an addition in memory does."""
    name, kind, fresh = words[0], KINDS[words[-1]], "volatile" in words
    if "param" in words:
        return lambda block, mask: block.write(
            operands[0], block.read(operands[1].strip("[]"), kind), mask
        )
    space = "shared" if "shared" in words else "global"
    lanes = next((int(word[1:]) for word in words if word in ("v2", "v4")), 1)
    base, offset = _place(operands[1 if name in ("ld", "atom") else 0])
    nbytes = lanes * kind.itemsize
    address = KINDS["s64"]

    def load(block: Block, mask: Lanes) -> None:
        places = block.read(base, address) + offset
        found = np.zeros((block.threads, lanes), kind)
        for thread in np.flatnonzero(mask):
            data = block.load(int(places[thread]), nbytes, space, fresh)
            found[thread] = np.frombuffer(data, kind)
        for at, into in enumerate(_names(operands[0])):
            block.write(into, np.ascontiguousarray(found[:, at]), mask)

    def store(block: Block, mask: Lanes) -> None:
        places = block.read(base, address) + offset
        values = np.stack([block.read(one, kind) for one in _names(operands[1])], axis=1)
        for thread in np.flatnonzero(mask):
            block.store(int(places[thread]), values[thread].tobytes(), space, int(thread))

    def add(block: Block, mask: Lanes) -> None:
        places, values = block.read(base, address) + offset, block.read(operands[2], kind)
        before = np.zeros(block.threads, kind)
        for thread in np.flatnonzero(mask):
            data = block.add(int(places[thread]), values[thread], space)
            before[thread] = np.frombuffer(data, kind)[0]
        block.write(operands[0], before, mask)

    return {"ld": load, "st": store, "atom": add}[name]


def _instruction(line: str) -> Instruction:
    found = _LINE.match(line)
    if found is None:
        raise MachineError(f"cannot read {line!r}")
    inverted, predicate, opcode, rest = found.groups()
    guard = (predicate, not inverted) if predicate else None
    words, operands, text = opcode.split("."), _PARTS.findall(rest), line.strip()
    if words[0] == "bra":
        return Instruction(text, guard, target=operands[0])
    if words[0] == "ret":
        return Instruction(text, guard, target="end")
    if words[0] == "bar":
        return Instruction(text, guard, barrier=True)
    if words[0] == "membar":
        if words[1] not in ("gl", "sys"):
            raise MachineError(f"{text} is not known")
        step: Step = lambda block, mask: block.fence(set(np.flatnonzero(mask).tolist()))  # noqa: E731
    else:
        make = _accessing if words[0] in ("ld", "st", "atom") else _computing
        step = make(words, operands)
    return Instruction(text, guard, step)


class Machine:
    """A kernel, ready to run.

    done: how often threads have done each instruction, in all runs.
    leave_out: a part of instructions that it does not do, for mutations.
    """

    def __init__(self, ptx: str, leave_out: str | None = None) -> None:
        head, _, body = ptx.partition(".entry")[2].partition("{\n")
        self.parameters = re.findall(r"\.param \.(\w+) (\w+)", head)
        kinds = {name: KINDS[kind] for kind, name in re.findall(r"\.reg \.(\w+)\s+(%\w+)<", body)}
        self.names: dict[str, int] = {}
        end = SHARED
        for align, name, size in re.findall(r"\.shared \.align (\d+) \.b8 (\w+)\[(\d+)\]", ptx):
            end += -end % int(align)
            self.names[name] = end
            end += int(size)
        self.shared_bytes = end - SHARED
        self.code: list[Instruction] = []
        self.labels: dict[str, int] = {}
        for line in body.rpartition("}")[0].splitlines():
            bare = line.partition("//")[0].strip()
            if bare.endswith(":"):
                self.labels[bare[:-1]] = len(self.code)
            elif bare and not bare.startswith(".") and not (leave_out and leave_out in bare):
                self.code.append(_instruction(bare))
        self.labels["end"] = len(self.code)
        self.done = np.zeros(len(self.code), np.int64)
        self.starts = set(self.labels.values())
        self.registers = {
            name: kinds[name.rstrip("0123456789")] for name in set(re.findall(r"%[a-z]+\d+", body))
        }

    def run(
        self,
        grid: int,
        threads: int,
        arguments: Sequence[Any],
        memory: Memory,
        warp: int = 32,
        seed: int = 1,
    ) -> None:
        """Run all blocks, in turns at random, until the last thread has ended.

        warp: neighbouring threads that go together as long as they are at the same place.
        """
        if len(arguments) != len(self.parameters):
            raise MachineError(f"{len(arguments)} arguments for {len(self.parameters)} parameters")
        given = dict(self.names)
        for (kind, name), argument in zip(self.parameters, arguments, strict=True):
            given[name] = np.asarray(argument).reshape(1).view(KINDS[kind])[0]
        blocks = [self._block(index, grid, threads, given, memory) for index in range(grid)]
        order = np.random.default_rng(seed)
        with np.errstate(all="ignore"):
            while blocks:
                block = blocks[order.integers(len(blocks))]
                if not self._turn(block, warp, order):
                    blocks.remove(block)

    def _block(
        self, index: int, grid: int, threads: int, given: dict[str, Any], memory: Memory
    ) -> Block:
        shared = np.full(self.shared_bytes, 0xA5, np.uint8)
        block = Block(index, threads, grid, given, memory, shared)
        for name, kind in self.registers.items():
            lanes = np.empty(threads, kind)
            lanes.view(np.uint8)[:] = 1 if kind == KINDS["pred"] else 0xA5
            block.registers[name] = lanes
        return block

    def _turn(self, block: Block, warp: int, order: np.random.Generator) -> bool:
        """Run a block for a while; tell whether it has anything left to do."""
        for _ in range(order.integers(1, TURN + 1)):
            able = ~(block.waits | block.ended)
            if not able.any():
                if block.ended.all():
                    return False
                if len(set(block.pc[block.waits].tolist())) > 1:
                    raise MachineError("threads of a block wait at different barriers")
                block.waits[:] = False
                continue
            if warp < block.threads:
                together = np.arange(block.threads) // warp
                able &= together == order.choice(together[able])
            at = int(block.pc[able].min())
            mask = able & (block.pc == at)
            if at == len(self.code):
                block.fence(set(np.flatnonzero(mask).tolist()))
                block.ended |= mask
                continue
            self._straight(block, at, mask)
        return True

    def _straight(self, block: Block, at: int, mask: Lanes) -> None:
        """Run threads that are at the same place until they part, or may meet others."""
        while True:
            instruction = self.code[at]
            taken = mask
            self.done[at] += mask.sum()
            if instruction.guard is not None:
                name, wanted = instruction.guard
                taken = mask & (block.registers[name] == wanted)
            at += 1
            block.pc[mask] = at
            if instruction.step is not None:
                if taken.any():
                    self._do(instruction, block, taken)
            elif instruction.barrier:
                block.waits |= taken
                return
            else:
                block.pc[taken] = self.labels[instruction.target]
                return
            if at in self.starts:
                return

    def _do(self, instruction: Instruction, block: Block, mask: Lanes) -> None:
        assert instruction.step is not None
        try:
            instruction.step(block, mask)
        except Exception as error:
            where = f"block {block.index}, threads {np.flatnonzero(mask).tolist()}"
            raise MachineError(f"{error}, in {instruction.text!r} of {where}") from error
