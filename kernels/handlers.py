"""Distinguish what a signal's handler has raised from errors of the code that it interrupted."""

from __future__ import annotations

import signal
import threading
import traceback
from itertools import pairwise
from types import FrameType


def of_a_signal(error: BaseException) -> bool:
    """Tell whether the handler of a signal has raised an error.

    A handler is recognised by its argument, the very frame that it interrupts: whatever kind of
    callable it is, and even if another has taken its place meanwhile. One that has dropped the
    argument is recognised by its code, as long as it is the present handler.
    """
    if threading.current_thread() is not threading.main_thread():
        return False
    handlers = map(signal.getsignal, signal.valid_signals())
    codes = {getattr(handler, "__code__", None) for handler in handlers} - {None}
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(frame.f_code in codes or _given(frame, before) for before, frame in pairwise(frames))


def _given(frame: FrameType, what: object) -> bool:
    """Tell whether a function was called with `what`."""
    for value in frame.f_locals.values():
        if value is what or (type(value) is tuple and any(one is what for one in value)):
            return True
    return False
