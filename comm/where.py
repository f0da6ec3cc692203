"""Where a rank is, in words."""

from __future__ import annotations

import sys
import threading

from .trace import Ring

_FRAMES = 4


def where() -> str:
    """Return where the main thread of this process is: its innermost frames, the innermost first.

    Frames of ringfold's own are left out: its ring of operations says what it does there.
    """
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    places: list[str] = []
    while frame is not None and len(places) < _FRAMES:
        own = frame.f_globals.get("__name__", "").partition(".")[0] == "ringfold"
        if not own:
            code = frame.f_code
            places.append(f"{code.co_filename}:{frame.f_lineno} in {code.co_name}")
        frame = frame.f_back
    return " < ".join(places) or "nowhere in Python"


def state(ring: Ring) -> str:
    """Return what this rank is at."""
    entries = ring.entries(1)
    return f"{entries[-1] if entries else 'no operation yet'}; now at {where()}"
