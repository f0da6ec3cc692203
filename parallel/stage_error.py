"""Tell every rank of a mesh what has failed in one stage of a pipeline.

A stage that fails goes on hollow: it computes nothing more, but takes and sends every message of
its plan, marked as lost or zeros. So nobody waits in vain, no message is left behind, and when the
step has ended all ranks learn of it together.
"""

from __future__ import annotations

from collections import UserDict
from collections.abc import Sequence
from dataclasses import dataclass, is_dataclass
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .actions import Action, Kind
from .instances import attributes_of
from .objects import allgather_objects
from .structure import TensorSpec

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Failure", "StageError", "raise_together", "shown"]


class StageError(RuntimeError):
    """Say which stage failed, in which action, on what input; the same on every rank.

    On the rank where it happened, `__cause__` is the stage's own exception.
    """


@dataclass(frozen=True)
class Failure:
    """What went wrong on this rank.

    given: what it worked on, in words.
    """

    action: Action
    given: str
    error: Exception

    def __str__(self) -> str:
        kind = type(self.error).__name__
        # What torch adds on further lines is advice on its own debugging.
        first, *_ = str(self.error).strip().splitlines() or [""]
        what = f"{_WORDS[self.action.kind]} of micro-batch {self.action.microbatch}"
        return f"stage {self.action.stage} failed in the {what}: {kind}: {first}; {self.given}"


_WORDS = {
    Kind.FORWARD: "forward",
    Kind.BACKWARD: "backward",
    Kind.INPUT: "backward to the input",
    Kind.WEIGHT: "backward to the weights",
}


def raise_together(comm: Communicator, failure: Failure | None) -> None:
    """Raise StageError on every rank; collective, once all know that some rank has failed."""
    texts: Sequence[str | None] = allgather_objects(None if failure is None else str(failure), comm)
    found = [f"rank {rank} of {comm.size}: {text}" for rank, text in enumerate(texts) if text]
    more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
    raise StageError(found[0] + more) from (None if failure is None else failure.error)


def shown(value: Any) -> str:
    """Return a nested value with shapes and dtypes for tensors: "(float32 (3, 5), None)"."""
    name = "" if type(value) in (tuple, list, dict) else type(value).__name__
    if isinstance(value, tuple | list):
        inner = ", ".join(map(shown, value))
        return f"{name}({inner})" if isinstance(value, tuple) else f"{name}[{inner}]"
    if isinstance(value, dict | UserDict):
        pairs = (f"{key!r}: {shown(child)}" for key, child in value.items())
        return f"{name}{{{', '.join(pairs)}}}"
    if isinstance(value, Tensor):
        value = TensorSpec.of(value)
    if isinstance(value, TensorSpec):
        return f"{value.dtype} {value.shape}"
    if is_dataclass(type(value)):
        found = attributes_of(value).items()
        own = (f"{key}={'...' if child is value else shown(child)}" for key, child in found)
        return f"{name}({', '.join(own)})"
    return repr(value)
