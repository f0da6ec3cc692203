"""What help() tells of the names that users meet."""

import pydoc

import pytest

import ringfold
import ringfold.parallel
from ringfold.comm import settings


def page(thing: object) -> str:
    return pydoc.plain(pydoc.render_doc(thing))


def test_no_page_shows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """help(ringfold.Settings) wrote the whole environment out, as the default of a parameter."""
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    things = [settings]  # the only module that reads it, see test_layers.py
    things += [getattr(ringfold, name) for name in ringfold.__all__]
    things += [getattr(ringfold.parallel, name) for name in ringfold.parallel.__all__]
    assert [thing for thing in things if "hunter2" in page(thing)] == []
