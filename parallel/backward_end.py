"""Do something when backward has ended, the outermost one where they are nested.

A re-entrant checkpoint runs a backward within the backward. What autograd is asked to call at the
end is called at the end of the inner one, then, where the gradients are not complete yet.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from functools import cache, partial
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
        if torch._C._current_autograd_node() is None:
            raise RuntimeError(
                "backward runs in compiled autograd, which calls nothing at its end, where "
                "gradients are reduced: call loss.backward() outside of what torch.compile has "
                "compiled, or leave torch._dynamo.config.compiled_autograd off"
            )
        self._beside: set[int] = set()
        # Autograd alone holds what it is to call: a backward that has failed has let go of it.
        call = _Call(function)
        self._call = weakref.ref(call)
        call.queue()

    @property
    def waits(self) -> bool:
        """Tell whether the function is still to be called."""
        call = self._call()
        return call is not None and not call.done

    def reach(self) -> bool:
        """Return whether the running backward may be nested.

        True also if another backward is running; if that one proves to be in another thread,
        RuntimeError is raised at its end.
        """
        call, running = self._call(), torch._C._current_graph_task_id()
        if call is not None and call.task == running:
            return call.nested
        if running not in self._beside:
            self._beside.add(running)
            _at_end(partial(self._refuse_beside, running))
        return True

    def _refuse_beside(self, ended: int) -> None:
        call = self._call()
        if torch._C._current_autograd_node() is None and (call is None or call.task != ended):
            raise RuntimeError(
                "two backwards through one wrapper, or through wrappers that share parameters, ran "
                "at once, in two threads: what was reduced may be part of both. Let one end before "
                "the next begins, or give each thread a model and a wrapper of its own"
            )

    def is_with(self, other: BackwardEnd) -> bool:
        """Tell whether this and another are called at the end of one backward.

        Other threads of this process may have backwards of their own under way.
        """
        own, its = self._call(), other._call()
        return own is not None and its is not None and own.task == its.task

    def cancel(self) -> None:
        """Call nothing."""
        call = self._call()
        if call is not None:
            call.done = True


class _Call:
    """What autograd calls at the end of a backward.

    task: that backward, as far as it is known.
    nested: whether a backward has ended within it.
    """

    def __init__(self, function: Callable[[], None]) -> None:
        self.done = self.nested = False
        self.task = -1
        self._function = function

    def queue(self) -> None:
        """Be called at the end of the backward that runs now."""
        self.task = torch._C._current_graph_task_id()
        _at_end(self)

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
        self.nested = True
        handles: list[RemovableHandle] = []

        def queue(_: object) -> None:
            while handles:
                handles.pop().remove()
            if not self.done:
                self.queue()

        for following, _ in node.next_functions:
            if following is not None:
                handles.append(following.register_prehook(queue))
        return bool(handles)


def _at_end(function: Callable[[], None]) -> None:
    # Where backward is called in a compiled function, what it calls would be compiled as well.
    torch.autograd.Variable._execution_engine.queue_callback(partial(_uncompiled(), function))


@cache
def _uncompiled() -> Callable[[Callable[[], None]], None]:
    return torch.compiler.disable(lambda function: function())  # type: ignore[no-untyped-call, no-any-return]
