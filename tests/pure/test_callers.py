"""Which threads call: those that have ended do no longer, whatever their numbers are used for."""

import threading
from collections.abc import Callable

from ringfold.comm.callers import Callers


def run(call: Callable[[], object]) -> None:
    thread = threading.Thread(target=call)
    thread.start()
    thread.join()


def test_a_thread_is_among_them_until_it_ends() -> None:
    callers, noted, ends = Callers(), threading.Event(), threading.Event()

    def call() -> None:
        callers.note()
        noted.set()
        ends.wait(10)
        assert not callers.alone()  # the first one still lives

    assert callers.alone()
    callers.note()
    callers.note()
    assert callers.alone()
    thread = threading.Thread(target=call)
    thread.start()
    assert noted.wait(10) and not callers.alone()
    ends.set()
    thread.join()
    assert callers.alone()


def test_a_number_that_a_later_thread_has_says_nothing() -> None:
    """Where a thread had called, ranks that waited for each other were not told for as long as any
    other thread, such as a timer, had the number of the one that had ended."""
    callers, ends = Callers(), threading.Event()
    callers.note()
    run(callers.note)
    later = [threading.Thread(target=ends.wait, args=(10,)) for _ in range(8)]
    for thread in later:
        thread.start()
    assert callers.alone()  # also if one of them has that number, as mostly happens
    ends.set()
    for thread in later:
        thread.join()


def test_those_that_have_ended_are_forgotten() -> None:
    callers = Callers()
    for _ in range(5):
        run(callers.note)
    assert len(callers._marks) == 1
