"""Weights that several layers share, on whichever stages those are.

Every layer that shares a tensor with one before it gets a parameter of its own over the same
memory, a *use*. So each use has a gradient of its own, whether its layer is on the stage, or the
rank, of the others or not, and after the reduction over replicas the uses' gradients are added in
the order of the layers. That order is the same for every split, and so is every bit of the sum.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .gradient_dtype import gradient_dtype, new_gradient, take_gradient_dtype
from .layer_copy import LayerCopier
from .layers import Named
from .sparse import as_dense
from .tensors import real_view

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Tie", "TiedGradients", "move", "untie"]


@dataclass(frozen=True)
class Tie:
    """One shared parameter: its name, and for each layer that uses it, in order, its own part.

    name: the first of its full names in the unsplit model.
    """

    name: str
    layers: tuple[int, ...]
    uses: tuple[nn.Parameter, ...]


def untie(named: Named) -> tuple[Named, list[Tie]]:
    """Let layers share no parameter and no module, and return what parameters they shared.

    The layers given stay as they are: one that shares something with a layer before it is copied,
    as far as need be, and has parameters of its own over the shared memory. Buffers stay shared.
    """
    holders: dict[nn.Parameter, tuple[str, list[int], list[nn.Parameter]]] = {}
    made: Named = []
    met: set[nn.Module] = set()
    copier = LayerCopier(layer for _, layer in named)
    for place, (name, layer) in enumerate(named):
        modules = set(layer.modules())
        own: dict[nn.Parameter, nn.Parameter] = {}
        for path, parameter in layer.named_parameters():
            if parameter in holders:
                own[parameter] = _use_of(parameter)
            else:
                holders[parameter] = f"{name}.{path}", [], []
            _, layers, uses = holders[parameter]
            layers.append(place)
            uses.append(own.get(parameter, parameter))
        if own or not met.isdisjoint(modules):
            layer = copier.copy(name, layer, met, own)
        met |= modules
        made.append((name, layer))
    return made, [
        Tie(name, tuple(layers), tuple(uses))
        for name, layers, uses in holders.values()
        if len(uses) > 1
    ]


def move(named: Named, held: Collection[int], to: torch.device | torch.dtype) -> None:
    """Move the layers in `held`, so that one tensor of several layers is still one in all of them.

    Done before `untie`: moving gives every parameter memory of its own, and a buffer that two
    modules have becomes two.
    """
    modules = dict.fromkeys(module for _, layer in named for module in layer.modules())
    before = [
        (module, table, name, tensor)
        for module in modules
        for table in (module._parameters, module._buffers)
        for name, tensor in table.items()
        if tensor is not None
    ]
    for place in held:
        named[place][1].to(to)
    moved: dict[Tensor, Tensor] = {}
    for _, table, name, tensor in before:
        after = table[name]
        if after is not None and after is not tensor:
            moved.setdefault(tensor, after)
    for module, table, name, tensor in before:
        if tensor in moved and table[name] is not moved[tensor]:
            setattr(module, name, moved[tensor])


class TiedGradients:
    """Keep shared parameters equal on all ranks of `pipe` that hold them.

    ranks: the rank of every layer. Per step: `begin`, and `finish` once the gradients of each use
    have been reduced over replicas: then the first use on a rank has the sum of all. Before an
    evaluation: `follow`. Collective over `pipe`, all but `begin` and `follow`.
    """

    def __init__(self, ties: Sequence[Tie], ranks: Sequence[int], pipe: Communicator) -> None:
        self._channels: dict[tuple[int, ...], Communicator | None] = {}
        self._shared: list[_Shared] = []
        self.names: dict[nn.Parameter, str] = {}
        self.counted_elsewhere: set[nn.Parameter] = set()
        for tie in ties:
            users = [ranks[layer] for layer in tie.layers]
            holders = tuple(sorted(set(users)))
            if len(holders) > 1 and holders not in self._channels:
                color = 0 if pipe.rank in holders else None
                self._channels[holders] = pipe.split(color, key=pipe.rank)
            own = tuple(u for u, r in zip(tie.uses, users, strict=True) if r == pipe.rank)
            if not own:
                continue
            places = tuple(holders.index(rank) for rank in users)
            self._shared.append(_Shared(own, places, self._channels.get(holders)))
            self.names[own[0]] = tie.name
            if users[0] != pipe.rank:
                self.counted_elsewhere.add(own[0])
        self.others = {use for shared in self._shared for use in shared.uses[1:]}
        self._before: list[Tensor | None] = []

    def equalize(self) -> None:
        """Let the first holder's value count for all."""
        for shared in self._shared:
            if shared.channel is not None:
                flat = shared.uses[0].detach().contiguous()
                shared.channel.broadcast(flat, root=shared.places[0])
                with torch.no_grad():
                    shared.uses[0].copy_(flat)

    def follow(self) -> None:
        """Let all uses have the memory of the first one, which alone is known outside.

        Whoever writes to its `data`, or moves it, gives it other memory. Not collective.
        """
        for shared in self._shared:
            data = shared.uses[0].data
            for use in shared.uses[1:]:
                use.data = data

    def begin(self) -> None:
        """Set aside the gradients that are there; `finish` adds to them, as backward does.

        Uses have the values of the first one, and are frozen as it is.
        """
        self.follow()
        self._before = [shared.uses[0].grad for shared in self._shared]
        for shared in self._shared:
            for use in shared.uses:
                use.grad = None
                use.requires_grad_(shared.uses[0].requires_grad)

    def finish(self) -> None:
        """Add the uses' gradients in the order of the layers, the same on every holder."""
        for shared, before in zip(self._shared, self._before, strict=True):
            total: Tensor | None = None
            for gradient in shared.gradients():
                if gradient is not None and total is None:
                    total = new_gradient(shared.uses[0]).copy_(gradient)
                elif gradient is not None and total is not None:
                    total.add_(gradient)
            for use in shared.uses:
                use.grad = None
            shared.uses[0].grad = _sum(before, total)

    def close(self) -> None:
        """Give the channels back."""
        for channel in self._channels.values():
            if channel is not None:
                channel.close()


@dataclass(frozen=True)
class _Shared:
    """The uses of one parameter on this rank, and for all uses the holder, as a rank of channel."""

    uses: tuple[nn.Parameter, ...]
    places: tuple[int, ...]
    channel: Communicator | None

    def gradients(self) -> list[Tensor | None]:
        """Return the gradients of all uses, those on other ranks too, in the order of layers."""
        own = [None if u.grad is None else as_dense(u.grad.detach()) for u in self.uses]
        if self.channel is None:
            return own
        like = real_view(self.uses[0].detach())
        dtype = gradient_dtype(self.uses[0]).to_real()
        width = max(map(self.places.count, self.places))
        rows = torch.zeros(width, like.numel() + 1, dtype=dtype, device=like.device)
        for row, gradient in zip(rows, own, strict=False):
            if gradient is not None:
                row[:-1] = real_view(gradient).reshape(-1)
                row[-1] = 1.0
        table: Tensor = self.channel.allgather(rows)
        found: list[Tensor | None] = []
        used = dict.fromkeys(self.places, 0)
        for place in self.places:
            row = table[place][used[place]]
            used[place] += 1
            found.append(self._shaped(row[:-1].view(like.shape)) if row[-1] else None)
        return found

    def _shaped(self, real: Tensor) -> Tensor:
        # In memory of its own: behind an odd number of elements no complex one may begin.
        return torch.view_as_complex(real.clone()) if self.uses[0].is_complex() else real


def _use_of(parameter: nn.Parameter) -> nn.Parameter:
    """Return another parameter over the same memory, with the attributes that users gave it."""
    use = nn.Parameter(parameter.detach(), requires_grad=parameter.requires_grad)
    use.__dict__.update(parameter.__dict__)
    take_gradient_dtype(use, parameter)
    return use


def _sum(before: Tensor | None, total: Tensor | None) -> Tensor | None:
    if before is None or total is None:
        return total if before is None else before
    return before.add_(total)
