"""The folder in which a checkpoint is written, which others leave alone while its maker lives.

Several runs may write into one folder, and so may several `Checkpoints` of one program. The maker
holds a lock (flock) on a file beside its folder, which the system lets go of when the process ends,
however it ends: what nobody holds is what a killed run has left. A file system without such locks
tells nothing, so there nothing is removed that came with one.
"""

from __future__ import annotations

import fcntl
import os
import secrets
import shutil
from contextlib import suppress
from pathlib import Path

__all__ = ["PARTIAL", "Partial", "make_partial", "remove"]

PARTIAL = ".partial-"
_LOCK = ".lock"


class Partial:
    """A folder that this process has made and holds."""

    def __init__(self, path: Path, held: int) -> None:
        self.path = path
        self._held: int | None = held

    def release(self) -> None:
        """Let go of the folder, which has another name by now, or is gone."""
        held, self._held = self._held, None
        if held is not None:
            with suppress(OSError):
                _lock_of(self.path).unlink(missing_ok=True)
            with suppress(OSError):  # told, since a fork has the descriptor, too
                fcntl.flock(held, fcntl.LOCK_UN)
            os.close(held)

    def discard(self) -> None:
        """Remove the folder, if it is not a checkpoint already."""
        # First out of the way of ranks that still write to it: one file more, and it would stay.
        away = self.path.with_name(f"{self.path.name}-discarded")
        with suppress(OSError):
            self.path.rename(away)
        remove(away if away.exists() else self.path)
        self.release()


def make_partial(root: Path, step: int, nbytes: int) -> Partial:
    """Make the folder in which the next checkpoint is written, under a name that no other has.

    What killed runs have left is removed. OSError if the folder cannot be made or written, or if
    the disk has no room for nbytes bytes; nothing old is touched.
    """
    root.mkdir(parents=True, exist_ok=True)
    _sweep(root)
    disk = os.statvfs(root)
    free = disk.f_bavail * disk.f_frsize
    if free < nbytes:
        raise OSError(f"the disk has {free} bytes free, the checkpoint needs {nbytes}")
    while True:
        path = root / f"{PARTIAL}step-{step}-{secrets.token_hex(4)}"
        # Held before there is a folder, so that there is no moment at which it looks left behind.
        held = _held(_lock_of(path), os.O_CREAT | os.O_EXCL)
        if held is not None:
            partial = Partial(path, held)
            try:
                path.mkdir()
            except OSError:
                partial.release()
                raise
            return partial


def remove(folder: Path) -> None:
    """Remove a folder with all in it, or a link to one alone; what cannot be removed stays."""
    if folder.is_symlink():
        with suppress(OSError):
            folder.unlink()
    else:
        shutil.rmtree(folder, ignore_errors=True)


def _lock_of(folder: Path) -> Path:
    return folder.with_name(folder.name + _LOCK)


def _held(lock: Path, flags: int) -> int | None:
    """Take a lock and return its descriptor; None if another holds it or has removed it.

    On a file system without locks a new lock file counts as held, and an old one is an OSError.
    """
    held = os.open(lock, os.O_RDWR | os.O_CLOEXEC | flags, 0o666)
    try:
        try:
            fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if isinstance(error, BlockingIOError) or not flags & os.O_CREAT:
                raise
        # Between opening and locking, another may have swept it away.
        if os.path.samestat(os.fstat(held), os.stat(lock)):
            return held
    except (BlockingIOError, FileNotFoundError):
        pass
    except OSError:
        os.close(held)
        raise
    os.close(held)
    return None


def _sweep(root: Path) -> None:
    """Remove what is in the making but held by nobody."""
    for lock in root.glob(f"{PARTIAL}*{_LOCK}"):
        with suppress(OSError):  # it has just gone, or nobody can tell
            held = _held(lock, 0)
            if held is not None:
                Partial(lock.with_name(lock.name.removesuffix(_LOCK)), held).discard()
    for folder in root.glob(f"{PARTIAL}*"):
        # The lock is made before its folder, and goes after it.
        if folder.is_dir() and not _lock_of(folder).exists():
            remove(folder)
