"""Which optimizer's state can go on in which other."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

__all__ = ["kind_of", "misfit"]


def kind_of(optimizer: torch.optim.Optimizer, of: type) -> dict[str, Any]:
    """Return what tells the kind of an optimizer of this class, as plain values.

    name: its class.  base: the class of torch that it is or comes from, Optimizer at the least.
    hyper: its hyper-parameters.
    """
    base = next(kind for kind in of.__mro__ if f"{kind.__module__}.".startswith("torch.optim."))
    hyper = sorted(map(str, getattr(optimizer, "defaults", {})))
    return {"name": of.__name__, "base": base.__name__, "hyper": hyper}


def misfit(saved: dict[str, Any], own: dict[str, Any]) -> bool:
    """Tell whether an optimizer can surely not go on from the state of another.

    A subclass can go on from what it comes from, but not AdamW from Adam, of which torch makes it a
    subclass: it would take over how Adam decays weights. What comes from torch's Optimizer alone
    may wrap any other, and is taken for one with the same hyper-parameters, or none.
    """
    if saved["name"] == own["name"]:
        return False
    if "Optimizer" not in (saved["base"], own["base"]):
        return bool(saved["base"] != own["base"])
    return bool(saved["hyper"] and own["hyper"] and saved["hyper"] != own["hyper"])
