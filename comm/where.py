"""Where a rank is, in words."""

from __future__ import annotations

import sys
import threading

from .trace import Ring

_FRAMES = 4


def where(thread: int) -> str:
    """Return where a thread of this process is: its innermost frames, the innermost first.

    Of one that has ended, where the main thread is. Frames of ringfold's own are left out: its ring
    of operations says what it does there.
    """
    frames = sys._current_frames()
    frame = frames.get(thread) or frames.get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None and len(places) < _FRAMES:
        own = frame.f_globals.get("__name__", "").partition(".")[0] == "ringfold"
        if not own:
            code = frame.f_code
            places.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return " < ".join(places) or "nowhere in Python"


def state(ring: Ring, thread: int) -> str:
    """Return what this rank is at; thread: in which it has begun, one of many of `run_local`."""
    entries = ring.entries(1)
    return f"{entries[-1] if entries else 'no operation yet'}; now at {where(thread)}"
