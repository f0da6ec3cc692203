"""Layers small enough that a test can say what comes out."""

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
