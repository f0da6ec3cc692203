"""Context managers that all ranks leave together, where the body of the `with` has ended well."""

from __future__ import annotations

from types import TracebackType
from typing import Self

__all__ = ["Scope"]


class Scope:
    """Call `_leave` at the end of a `with`, with the exception that ended the body, or None.

    Leaving is mostly collective: a rank whose body has failed must not wait there for the others.
    """

    def _leave(self, error: BaseException | None) -> None:
        raise NotImplementedError

    def require_open(self) -> None:
        """Raise CommError where it is closed, as what begins with it would do; for this package."""

    def __enter__(self) -> Self:
        self.require_open()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave(error)
