"""Refuse what would lose a gradient of a shared weight, of which each layer has one of its own.

A forward or a hook that closes over its layer, or has a weak reference to it, computes with the
layer that was given, although a copy has taken its place. A layer that is kept where torch does not
look, such as in a list, may be on another rank: nobody takes the gradient that its weight gets
here. A hook on the gradient of one use would see only a part of what it sees in the unsplit model.
"""

from __future__ import annotations

import weakref
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .ready_hook import ReadyHook

if TYPE_CHECKING:
    from .layers import Named
    from .ties import Tie

__all__ = ["SharedWeights", "names_of", "refuse_gradient_hooks", "refuse_two_values"]

_KINDS = {
    "_backward_hooks": "register_hook",
    "_post_accumulate_grad_hooks": "register_post_accumulate_grad_hook",
}


def refuse_gradient_hooks(named: Named) -> None:
    """Raise ValueError for a parameter in several layers that has a hook on its gradient."""
    met: dict[nn.Parameter, str] = {}
    for name, layer in named:
        for path, parameter in layer.named_parameters():
            first = met.setdefault(parameter, f"{name}.{path}")
            if first != f"{name}.{path}":
                _refuse_hooks(parameter, first)


def _refuse_hooks(parameter: nn.Parameter, name: str) -> None:
    for kind, method in _KINDS.items():
        hooks = getattr(parameter, kind) or {}
        if any(not isinstance(hook, ReadyHook) for hook in hooks.values()):
            raise ValueError(
                f"{name} is in several layers, and has a hook on its gradient ({method}), which "
                "would see the gradient of one of its uses: change the gradient after step, or "
                "keep the parameter in one layer"
            )


def names_of(ties: Iterable[Tie], named: Named) -> list[list[str]]:
    """Return all names of every shared parameter in the unsplit model."""
    return [
        [
            f"{named[layer][0]}.{path}"
            for layer, use in zip(tie.layers, tie.uses, strict=True)
            for path, parameter in named[layer][1].named_parameters(remove_duplicate=False)
            if parameter is use
        ]
        for tie in ties
    ]


def refuse_two_values(names: Iterable[Sequence[str]], state: Mapping[str, Any]) -> None:
    """Raise ValueError if a state has different values for one shared parameter.

    Each rank would load the value of its own layers, and the copies would differ from then on.
    """
    for alike in names:
        first, *others = [name for name in alike if name in state] or [""]
        for other in others:
            if not _same(state[first], state[other]):
                raise ValueError(
                    f"{first} and {other} are one weight, which layers share, but the state has "
                    "another value for each: is it of a model that does not share it?"
                )


def _same(left: Tensor, right: Tensor) -> bool:
    if left is right or left.shape != right.shape:
        return left is right
    return torch.equal(left.detach().cpu(), right.detach().cpu().to(left.dtype))


class SharedWeights:
    """Watch the backwards of one stage.

    ties: the shared weights of all layers.  own: the stage's parameters.  elsewhere: those of other
    ranks, by name.
    """

    def __init__(
        self,
        ties: Iterable[Tie],
        own: Collection[nn.Parameter],
        elsewhere: Mapping[nn.Parameter, str],
    ) -> None:
        here = [tie for tie in ties if not set(own).isdisjoint(tie.uses)]
        self._uses = {use: tie.name for tie in here for use in tie.uses if use in own}
        self._originals: Mapping[nn.Parameter, str] = {
            tie.uses[0]: tie.name for tie in here if tie.uses[0] not in own
        }
        # Weakly, so that a rank does not keep the layers of others when the caller lets go of them.
        self._elsewhere = {weakref.ref(parameter): name for parameter, name in elsewhere.items()}

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Raise ValueError or RuntimeError where what runs within loses a gradient."""
        for use, name in self._uses.items():
            _refuse_hooks(use, name)
        strange = {p: name for ref, name in self._elsewhere.items() if (p := ref()) is not None}
        watched = {**strange, **self._originals}
        before = {p: p.grad for p in watched if p.grad is not None}
        for parameter in before:
            parameter.grad = None
        try:
            yield
            lost = [parameter for parameter in watched if parameter.grad is not None]
        finally:
            for parameter in watched:
                parameter.grad = before.get(parameter)
        if lost:
            raise RuntimeError(self._loss_of(lost[0], watched[lost[0]]))

    def _loss_of(self, parameter: nn.Parameter, name: str) -> str:
        if parameter in self._originals:
            return (
                f"{name} is in several layers, of which all but the first are copied, but "
                "something in this stage has computed with the original, whose gradient nobody "
                "adds: a forward or a hook that closes over a layer, or a weak reference to one; "
                "take the layer from self, or from what a hook is given"
            )
        return (
            f"{name} is of a stage on another rank, but something in this stage has computed with "
            "it, and nobody adds its gradient: a layer that has it in a list, or a loss or a hook "
            "that closes over it; let a layer have it as a parameter of its own, or its layer as a "
            "module, and it is shared"
        )
