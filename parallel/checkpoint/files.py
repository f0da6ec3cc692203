"""One rank's safetensors file: written in a stream from memory, read back and checked.

The library reads; it is not used for writing, where it would copy all tensors once more and hold
the interpreter lock while training wants it. The layout is its published one: eight bytes of
header length, a JSON header, then the tensors without a gap.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..tensors import flat_bytes
from .errors import Damaged
from .manifest import Entry

__all__ = [
    "DTYPES",
    "METADATA",
    "fsync_folder",
    "raw_bytes",
    "read_tensors",
    "write_tensors",
    "write_text",
]

DTYPES: Mapping[torch.dtype, str] = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.complex64: "C64",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    **({torch.float8_e8m0fnu: "F8_E8M0"} if hasattr(torch, "float8_e8m0fnu") else {}),
    torch.bool: "BOOL",
}
"""What every release of the library reads that this package takes."""

METADATA = "__metadata__"
"""What a header keeps for texts; no tensor can have the name."""

_LONGEST = 100_000_000
"""Bytes of a header that the library reads."""

_PIECE = 1 << 22
"""Bytes written and hashed at once, each without the interpreter lock."""


def raw_bytes(tensor: Tensor) -> memoryview:
    """Return the memory of a contiguous host tensor."""
    if tensor.numel() == 0:
        return memoryview(b"")
    flat: Any = flat_bytes(tensor).numpy()
    return memoryview(flat)


def write_tensors(path: Path, tensors: Mapping[str, Tensor]) -> tuple[int, dict[str, Entry]]:
    """Write contiguous host tensors to a new file, down to the disk; return bytes and entries.

    OSError as the system gives it, such as for a full disk. ValueError for more names than a file
    can have.
    """
    names = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    header: dict[str, object] = {}
    offset = 0
    for name in names:
        tensor, end = tensors[name], offset + tensors[name].nbytes
        header[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LONGEST:
        raise ValueError(
            f"the names and shapes of {len(names)} tensors take {len(text)} bytes, of which a "
            f"safetensors file can have {_LONGEST}: spread them over more ranks"
        )
    total = 8 + len(text) + offset
    entries = {}
    with path.open("xb", buffering=0) as file:
        _reserve(file.fileno(), total)
        _write_all(file.fileno(), memoryview(len(text).to_bytes(8, "little") + text))
        for name in names:
            digest = hashlib.sha256()
            data = raw_bytes(tensors[name])
            for start in range(0, len(data), _PIECE):
                piece = data[start : start + _PIECE]
                _write_all(file.fileno(), piece)
                digest.update(piece)
            tensor = tensors[name]
            entries[name] = Entry(
                path.name, DTYPES[tensor.dtype], tuple(tensor.shape), digest.hexdigest()
            )
        os.fsync(file.fileno())
    return total, entries


def _reserve(descriptor: int, nbytes: int) -> None:
    """Let a disk that is too small show now, not after minutes of writing."""
    try:
        os.posix_fallocate(descriptor, 0, nbytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise


def _write_all(descriptor: int, data: memoryview) -> None:
    while len(data):
        data = data[os.write(descriptor, data) :]


def read_tensors(
    folder: Path, files: Mapping[str, int], wanted: Mapping[str, Entry]
) -> dict[str, Tensor]:
    """Return the wanted tensors by name; Damaged by file and tensor name where one is not whole."""
    found: dict[str, Tensor] = {}
    by_file: dict[str, list[str]] = {}
    for name, entry in wanted.items():
        by_file.setdefault(entry.file, []).append(name)
    for file, names in by_file.items():
        path = folder / file
        try:
            size = path.stat().st_size
        except OSError as error:
            raise Damaged(f"{file}: {error.strerror}; {_some(names)}") from None
        if size != files.get(file):
            raise Damaged(f"{file}: expected {files.get(file)} bytes, got {size}; {_some(names)}")
        found |= _read_file(path, {name: wanted[name] for name in names})
    return found


def _read_file(path: Path, wanted: Mapping[str, Entry]) -> dict[str, Tensor]:
    from safetensors import SafetensorError, safe_open

    found = {}
    name = next(iter(wanted))
    try:
        with safe_open(str(path), framework="pt", device="cpu") as file:
            for name, entry in wanted.items():
                tensor = file.get_tensor(name).contiguous()
                got = DTYPES.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
                if got != (entry.dtype, entry.shape):
                    raise Damaged(
                        f"{path.name}: tensor {name}: expected {entry.dtype} {entry.shape}, "
                        f"got {got[0]} {got[1]}"
                    )
                if hashlib.sha256(raw_bytes(tensor)).hexdigest() != entry.sha256:
                    raise Damaged(f"{path.name}: tensor {name} does not match its checksum")
                found[name] = tensor
    except (SafetensorError, OSError, RuntimeError, ValueError) as error:
        raise Damaged(f"{path.name}: tensor {name}: {error}") from error
    return found


def _some(names: Iterable[str]) -> str:
    first, *others = sorted(names)
    return f"tensor {first}" + (f" and {len(others)} more" if others else "")


def write_text(path: Path, text: str) -> None:
    """Write a file so that a reader finds it whole or not at all, down to the disk."""
    beside = path.with_name(f".{path.name}")
    with beside.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)


def fsync_folder(path: Path) -> None:
    """Bring the names in a folder down to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
