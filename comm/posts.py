"""Messages between two ranks as a transport's requests, and what is left of those broken off."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from .errors import CommError
from .transport.base import Receiving, Request
from .work import Steps

Start = Callable[[int, int], Request]
"""(low, high) -> the request of these bytes."""


class Torn:
    """The (source, tag) pairs whose next message would not be the one that a receive means."""

    def __init__(self, rank: int) -> None:
        self._rank = rank
        self.known: set[tuple[int, int]] = set()

    def add(self, src: int, tag: int) -> None:
        """Refuse what would be received there from now on."""
        self.known.add((src, tag))

    def check(self, src: int, tag: int) -> None:
        """Raise CommError where an earlier receive was broken off."""
        if self.known and (src, tag) in self.known:
            raise CommError(
                f"rank {self._rank}: an earlier receive from rank {src} with tag {tag} was broken "
                "off when its message was coming, or others waited behind it: this one would get "
                "another message than is meant"
            )


class Posts:
    """The messages of one rank in one group, each as requests for its pieces.

    abandoned: what the transport may still read or write.
    """

    def __init__(self, rank: int) -> None:
        self.abandoned: list[object] = []
        self._torn = Torn(rank)
        self._last: dict[tuple[int, int], object] = {}  # receive in flight

    def send(self, start: Start, spans: Iterable[tuple[int, int]], keeps: object) -> Steps:
        """Send pieces, all at once: those of two messages with one tag must not interleave.

        keeps: what must stay alive until then.
        """
        pending: list[Request] = []
        try:
            for low, high in spans:
                pending.append(start(low, high))
            while pending := [request for request in pending if not request.done()]:
                yield pending
        except BaseException:
            self.abandoned.append((pending, keeps))
            raise

    def receive(
        self,
        start: Callable[[int, int], Receiving],
        spans: Iterable[tuple[int, int]],
        src: int,
        tag: int,
        keeps: object,
    ) -> Steps:
        """Receive pieces; if broken off, leave them to the next receive, or have that refused."""
        self._torn.check(src, tag)
        pending: list[Any] = []
        me, key, number = pending, (src, tag), 0
        self._last[key] = me
        try:
            for low, high in spans:
                number += 1
                pending.append(start(low, high))
            while pending := [request for request in pending if not request.done()]:
                yield pending
        except CommError:
            self.abandoned.append((pending, keeps))
            raise
        except BaseException:
            whole = self._last.get(key, me) is me and len(pending) == number
            if not whole or not all([request.cancel() for request in pending]):
                self._torn.add(src, tag)
                self.abandoned.append((pending, keeps))
            raise
        finally:
            if self._last.get(key) is me:
                del self._last[key]
