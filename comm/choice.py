"""Which schedule a call runs, lowered for this rank, and why."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from .algorithms import build
from .dtypes import DType
from .errors import ScheduleError
from .program import Part, Program, lower, part_of
from .schedule import Schedule, require_hashable
from .select import choose
from .topology import Nodes
from .tune import Tuning
from .verify import Proof, verify

_ROWS = 1 << 16
"""Ranks whose rows are kept, over all programs of a group: a program has some for each."""


@dataclass(frozen=True)
class Chosen:
    """A schedule lowered for this rank, and why it was taken.

    digest: of a schedule that the caller has passed, as it has no name of its own.
    """

    schedule: Schedule
    program: Program
    algorithm: str
    reason: str
    raw_reduce: bool
    digest: str = ""

    @property
    def way(self) -> str:
        """Return the name that ranks compare."""
        return f"{self.algorithm} {self.digest}" if self.digest else self.algorithm


class Choice:
    """Choose for one rank of one group."""

    def __init__(self, rank: int, size: int) -> None:
        self._rank, self._size = rank, size
        self._nodes: Nodes | None = None
        self._tuning: Tuning | None = None
        self._named = lru_cache(maxsize=256)(self._evaluate_named)
        few = max(8, min(256, _ROWS // size))
        self._lowered = lru_cache(maxsize=few)(self._lower_named)
        self._proven = lru_cache(maxsize=64)(self._prove)

    @property
    def spans_nodes(self) -> bool:
        """Tell whether messages of the group go from node to node."""
        return self._nodes is not None

    def place(self, nodes: Nodes) -> None:
        """From now on, choose and build with this knowledge of who shares a node."""
        self._nodes = nodes
        self._named.cache_clear()
        self._lowered.cache_clear()

    def tune(self, tuning: Tuning | None) -> None:
        """From now on, choose by what was measured on this machine."""
        self._tuning = tuning

    def choose(
        self, name: str, count: int, dtype: DType, algorithm: str | Schedule | None, root: int
    ) -> Chosen:
        if isinstance(algorithm, Schedule):
            return self._lower_given(name, count, algorithm, root)
        if algorithm is not None and not isinstance(algorithm, str):
            raise TypeError(
                f"algorithm: expected a name, a Schedule or None, got {type(algorithm).__name__}"
            )
        reason = "named by the caller"
        if algorithm is None:
            nbytes = count * dtype.itemsize
            algorithm, reason = choose(name, nbytes, dtype, self._nodes, self._size, self._tuning)
        schedule, program = self._lowered(name, algorithm, root, count)
        # The pairwise builders' promise, which a test proves for every size.
        return Chosen(schedule, program, algorithm, reason, algorithm == "pairwise")

    def _evaluate_named(self, name: str, algorithm: str, root: int) -> Part:
        return part_of(build(name, algorithm, self._size, root, self._nodes), self._rank)

    def _lower_named(
        self, name: str, algorithm: str, root: int, count: int
    ) -> tuple[Schedule, Program]:
        part = self._named(name, algorithm, root)
        return part.schedule, lower(part, count)

    def _prove(self, schedule: Schedule) -> tuple[Proof, Part]:
        return verify(schedule), part_of(schedule, self._rank)

    def _lower_given(self, name: str, count: int, schedule: Schedule, root: int) -> Chosen:
        for what, given, needed in (
            ("collective", schedule.collective.name, name),
            ("size", schedule.size, self._size),
            ("root", schedule.root, root),
        ):
            if given != needed:
                raise ScheduleError(f"the schedule's {what} is {given}, this call's is {needed}")
        try:
            proof, part = self._proven(schedule)
        except TypeError:
            require_hashable(schedule)
            raise
        program = lower(part, count)
        reason = "passed by the caller"
        return Chosen(schedule, program, "schedule", reason, proof.raw_reduce, proof.digest)
