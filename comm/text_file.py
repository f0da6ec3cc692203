"""Text files that a reader finds whole, and whether one can be written."""

from __future__ import annotations

import os
import threading
from pathlib import Path


def write_whole(path: Path, text: str) -> None:
    """Replace a file at once, so that a reader finds the old text or the new one.

    A link stays: what it leads to is replaced. What is no file, such as a pipe or a device, is
    written to, as is a file in a folder that may not be.
    """
    if path.exists() and not (path.is_file() and os.access(path.resolve().parent, os.W_OK)):
        path.write_text(text)
        return
    end = path.resolve()
    # Without its name, which may be as long as a name can be.
    beside = end.with_name(f".ringfold-{os.getpid()}-{threading.get_ident()}")
    try:
        beside.write_text(text)
        beside.replace(end)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def why_unwritable(path: Path) -> str:
    """Return why no file can be written, without making one; "" where it can."""
    try:
        if path.is_dir():
            return f"{path} is a folder"
        if path.exists():
            return "" if os.access(path, os.W_OK) else f"{path} may not be written"
        folder = path.resolve().parent
    except OSError as error:  # such as a name that is too long
        return f"{path}: {error.strerror}"
    except RuntimeError as error:  # links in a ring, before Python 3.13
        return f"{path}: {error}"
    if not folder.is_dir():
        return f"{path}: there is no folder {folder}"
    return "" if os.access(folder, os.W_OK) else f"{path} may not be written"


def prepare_file(path: Path) -> str:
    """Make the folder of a file, and return why that or the file cannot be; "" where it can."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if not path.exists():  # a folder that lets nobody write may look as if it did
            path.touch()
            path.unlink()
    except OSError as error:
        return str(error)
    return why_unwritable(path)
