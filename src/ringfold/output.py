"""End a program whose output cannot be written as the tools of a shell do: without a traceback."""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Callable

CUT_OFF = 141
"""Exit status where the output was read to no end: a shell's for SIGPIPE."""

UNWRITTEN = 1

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def status_of(program: str, run: Callable[[], int]) -> int:
    """Run what prints, and return its exit status.

    Where nobody reads any more, as behind `head`, it ends in silence with CUT_OFF; where the disk
    is full, with UNWRITTEN and one line, which begins with the program's name.
    """
    try:
        try:
            return run()
        finally:
            if sys.stdout is not None:  # which a shell's >&- has closed
                sys.stdout.flush()
    except BrokenPipeError:
        _write_no_more()
        return CUT_OFF
    except OSError as error:
        if error.errno not in _FULL or error.filename is not None:
            raise
        _write_no_more()
        print(f"{program}: the output cannot be written: {error.strerror}", file=sys.stderr)
        return UNWRITTEN


def _write_no_more() -> None:
    """Let what is still in the buffer of the output go nowhere."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
