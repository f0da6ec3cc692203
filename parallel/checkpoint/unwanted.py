"""Refuse a checkpoint of which tensors would be left behind without a word."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from .errors import CheckpointError

if TYPE_CHECKING:
    from pathlib import Path

    from .manifest import Manifest

__all__ = ["refuse_unwanted"]

_SHOWN = 3


def refuse_unwanted(
    manifest: Manifest, wanted: set[str], wholes: Iterable[tuple[str, str]], path: Path
) -> None:
    """Raise CheckpointError for tensors that no rank wants of an object that must be whole.

    wanted: by any rank.  wholes: of all ranks, as some may load what others do not: the name of an
    object, and of which kind it is (`Part.whole`). An optimizer's state is missed where a module
    that is loaded has the parameter; an optimizer of two models may go on with one of them.
    """
    found = dict.fromkeys(wholes)
    modules = {name for name, kind in found if kind == "module"}
    for name, kind in found:
        below = f"{name}/" if kind == "module" else f"{name}/state/"
        left = (t.removeprefix(below) for t in manifest.tensors if _is_left(t, below, wanted))
        # Up to the key of an optimizer's state.
        missed = sorted({t.partition("/")[0] for t in left})
        if kind == "optimizer":
            missed = [p for p in missed if _is_of(p, modules, manifest)]
        if missed:
            few = ", ".join(missed[:_SHOWN])
            more = f" and {len(missed) - _SHOWN} more" if len(missed) > _SHOWN else ""
            then = (
                ": give the optimizer their parameters first, by add_param_group"
                if kind == "optimizer"
                else ""
            )
            raise CheckpointError(
                f"{path} does not fit: {few}{more} of its {below[:-1]} are on no rank{then}"
            )


def _is_left(tensor: str, below: str, wanted: set[str]) -> bool:
    return tensor.startswith(below) and tensor not in wanted


def _is_of(parameter: str, modules: set[str], manifest: Manifest) -> bool:
    """Tell whether a parameter is of one of these modules, or of any where there are none."""
    module, colon, _ = parameter.partition(":")
    if colon:
        return module in modules
    return not modules or any(f"{path}/{parameter}" in manifest.tensors for path in modules)
