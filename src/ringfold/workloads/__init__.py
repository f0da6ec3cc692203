"""What train.py trains: models and data that are there without a download.

The table holds what the command line needs to know; a workload's module, and torch with it, is
imported by `load` only.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .workload import Workload

__all__ = ["WORKLOADS", "Defaults", "load"]


@dataclass(frozen=True)
class Defaults:
    """Describe a workload in one line and give the options that suit it."""

    summary: str
    epochs: int
    batch_size: int
    lr: float


WORKLOADS: Mapping[str, Defaults] = {
    "digits": Defaults(
        "8 x 8 handwritten digits, a small convolutional network",
        epochs=30,
        batch_size=64,
        lr=0.05,
    ),
    "linear": Defaults(
        "10,000,000 x 10 numbers, nn.Linear(10, 1)",
        epochs=10,
        batch_size=32,
        lr=0.01,
    ),
    "text": Defaults(
        "Python's own library, byte by byte, a small transformer",
        epochs=1,
        batch_size=16,
        lr=0.002,
    ),
}


def load(name: str) -> Workload:
    """Import the workload of that name; KeyError if there is none."""
    WORKLOADS[name]
    workload: Workload = import_module(f".{name}", __name__).WORKLOAD
    return workload
