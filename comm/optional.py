"""Names that a package has where a library is installed, and those that it has without."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterable, Mapping
from types import ModuleType
from typing import Any


def look_up(package: str, homes: Mapping[str, str], name: str, library: str) -> Any:
    """Return a name of a package from the module that is its home, imported now.

    library: what some homes need, and the extra of this project that installs it.
    AttributeError where there is no such name; ModuleNotFoundError, which says what to install,
    where its home needs the library and there is none.
    """
    if name not in homes:
        raise AttributeError(f"module {package!r} has no attribute {name!r}")
    try:
        return getattr(importlib.import_module(f".{homes[name]}", package), name)
    except ModuleNotFoundError as error:
        if error.name != library:
            raise
        told = f"{package}.{name} needs {library}: pip install 'ringfold[{library}]'"
        raise ModuleNotFoundError(told, name=error.name) from None


def listed(found: Mapping[str, object], public: Iterable[str]) -> list[str]:
    """Return what dir() of a package shows: public names, modules, and what begins with _.

    found: all that it has, what it has imported for itself included.
    """
    own = (name for name, value in found.items() if name[0] == "_" or isinstance(value, ModuleType))
    return sorted({*own, *public})


def usable(names: Iterable[str], bare: Iterable[str], library: str) -> list[str]:
    """Return the names that can be looked up here: all, or `bare` where there is no library."""
    try:
        found = importlib.util.find_spec(library) is not None
    except (ImportError, ValueError):  # what a finder or sys.modules says of a library in its way
        found = False
    return sorted(names if found else bare)
