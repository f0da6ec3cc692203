"""Tell when backward has accumulated a parameter's gradient, and its owner's hooks are through.

A hook of the parameter, not of the node that accumulates: a parameter gets another node when its
data changes dtype or device, and a hook on the old one would be silent.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["ReadyHook", "comes_last", "hang", "hang_again"]


@dataclass(frozen=True)
class ReadyHook:
    """What is hung on a parameter."""

    on_ready: Callable[[int], None]
    index: int

    def __call__(self, parameter: Tensor) -> None:
        self.on_ready(self.index)


def hang(parameter: Tensor, on_ready: Callable[[int], None], index: int) -> RemovableHandle:
    """Call on_ready(index) whenever backward has accumulated the parameter's gradient."""
    handle: RemovableHandle = parameter.register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
        ReadyHook(on_ready, index)
    )
    return handle


def hang_again(parameter: Tensor) -> None:
    """Let the hooks of a parameter be called for its new tensor, where torch has swapped it."""
    parameter._post_accumulate_grad_hooks = parameter._post_accumulate_grad_hooks


def comes_last(parameter: Tensor, handle: RemovableHandle) -> bool:
    """Tell, from within this hook, whether all that still run on the gradient are ready hooks.

    Hooks run in the order of registration, by a list that is made before the first runs. If others
    were registered later, this one is moved behind them: from the next backward on it comes last.
    """
    hooks: dict[int, object] = parameter._post_accumulate_grad_hooks
    for key in reversed(hooks):
        if key == handle.id:
            return True
        if not isinstance(hooks[key], ReadyHook):
            break
    hooks[handle.id] = hooks.pop(handle.id)
    return False
