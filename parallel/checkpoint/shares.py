"""Which rank writes what, decided alike on every rank from what each one holds."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from .errors import CheckpointError, text_of
from .files import DTYPES, METADATA
from .samples import are_apart, digest_of, samples_of
from .state import Captured, parts_of

if TYPE_CHECKING:
    from ...comm.communicator import Communicator

__all__ = ["assign", "captured_by", "share_out", "summary_of"]


def captured_by(
    state: Mapping[str, Any], comm: Communicator
) -> tuple[Captured, str, Exception | None]:
    """Return what this rank holds, what is wrong with it, or no text, and the error behind that."""
    captured = Captured()
    try:
        parts = parts_of(state, comm.rank, comm.size)
    except Exception as error:
        return captured, text_of(error), error
    complaints: list[str] = []
    cause: Exception | None = None
    # To the end in any case: to capture a part may be collective, and others may see no fault.
    for path, part in parts.items():
        try:
            part.capture(captured)
        except CheckpointError as error:
            complaints.append(str(error))
        except Exception as error:  # code of the user's
            cause = cause or error
            complaints.append(f"{path} did not tell its state: {text_of(error)}")
    refused = ((name, _refusal(name, tensor)) for name, tensor in captured.tensors.items())
    complaints += [f"tensor {name}: {why}" for name, why in refused if why]
    return captured, next(iter(complaints), ""), cause


def _refusal(name: str, tensor: Tensor) -> str:
    """Return why a tensor cannot be kept, or no text."""
    if name == METADATA:
        return "safetensors files hold something else under this name"
    if not _is_utf8(name):
        return "a safetensors file holds no name that is not UTF-8"
    if is_lazy(tensor):
        return "a lazy layer has not made it yet"
    if tensor.is_meta:
        return "on the meta device it has no values"
    if tensor.layout != torch.strided or tensor.is_nested:
        kind = "a nested one" if tensor.is_nested else str(tensor.layout)
        return f"expected a dense one, got {kind}"
    return "" if tensor.dtype in DTYPES else f"{tensor.dtype} has no place in a safetensors file"


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # of a lone surrogate
        return False
    return True


def summary_of(captured: Captured, step: int | None = None) -> str:
    """Return JSON of all but the tensors' contents."""
    held = {
        name: [t.nbytes, DTYPES[t.dtype], list(t.shape)] for name, t in captured.tensors.items()
    }
    samples, digests = {}, {}
    if step is not None:  # what is written, that all ranks are to go on from
        samples = samples_of({name: captured.tensors[name] for name in captured.alike})
        digests = {name: digest_of(captured.tensors[name]) for name in captured.equal}
    return json.dumps(
        {
            "step": step,
            "tensors": held,
            "values": captured.values,
            "samples": samples,
            "digests": digests,
        }
    )


def share_out(rows: list[dict[str, Any]]) -> tuple[dict[str, int], dict[str, Any], int]:
    """Return who writes each tensor, all values, and all bytes; the same on every rank.

    CheckpointError where ranks differ in what should be one thing.
    """
    holders: dict[str, tuple[int, list[int]]] = {}
    kinds: dict[str, tuple[int, Any]] = {}
    values: dict[str, tuple[int, Any]] = {}
    steps: dict[str, tuple[int, Any]] = {}
    samples: dict[str, tuple[int, list[float]]] = {}
    digests: dict[str, tuple[int, str]] = {}
    for rank, row in enumerate(rows):
        _same(steps, "step", rank, row["step"], rows)
        for name, (nbytes, *kind) in row["tensors"].items():
            _same(kinds, name, rank, kind, rows)
            holders.setdefault(name, (nbytes, []))[1].append(rank)
        for name, sample in row["samples"].items():
            first, expected = samples.setdefault(name, (rank, sample))
            if are_apart(expected, sample):
                raise CheckpointError(
                    f"{name} is another tensor on rank {first} than on rank {rank}: it begins with "
                    f"{expected[0]:g} and {sample[0]:g}. One of them would be written: average "
                    "models that ranks train apart, and save layers that are split over ranks "
                    "under names that tell the part, or over a communicator of equal parts"
                )
        for name, digest in row["digests"].items():
            first, known = digests.setdefault(name, (rank, digest))
            if digest != known:
                raise CheckpointError(
                    f"{name} is another tensor on rank {first} than on rank {rank}, and what is "
                    "saved by value is to be the same on all: give each rank's own a name that "
                    f'tells the rank, as in {{f"{name.partition("/")[0]}{{rank}}": ...}}'
                )
        for path, value in row["values"].items():
            _same(values, path, rank, value, rows)
    chosen = assign(holders, len(rows))
    total = sum(nbytes for nbytes, _ in holders.values())
    return chosen, {path: value for path, (_, value) in values.items()}, total


def _same(
    known: dict[str, tuple[int, Any]], name: str, rank: int, value: Any, rows: list[dict[str, Any]]
) -> None:
    first, expected = known.setdefault(name, (rank, value))
    if value != expected:
        shown = [_shown(v, rows[r]["values"]) for r, v in ((first, expected), (rank, value))]
        raise CheckpointError(
            f"{name} differs between ranks: rank {first} has {shown[0]}, rank {rank} has {shown[1]}"
        )


def _shown(value: Any, values: Mapping[str, Any]) -> str:
    """Return text for a value, or for that whose path it is."""
    meant = values.get(value, value) if isinstance(value, str) else value
    return str(meant)[:200]


def assign(holders: Mapping[str, tuple[int, list[int]]], num_ranks: int) -> dict[str, int]:
    """Choose who writes each tensor, given name -> (bytes, ranks that hold it).

    The largest first, each to the holder with the least so far: the same on every rank.
    """
    load = [0] * num_ranks
    chosen = {}
    for name, (nbytes, ranks) in sorted(holders.items(), key=lambda row: (-row[1][0], row[0])):
        chosen[name] = min(ranks, key=lambda rank: (load[rank], rank))
        load[chosen[name]] += nbytes
    return chosen
