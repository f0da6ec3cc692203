"""Do something when backward has ended, the outermost one where they are nested.

A re-entrant checkpoint runs a backward within the backward. What autograd is asked to call at the
end is called at the end of the inner one, then, where the gradients are not complete yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch.utils.hooks import RemovableHandle

__all__ = ["BackwardEnd"]


class BackwardEnd:
    """Call a function once the backward that runs now, and all around it, have ended.

    A backward that fails calls nothing.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        """function: called if this `waits` then, on the thread that ends the backward."""
        self._task = torch._C._current_graph_task_id()
        self._nested = False
        # Autograd alone holds what it is to call: a backward that has failed has let go of it.
        call = _Call(function, self._go_on)
        self._call = weakref.ref(call)
        _queue(call)

    @property
    def waits(self) -> bool:
        """Tell whether the function is still to be called."""
        call = self._call()
        return call is not None and not call.done

    @property
    def nested(self) -> bool:
        """Tell whether there has been a backward within the backward, as far as is known here."""
        return self._nested or torch._C._current_graph_task_id() != self._task

    def cancel(self) -> None:
        """Call nothing."""
        call = self._call()
        if call is not None:
            call.done = True

    def _go_on(self) -> None:
        self._nested = True


class _Call:
    """What autograd calls at the end of a backward."""

    def __init__(self, function: Callable[[], None], go_on: Callable[[], None]) -> None:
        self.done = False
        self._function = function
        self._go_on = go_on

    def __call__(self) -> None:
        if self.done:
            return
        around = torch._C._current_autograd_node()
        if around is None or not self._wait_for_what_follows(around):
            self.done = True
            self._function()

    def _wait_for_what_follows(self, node: torch.autograd.graph.Node) -> bool:
        """Be called again at the end of the backward that runs a node.

        It can be asked for that only from within what it runs next.
        """
        self._go_on()
        handles: list[RemovableHandle] = []

        def queue(_: object) -> None:
            while handles:
                handles.pop().remove()
            if not self.done:
                _queue(self)

        for following, _ in node.next_functions:
            if following is not None:
                handles.append(following.register_prehook(queue))
        return bool(handles)


def _queue(call: Callable[[], None]) -> None:
    torch.autograd.Variable._execution_engine.queue_callback(call)
