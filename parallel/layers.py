"""The layers of a split model: their names, their stages, and the part that one rank holds."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..comm.arguments import require

__all__ = ["MODULE_HOOKS", "Named", "RankLayers", "named_layers"]

Named = list[tuple[str, nn.Module]]


def named_layers(layers: nn.Sequential | nn.ModuleList | Sequence[nn.Module]) -> Named:
    """Return layers with the names that they have in the unsplit model.

    A list counts as `nn.Sequential(*layers)`. TypeError names a member that is no module, and what
    a container does by itself, which no stage would.
    """
    if isinstance(layers, nn.Sequential | nn.ModuleList):
        _refuse_own(layers)
    if isinstance(layers, nn.Sequential):
        # named_children would leave out a module that occurs twice.
        return [(name, layer) for name, layer in layers._modules.items() if layer is not None]
    if isinstance(layers, nn.Module) and not isinstance(layers, nn.ModuleList):
        raise TypeError(
            f"expected an nn.Sequential or a list of layers, got a {type(layers).__name__}"
        )
    require("layers", layers, Iterable, "an nn.Sequential")
    named = [(str(index), layer) for index, layer in enumerate(layers)]
    for name, layer in named:
        if not isinstance(layer, nn.Module):
            raise TypeError(f"layer {name}: expected an nn.Module, got a {type(layer).__name__}")
    return named


def _refuse_own(layers: nn.Module) -> None:
    """Raise TypeError for a container that is more than its layers, one after the other."""
    kind = type(layers)
    own = [
        *(["its own forward"] if kind.forward not in _PLAIN else []),
        *(f"parameter {name}" for name, value in layers._parameters.items() if value is not None),
        *(f"buffer {name}" for name, value in layers._buffers.items() if value is not None),
        *(["hooks"] if any(getattr(layers, name) for name in MODULE_HOOKS) else []),
    ]
    if own:
        raise TypeError(
            f"the {kind.__name__} of layers has {', '.join(own)}, which would be lost when its "
            "layers are split: put that into a layer"
        )


_PLAIN = (nn.Sequential.forward, nn.ModuleList.forward)
MODULE_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
"""Where a module keeps what it calls beside its forward, and beside its backward."""


class RankLayers:
    """Hold one rank's stages, under the names of the unsplit model.

    stages: the layers of every stage; stage s is on rank s modulo num_ranks.

    Attributes:
        module: all layers of this rank.  stages: those of each of its stages, by number.
    """

    def __init__(self, named: Named, stages: Sequence[range], rank: int, num_ranks: int) -> None:
        own = range(rank, len(stages), num_ranks)
        self.stages = {
            stage: nn.Sequential(OrderedDict(named[i] for i in stages[stage])) for stage in own
        }
        members = [i for stage in own for i in stages[stage]]
        self.module = nn.Sequential(OrderedDict(named[i] for i in members))
        self._elsewhere = {
            f"{name}.{key}"
            for i, (name, layer) in enumerate(named)
            if i not in members
            for key in layer.state_dict()
        }
        self._placeholder = nn.Parameter(torch.empty(0, device="cpu"))

    def tensors(self) -> list[Tensor]:
        """Return all parameters and buffers."""
        return [*self.module.parameters(), *self.module.buffers()]

    def elsewhere(self, named: Named) -> dict[nn.Parameter, str]:
        """Return the parameters of all layers that this rank does not hold, with their names."""
        own = set(self.module.parameters())
        return {
            parameter: f"{name}.{path}"
            for name, layer in named
            for path, parameter in layer.named_parameters()
            if parameter not in own
        }

    def or_placeholder(self, parameters: list[nn.Parameter]) -> Iterator[nn.Parameter]:
        """Yield the parameters; if there is none to train, one of no elements, in no state, too."""
        yield from parameters
        if not any(parameter.requires_grad for parameter in parameters):
            yield self._placeholder

    def load(self, state: Mapping[str, Any]) -> None:
        """Load this rank's part; ValueError for a name that is in no stage."""
        own = {name: value for name, value in state.items() if name not in self._elsewhere}
        unknown = sorted(own.keys() - self.module.state_dict().keys())
        if unknown:
            raise ValueError(f"names that are in no stage of this model: {', '.join(unknown)}")
        self.module.load_state_dict(own)
