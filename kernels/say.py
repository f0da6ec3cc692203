"""Tell the user something beside what the program prints."""

from __future__ import annotations

import sys
from contextlib import suppress
from typing import TextIO


def say(what: str, stream: TextIO | None = None) -> None:
    """Write a line to stderr, or another stream, at once; go on where nobody can be told.

    A stream may be closed, or a pipe that nobody reads: what is to follow, such as the end of the
    job, must follow nevertheless.
    """
    stream = stream or sys.stderr
    if stream is not None:
        with suppress(OSError, ValueError):
            print(f"ringfold: {what}", file=stream, flush=True)


def flush() -> None:
    """Let out what the program has printed, where that can be."""
    for stream in (sys.stdout, sys.stderr):
        if stream is not None:
            with suppress(OSError, ValueError):
                stream.flush()
