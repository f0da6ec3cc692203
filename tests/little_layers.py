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


def mean_output(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.mean()


def sum_output(output: torch.Tensor, _: Any) -> torch.Tensor:
    return output.sum()


def grad(engine: nn.Module) -> dict[str, Any]:
    return {name: p.grad.tolist() for name, p in engine.named_parameters() if p.grad is not None}
