"""Say how a bucket of gradients travels: as it is, narrower, or by a function of the user's.

A wire hook is a function from (bucket, comm) to work. It starts the first collective and returns
its Work, or `Rounds` over a generator where one collective follows from another's result. When the
work has ended, `bucket.flat` holds the mean over all ranks of what it held before, or whatever the
hook puts in its place, equal on every rank. A hook may keep state by parameter name.

    def halves(bucket, comm):
        half = bucket.flat.to(torch.bfloat16)

        def rounds():
            yield comm.allreduce(half, op="mean", blocking=False)
            bucket.flat.copy_(half)

        return Rounds(rounds())

Ranks run the hooks of equal buckets in equal order, also the later rounds, so that a hook may call
any collective of `comm` with blocking=False.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from .flatten import WIRES
from .tensors import dtype_name

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Receipt, Work

__all__ = [
    "Ended",
    "GradientBucket",
    "Rounds",
    "Wire",
    "WireFormat",
    "WireHook",
    "narrowed",
    "payload",
    "wire_format",
]


@dataclass(frozen=True)
class GradientBucket:
    """Hold the gradients that are reduced together, end to end in `flat`.

    names, shapes: of the parameters; a complex one has a last dimension of 2 more.
    offsets: where each begins in `flat`, which has the gradients' own dtype.
    present: whether this rank has a gradient to contribute; where not, the elements are zeros.
        A hook that carries an error from step to step lets it wait for a gradient.
    loss_scale: what the losses were multiplied by, the factor of a `LossScaler`. It changes from
        step to step: a hook that carries an error keeps it divided by this.
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    offsets: tuple[int, ...]
    flat: Tensor
    present: tuple[bool, ...]
    loss_scale: float = 1.0

    def tensors(self) -> list[Tensor]:
        """Return the gradients as views of `flat`."""
        return [
            self.flat[offset : offset + math.prod(shape)].view(shape)
            for offset, shape in zip(self.offsets, self.shapes, strict=True)
        ]


class Rounds:
    """Run a generator of works: each is waited for before the generator goes on.

    `yield work` gives the work's result. The reducer advances the rounds of all buckets in turn, so
    that their messages overlap.
    """

    def __init__(self, steps: Generator[Work, Any, None]) -> None:
        """Run up to the first work, which starts it."""
        self.receipts: list[Receipt] = []
        self._steps = steps
        self._work: Work | None = None
        self._go_on(None)

    def advance(self) -> bool:
        """Wait for the work under way and go on to the next; tell whether there is one."""
        if self._work is not None:
            self._go_on(self._work.wait())
        return self._work is not None

    def wait(self, timeout: float | None = None) -> None:
        """Go on to the end; timeout: seconds for each work, the communicator's own where None."""
        while self._work is not None:
            self._go_on(self._work.wait(timeout))

    def abandon(self) -> None:
        """Wait for the work under way and start no other."""
        if self._work is not None:
            self._work.wait()
        self._work = None
        self._steps.close()

    def works(self) -> Generator[Work, Any, None]:
        """Yield the works from the one under way on, for rounds around these."""
        while self._work is not None:
            result = yield self._work
            self._go_on(result)

    def _go_on(self, result: Any) -> None:
        try:
            self._work = self._steps.send(result)
        except StopIteration:
            self._work = None
        else:
            self.receipts.append(self._work.receipt)


class Ended:
    """Rounds of works that have ended, by their receipts."""

    def __init__(self, receipts: list[Receipt]) -> None:
        self.receipts = receipts

    def advance(self) -> bool:
        """Tell that there is nothing to wait for."""
        return False

    def abandon(self) -> None:
        """Do nothing."""


WireHook: TypeAlias = "Callable[[GradientBucket, Communicator], Work | Rounds]"
WireFormat: TypeAlias = "str | torch.dtype | np.dtype[Any] | type[np.generic]"


@dataclass(frozen=True)
class Wire:
    """One choice of how gradients travel: a dtype name of `flatten.WIRES`, a hook, or neither."""

    dtype: str | None = None
    hook: WireHook | None = None

    def __str__(self) -> str:
        if self.hook is None:
            return str(self.dtype)
        return _shown(self.hook)


def _shown(hook: Any) -> str:
    """Describe a hook and its settings, in the same words on every rank.

    Only plain values are shown: the repr of others may name an address or a state of this rank.
    """
    if isinstance(hook, functools.partial):
        given = {str(place): value for place, value in enumerate(hook.args)} | hook.keywords
        return f"{_shown(hook.func)} with ({_plain(given)})"
    if dataclasses.is_dataclass(hook) and not isinstance(hook, type):
        shown = [field.name for field in dataclasses.fields(hook) if field.repr]
        return f"{type(hook).__qualname__}({_plain({n: getattr(hook, n) for n in shown})})"
    return getattr(hook, "__qualname__", None) or type(hook).__qualname__


def _plain(values: Mapping[str, Any]) -> str:
    plain = (int, float, str, type(None))
    return ", ".join(f"{n}={v!r}" for n, v in values.items() if isinstance(v, plain))


def wire_format(wire: WireFormat | WireHook | None) -> Wire:
    """Read a user's choice: None, "fp32", "bf16", "fp16", "powersgd:RANK", "topk:RATIO" or a hook.

    A dtype of torch or NumPy stands for the first three, and so does its full name. ValueError for
    an unknown name or another dtype, or an argument that does not fit a name; TypeError for what
    is none of these.
    """
    if wire is None:
        return Wire()
    wire = _plain_word(wire)
    if not isinstance(wire, str):
        if isinstance(wire, type):  # callable, but one makes a hook of it first
            raise TypeError(f"expected a wire format or a hook, got the class {wire.__qualname__}")
        if not callable(wire):
            raise TypeError(f"expected a wire format or a hook, got {type(wire).__name__}")
        return Wire(hook=wire)
    if wire in WIRES:
        return Wire(dtype=wire)
    name, _, argument = wire.partition(":")
    if name not in _NAMED:
        known = ", ".join((*WIRES, *(f"{name}:{_NAMED[name][1]}" for name in _NAMED)))
        raise ValueError(f"unknown wire dtype {wire!r}, expected None or one of: {known}")
    make, what = _NAMED[name]
    try:
        return Wire(hook=make(argument))
    except ValueError as error:
        raise ValueError(f"wire format {wire!r}, expected {name}:{what}: {error}") from None


def _plain_word(wire: Any) -> Any:
    """Return the word for a dtype, or for the full name of one; anything else as it is."""
    if isinstance(wire, torch.dtype):
        wire = dtype_name(wire)
    elif isinstance(wire, np.dtype) or (isinstance(wire, type) and issubclass(wire, np.generic)):
        wire = np.dtype(wire).name
    return _WORDS.get(wire, wire) if isinstance(wire, str) else wire


def narrowed(values: Tensor, dtype: torch.dtype, loss_scale: float) -> Tensor:
    """Return finite values in another dtype; those beyond its range become its largest value.

    Where losses are scaled up they become infinite instead: the scale may have made them so large,
    and by an infinity the scaler learns that it has to lower its factor.
    """
    most = torch.finfo(dtype).max
    return (values if loss_scale > 1 else values.clamp(-most, most)).to(dtype)


def payload(receipt: Receipt, size: int) -> int:
    """Return the bytes that this rank put into a collective of `size` ranks."""
    # An allgather's buffer holds every rank's part.
    return receipt.nbytes // size if receipt.operation == "allgather" else receipt.nbytes


def _powersgd(argument: str) -> WireHook:
    from .powersgd import PowerSGD

    return PowerSGD(int(argument)) if argument else PowerSGD()


def _topk(argument: str) -> WireHook:
    from .topk import TopK

    return TopK(float(argument)) if argument else TopK()


_WORDS = {"float32": "fp32", "bfloat16": "bf16", "float16": "fp16"}

_NAMED: dict[str, tuple[Callable[[str], WireHook], str]] = {
    "powersgd": (_powersgd, "RANK"),
    "topk": (_topk, "RATIO"),
}
