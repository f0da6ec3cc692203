"""Find what makes the schedules that the command line judges: a user's function, or a built-in."""

from __future__ import annotations

import importlib.util
import inspect
import os.path
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from .comm.algorithms import BUILDERS, build
from .comm.collective import COLLECTIVES
from .comm.errors import ScheduleError
from .comm.schedule import Schedule
from .comm.topology import Nodes

ALL_ROOTS = 64
"""Groups of up to so many ranks are judged for every root, larger ones for as many of them."""


class Misuse(Exception):
    """The command cannot be carried out as it was given."""


@dataclass(frozen=True)
class Builder:
    """What makes schedules.

    make: of (size, root).  roots: whether it makes another one for each root.
    own: whether it is a user's, whose schedules nobody has proven.
    """

    make: Callable[[int, int], Schedule]
    roots: bool
    own: bool = False

    def roots_of(self, size: int) -> list[int]:
        """Return the roots to judge: the first, the last and others between them."""
        count = min(size, ALL_ROOTS) if self.roots else 1
        return sorted({at * (size - 1) // max(count - 1, 1) for at in range(count)})


def find_builder(name: str, nodes: Nodes | None = None) -> Builder:
    """Return what FILE.py:FUNCTION or COLLECTIVE:NAME means, or raise Misuse.

    nodes: for those that depend on them; neighbours in pairs where None.
    """
    left, colon, right = name.rpartition(":")
    if not colon or not left or not right:
        raise Misuse(f"expected FILE.py:FUNCTION or COLLECTIVE:NAME, got {name!r}")
    if left not in COLLECTIVES:
        path = Path(left)
        return _own(name, path, _load(path, right), nodes)
    if (left, right) not in BUILDERS:
        build(left, right, 1)  # raises, listing the names there are

    def make(size: int, root: int) -> Schedule:
        return build(left, right, size, root, nodes)

    return Builder(make, COLLECTIVES[left].rooted)


def _own(name: str, path: Path, function: Callable[..., object], nodes: Nodes | None) -> Builder:
    taken = _parameters(function) & {"root", "nodes"}

    def make(size: int, root: int) -> Schedule:
        known = {"root": root, "nodes": nodes or Nodes.blocks(size, 2)}
        given = {what: value for what, value in known.items() if what in taken}
        called = f"{name}({', '.join([str(size), *(f'{k}={v}' for k, v in given.items())])})"
        try:
            schedule = function(size, **given)
        except ScheduleError:
            raise
        except (Exception, SystemExit) as error:
            raise ScheduleError(f"{called} raised {_told(error, path)}") from error
        if not isinstance(schedule, Schedule):
            raise Misuse(f"{called} returned {type(schedule).__name__}, expected a Schedule")
        if schedule.size != size:
            raise ScheduleError(f"{called} returned a schedule for {schedule.size} ranks")
        if schedule.collective.rooted and schedule.root != root:
            raise ScheduleError(f"{called} returned a schedule for root {schedule.root}")
        return schedule

    return Builder(make, "root" in taken, own=True)


def _parameters(function: Callable[..., object]) -> set[str]:
    try:
        return set(inspect.signature(function).parameters)
    except (TypeError, ValueError):  # of what is not written in Python
        return set()


def _told(error: BaseException, path: Path) -> str:
    """Return an error as text, with the innermost line in the file at path or one beside it."""
    places = [
        (Path(frame.filename), frame.lineno) for frame in traceback.extract_tb(error.__traceback__)
    ]
    if isinstance(error, SyntaxError) and error.filename:  # a line that was not run
        places.append((Path(error.filename), error.lineno))
    own = [f"{at.name}:{line}" for at, line in places if at.parent == path.absolute().parent]
    what = error.msg if isinstance(error, SyntaxError) else error
    return f"{type(error).__name__}: {what}".removesuffix(": ") + f", at {(own or [path.name])[-1]}"


def _load(path: Path, function: str) -> Callable[..., object]:
    if not os.path.isfile(path):  # False, too, where a name is too long
        raise Misuse(f"no file {path}, and no collective of that name")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    if spec is None or spec.loader is None:
        raise Misuse(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name while they are made, and what the file imports may
    # lie beside it, as for a script.
    sys.modules[path.stem] = module
    sys.path.insert(0, str(path.absolute().parent))
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise Misuse(f"{path} cannot be imported: {_told(error, path)}") from error
    found = getattr(module, function, None)
    if not callable(found):
        raise Misuse(f"{path} has no function {function!r}")
    result: Callable[..., object] = found
    return result
