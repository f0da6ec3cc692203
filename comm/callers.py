"""The threads of a rank that have called anything, as long as they live."""

from __future__ import annotations

import threading
import weakref


class _Mark:
    """Of one thread, which alone keeps it alive; a thread's number is given to a later one."""


class Callers:
    """Those threads."""

    def __init__(self) -> None:
        self._own = threading.local()
        self._marks: list[weakref.ref[_Mark]] = []

    def note(self) -> None:
        """Count the current thread among them; under a lock."""
        try:
            self._own.mark  # noqa: B018 (quicker than to ask whether it is there)
        except AttributeError:
            mark = self._own.mark = _Mark()
            self._marks = [known for known in self._marks if known()] + [weakref.ref(mark)]

    def alone(self) -> bool:
        """Tell whether no thread but the current one is among them; needs no lock."""
        own = getattr(self._own, "mark", None)
        return all(known() in (None, own) for known in self._marks)
