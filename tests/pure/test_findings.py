"""The doctor's screen: what is broken decides the status, and everything fits."""

import pytest

from ringfold.comm.settings import asks_for_huge_pages
from ringfold.doctor_pages import huge_pages
from ringfold.findings import WIDTH, State, broken, good, note, screen, status, ways_table


def test_only_what_is_broken_fails():
    assert status([good("a", "x"), note("b", "y", "do")]) == 0
    assert status([good("a", "x"), broken("b", "y", "do")]) == 1


def test_the_screen_is_narrow_and_names_what_is_broken():
    text = screen(
        [good("one", "word " * 60), note("two", "", "hint"), broken("three", "gone", "fix it")]
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= WIDTH
    assert text.count("word") == 60
    assert lines[0].startswith("ok one ") and lines[1].startswith(" ")
    assert "-> fix it" in text and lines[-1] == "broken: three"
    assert screen([good("one", "x")]).endswith("everything that is here works")


def test_ways_of_one_kind_take_a_line():
    assert ways_table([["a"]]) == "one rank, no pairs"
    assert ways_table([["-", "shared"], ["shared", "-"]]) == "shared, for all 1 pairs of ranks"


def test_ways_of_two_kinds_are_drawn():
    ways = [["-", "shared", "mpi"], ["shared", "-", "mpi"], ["mpi", "mpi", "-"]]
    assert ways_table(ways) == "\n".join(
        [
            "shared: 1 pairs, mpi: 2 pairs",
            "(a shared, b mpi)",
            "rank  0  1  2",
            "   0  .  a  b",
            "   1  a  .  b",
            "   2  b  b  .",
        ]
    )
    assert ways_table(ways, most=2) == "shared: 1 pairs, mpi: 2 pairs"


MADVISE = "always [madvise] never"


@pytest.mark.parametrize(
    ("words", "environ", "state"),
    [
        ("[always] madvise never", {}, State.GOOD),
        ("always madvise [never]", {"THP_MEM_ALLOC_ENABLE": "1"}, State.NOTE),
        (MADVISE, {}, State.NOTE),
        (MADVISE, {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, State.NOTE),
        (MADVISE, {"GLIBC_TUNABLES": "glibc.malloc.check=1:glibc.malloc.hugetlb=1"}, State.GOOD),
        (MADVISE, {"THP_MEM_ALLOC_ENABLE": "1"}, State.GOOD),
    ],
)
def test_huge_pages_are_as_linux_and_malloc_say(words, environ, state):
    (finding,) = huge_pages(words, asks_for_huge_pages(environ))
    assert finding.state is state
    assert bool(finding.advice) == (words == MADVISE and state is State.NOTE)


def test_of_a_kernel_without_huge_pages_nothing_is_said():
    assert huge_pages("", "") == []
