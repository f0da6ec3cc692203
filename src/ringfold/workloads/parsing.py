"""Parse a command line on every rank, so that one can say for all what is wrong with it."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import NoReturn, TypeVar

from .options import UsageError

__all__ = ["Parser", "attempt"]

Result = TypeVar("Result")


class Parser(argparse.ArgumentParser):
    """Raise UsageError instead of exiting: every rank parses, and one is to print."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(message)


def attempt(parse: Callable[[], Result]) -> tuple[Callable[[], Result], Result | None]:
    """Parse now, so that --help needs no MPI; the result, or its error, is for all ranks later."""
    try:
        options = parse()
    except UsageError as error:
        complaint = error

        def fail() -> NoReturn:
            raise complaint

        return fail, None
    return lambda: options, options
