"""A folder of checkpoints: what is whole in it, how one more comes in, how old ones go.

A checkpoint is a folder SEQUENCE-step-STEP; the highest sequence number is the newest, whatever its
step. It comes into being by one rename, so there is never half of one under such a name.
"""

from __future__ import annotations

import errno
import operator
import re
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import Damaged
from .files import fsync_folder, write_text
from .manifest import KIND, Manifest, from_text, to_text
from .partial import PARTIAL, Partial, remove

__all__ = [
    "MANIFEST",
    "Place",
    "commit",
    "part_name",
    "places",
    "read_manifest",
    "thin_out",
    "wrong_step",
]

MANIFEST = "manifest.json"
_NAME = re.compile(r"(\d{6,})-step-(\d+)")
_LOOKS = 10
"""Listings at most, until two are the same."""


@dataclass(frozen=True, order=True)
class Place:
    """One checkpoint's folder, known by its name alone."""

    sequence: int
    step: int
    path: Path


def wrong_step(step: Any) -> str:
    """Return why a folder cannot be named by such a step, or no text."""
    with suppress(TypeError):
        if not isinstance(step, bool) and operator.index(step) >= 0:
            return ""
    return f"expected a whole number from 0 on as a step, got {step!r}"


def places(root: Path) -> list[Place]:
    """Return all checkpoints in a folder, the newest first; none if there is no such folder.

    Of a folder that is a checkpoint, whatever its name, itself alone.
    """
    if not root.is_dir():
        return []
    found = _listed(root)
    for _ in range(_LOOKS):
        # Where another run renames meanwhile, one listing may have neither the old nor the new.
        before, found = found, _listed(root)
        if found == before:
            break
    return found or _itself(root)


def _listed(root: Path) -> list[Place]:
    matches = ((_NAME.fullmatch(path.name), path) for path in root.iterdir())
    found = [Place(int(m[1]), int(m[2]), path) for m, path in matches if m and path.is_dir()]
    return sorted(found, reverse=True)


def _itself(root: Path) -> list[Place]:
    """Return the place of a folder that is a checkpoint, such as a copy of one; else none."""
    try:
        text = (root / MANIFEST).read_text(encoding="utf-8")
        if KIND not in text:
            return []
        step = from_text(text).step
    except (OSError, UnicodeDecodeError):
        return []
    except Damaged:  # as reading it for good will tell
        step = 0
    return [Place(0, step, root)]


def read_manifest(place: Place) -> Manifest:
    """Return a checkpoint's manifest; Damaged if there is no whole one."""
    try:
        text = (place.path / MANIFEST).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise Damaged(f"{MANIFEST}: {error}") from None
    manifest = from_text(text)
    if manifest.step != place.step:
        raise Damaged(f"{MANIFEST}: of step {manifest.step}, in the folder {place.path.name}")
    return manifest


def part_name(rank: int) -> str:
    """Return the name of the file that a rank writes, without its suffix."""
    return f"rank-{rank:05d}"


def commit(partial: Partial, manifest: Manifest) -> Path:
    """Write the manifest, and give the folder its name."""
    write_text(partial.path / MANIFEST, to_text(manifest))
    fsync_folder(partial.path)
    final = _name(partial.path, manifest.step)
    fsync_folder(final.parent)
    partial.release()
    return final


def thin_out(root: Path, keep: int) -> str:
    """Remove all but the newest `keep` checkpoints; return why one stays, or no text."""
    problems = []
    try:
        old = places(root)[keep:]
    except OSError as error:
        return f"old checkpoints stay: {error}"
    for place in old:
        # Renamed first, so that a kill does not leave half a checkpoint under a whole one's name.
        dying = place.path.with_name(f"{PARTIAL}old-{place.path.name}")
        try:
            place.path.rename(dying)
        except FileNotFoundError:  # another run keeps as few, and was faster
            pass
        except OSError as error:  # such as another user's, where the folder has the sticky bit
            problems.append(f"{place.path} is to go, but stays: {error.strerror}")
        remove(dying)
    return next(iter(problems), "")


def _name(partial: Path, step: int) -> Path:
    """Rename a folder to be the newest checkpoint."""
    root = partial.parent
    sequence = max((place.sequence for place in places(root)), default=0) + 1
    while True:
        final = root / f"{sequence:06d}-step-{step}"
        try:
            partial.rename(final)
        except OSError as error:
            if error.errno not in (errno.EEXIST, errno.ENOTEMPTY, errno.ENOTDIR):
                raise
            sequence += 1  # another run has just taken this one, or it is no folder
        else:
            return final
