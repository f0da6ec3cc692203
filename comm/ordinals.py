"""Count messages by their tags, of which a program may use a new one for every message."""

from __future__ import annotations

from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from .buffer import address_of

Words: TypeAlias = npt.NDArray[np.int64]

_RECENT = 1024
"""So many tags are counted one by one, before runs are made of them."""

_SHARE = 4
"""And this part of the number of runs, so that making them anew costs a few us for a new tag."""

_FIRST = 8
"""Tags for which there is room at first."""


class Ordinals:
    """How many messages of each tag there have been, from one rank to another.

    Neighbouring tags of which there were equally many are kept as one run, as those of a program
    that numbers its steps; a run takes 24 bytes.
    """

    def __init__(self) -> None:
        self._places: dict[int, int] = {}  # of the recent tags, among the words of their counts
        self._make_room(np.zeros(_FIRST, np.int64))
        self._starts, self._stops, self._counts = np.zeros((3, 0), np.int64)

    def next(self, tag: int) -> int:
        """Return the ordinal of the next message with a tag, from 1."""
        place, recent = self._place(tag), self._recent
        recent[place] = count = recent[place] + 1
        return count

    def take_back(self, tag: int, ordinal: int) -> bool:
        """Uncount a message; return False where later ones with its tag were counted."""
        place, recent = self._place(tag), self._recent
        count = recent[place]
        if count == ordinal:
            recent[place] = ordinal - 1
        return count <= ordinal

    def at(self, tag: int) -> int:
        """Return the address of a tag's count, where compiled code may add to it; 0 if unknown.

        It holds until another tag is counted.
        """
        place = self._places.get(tag)
        return 0 if place is None else self._address + 8 * place

    def _place(self, tag: int) -> int:
        """Return where the count of a tag lies, from now on one of the recent."""
        place = self._places.get(tag)
        if place is not None:
            return place
        if len(self._places) >= max(_RECENT, len(self._starts) // _SHARE):
            self._settle()
        place = len(self._places)
        if place == len(self._recent):
            self._make_room(np.concatenate([self._words, np.zeros_like(self._words)]))
        self._recent[place] = int(self._settled(np.array([tag]))[0])
        self._places[tag] = place  # last, so that what a signal raises leaves none half counted
        return place

    def _make_room(self, words: Words) -> None:
        self._words, self._recent, self._address = words, words.data, address_of(words)

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
        tags = np.array(sorted(self._places), np.int64)
        bounds = np.unique(np.concatenate([self._starts, self._stops, tags, tags + 1]))
        counts = self._settled(bounds)
        places = [self._places[tag] for tag in tags.tolist()]
        counts[np.searchsorted(bounds, tags)] = self._words[places]
        # Behind the last bound there is nothing; a run goes on to where the count changes.
        changes = np.flatnonzero(np.diff(counts, prepend=0))
        starts = changes[counts[changes] > 0]
        ends = np.append(changes[1:], len(bounds) - 1)[counts[changes] > 0]
        self._starts, self._stops, self._counts = bounds[starts], bounds[ends], counts[starts]
        self._places.clear()
