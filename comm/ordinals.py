"""Count messages by their tags, of which a program may use a new one for every message."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Words: TypeAlias = npt.NDArray[np.int64]

_RECENT = 1024
"""So many tags are counted one by one, before runs are made of them."""

_SHARE = 4
"""And this part of the number of runs, so that making them anew costs a few us for a new tag."""


class Ordinals:
    """How many messages of each tag there have been, from one rank to another.

    Neighbouring tags of which there were equally many are kept as one run, as those of a program
    that numbers its steps; a run takes 24 bytes.
    """

    def __init__(self) -> None:
        self._recent: dict[int, int] = {}
        self._starts, self._stops, self._counts = np.zeros((3, 0), np.int64)

    def next(self, tag: int) -> int:
        """Return the ordinal of the next message with a tag, from 1."""
        recent = self._recent
        count = recent.get(tag)
        if count is None:
            if len(recent) >= max(_RECENT, len(self._starts) // _SHARE):
                self._settle()
            count = int(self._settled(np.array([tag]))[0])
        recent[tag] = count = count + 1
        return count

    def take_back(self, tag: int, ordinal: int) -> bool:
        """Count a message no more; tell whether it was the last of its tag, as it has to be."""
        count = self._recent.get(tag)
        if count is None:
            count = int(self._settled(np.array([tag]))[0])
        if count == ordinal:
            self._recent[tag] = ordinal - 1
        return count <= ordinal

    def _settled(self, tags: Words) -> Words:
        """Return the counts in the runs."""
        counts = np.zeros(len(tags), np.int64)
        if len(self._starts):
            run = np.searchsorted(self._starts, tags, "right") - 1
            inside = (run >= 0) & (tags < self._stops[run])
            counts[inside] = self._counts[run[inside]]
        return counts

    def _settle(self) -> None:
        """Put the recent tags among the runs."""
        tags = np.array(sorted(self._recent), np.int64)
        bounds = np.unique(np.concatenate([self._starts, self._stops, tags, tags + 1]))
        counts = self._settled(bounds)
        counts[np.searchsorted(bounds, tags)] = [self._recent[tag] for tag in tags.tolist()]
        # Behind the last bound there is nothing; a run goes on to where the count changes.
        changes = np.flatnonzero(np.diff(counts, prepend=0))
        starts = changes[counts[changes] > 0]
        ends = np.append(changes[1:], len(bounds) - 1)[counts[changes] > 0]
        self._starts, self._stops, self._counts = bounds[starts], bounds[ends], counts[starts]
        self._recent.clear()
