"""What help() tells of the names that users meet."""

import inspect
import pydoc
import re
from typing import get_overloads

import pytest

import ringfold
import ringfold.parallel
from ringfold.comm import settings
from ringfold.comm.calls import _PLANNED, GroupCalls


def page(thing: object) -> str:
    return pydoc.plain(pydoc.render_doc(thing))


def test_no_page_shows_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    """help(ringfold.Settings) wrote the whole environment out, as the default of a parameter."""
    monkeypatch.setenv("SOME_TOKEN", "hunter2")
    things = [settings]  # the only module that reads it, see test_layers.py
    things += [getattr(ringfold, name) for name in ringfold.__all__]
    things += [getattr(ringfold.parallel, name) for name in ringfold.parallel.__all__]
    assert [thing for thing in things if "hunter2" in page(thing)] == []


CLASSES = sorted(
    {
        found
        for package in (ringfold, ringfold.parallel)
        for name in package.__all__
        if inspect.isclass(found := getattr(package, name))
    },
    key=lambda kind: kind.__name__,
)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: str(kind.__name__))
def test_a_class_tells_of_all_that_it_has(kind: type) -> None:
    """help(Communicator) named neither rank nor size; Dropout.forward had torch's words."""
    own = [base for base in kind.__mro__ if base.__module__.startswith("ringfold.")]
    annotated = {name for base in own for name in inspect.get_annotations(base)}
    told = " ".join(base.__doc__ or "" for base in own)
    lacking = [name for name in annotated if name[0] != "_" and name not in re.split(r"\W+", told)]
    methods = [(name, method) for base in own for name, method in vars(base).items()]
    lacking += [
        name
        for name, method in methods
        if name[0] != "_" and (callable(method) or isinstance(method, property | classmethod))
        if not method.__doc__
    ]
    assert lacking == []


@pytest.mark.parametrize("name", _PLANNED)
def test_a_collective_that_goes_on_is_known_as_a_work(name: str) -> None:
    """To type checkers everything was Any; what they make of a program: tests/typed_program.py."""
    method = getattr(GroupCalls, name)
    told = [inspect.signature(overload) for overload in get_overloads(method)]
    later = [one for one in told if one.parameters["blocking"].annotation == "Later"]
    assert [one.return_annotation for one in later] == ["Work"]
    assert all([*one.parameters] == [*inspect.signature(method).parameters] for one in told)
