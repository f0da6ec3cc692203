"""A ShardedOptimizer in a checkpoint."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .kinds import kind_of
from .optimizer_part import Member, OptimizerPart

if TYPE_CHECKING:
    from torch import Tensor

    from ..sharded_optimizer import ShardedOptimizer

__all__ = ["ShardedPart"]


class ShardedPart(OptimizerPart):
    """A ShardedOptimizer: kept as the whole optimizer would be, so that either goes on from it."""

    optimizer: ShardedOptimizer

    def _kind(self) -> dict[str, Any]:
        return kind_of(self.optimizer, self.optimizer.kind)

    @property
    def foreign(self) -> bool:
        """Never: `held` would gather the whole state on every rank."""
        return False

    def _state_dict(self) -> dict[str, Any]:
        return self.optimizer.state_dict()

    def _frame(self) -> dict[str, Any]:
        groups = zip(self.optimizer.param_groups, self.optimizer.names, strict=True)
        return {"state": {}, "param_groups": [{**g, "params": list(names)} for g, names in groups]}

    def _groups(self) -> list[list[Member]]:
        return [
            [
                ((self.names.saved(parameter, name), *self.names.of(parameter), name), parameter)
                for name, parameter in zip(names, group["params"], strict=True)
            ]
            for group, names in zip(self.optimizer.param_groups, self.optimizer.names, strict=True)
        ]

    def _place(self, entry: dict[str, Any], parameter: Tensor, on_device: bool) -> dict[str, Any]:
        return entry  # the optimizer takes its part, and places that
