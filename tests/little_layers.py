"""Layers and losses small enough that a test can say what comes out."""

from collections.abc import Callable
from typing import Any

import torch
from torch import nn


class Times(nn.Module):
    """Multiply by one parameter."""

    def __init__(self, value: float) -> None:
        super().__init__()
        self.w = nn.Parameter(torch.tensor(float(value)))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.w


class Call(nn.Module):
    """Call a function: a layer without parameters."""

    def __init__(self, function: Callable[[Any], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, value: Any) -> Any:
        return self.function(value)


class Table(nn.Module):
    """Pick by index, where a mask says so, and note what has come."""

    def __init__(self, seen: list[Any]) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.tensor([10.0, 100.0]))
        self.seen = seen

    def forward(self, value: Any) -> torch.Tensor:
        h, mask, idx, nothing = value.values() if isinstance(value, dict) else value
        self.seen.append((type(value), mask.dtype, idx.dtype, nothing))
        return torch.where(mask, h * self.table[idx], torch.zeros(())).sum()


def mean_output(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.mean()


def sum_output(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.sum()


def grad(engine: nn.Module) -> dict[str, Any]:
    return {name: p.grad.tolist() for name, p in engine.named_parameters() if p.grad is not None}
