"""The judge of elastic runs says no to whatever is wrong with one."""

import copy

import pytest
from soak_elastic import STEPS, Case, Kill, Outcome, case_of, complaints, departures

CASE = Case("shrink", 0, (Kill("rank-1", 3, 0.0),), (), ("--elastic",), {})
REPORT = {
    "losses": [1.0 / (i + 1) for i in range(STEPS)],
    "steps": STEPS,
    "ranks": 3,
    "weights_sha256": "aa",
    "events": [{"event": "died", "rank": 1, "step": 3, "lost": "the step in flight"}],
}


def outcome():
    notes = {f"rank-{r}": [("step", 9.0), ("lost", 10.1), ("step", 10.4 + r)] for r in (0, 2)}
    return Outcome(0, "", copy.deepcopy(REPORT), killed={"rank-1": 10.0}, notes=notes)


def test_a_right_run_is_right():
    assert complaints(CASE, outcome(), REPORT) == []


@pytest.mark.parametrize(
    ("change", "shown"),
    [
        (lambda o: setattr(o, "status", 1), "status 1"),
        (lambda o: setattr(o, "report", None), "no report"),
        (lambda o: setattr(o, "leftovers", ("python",)), "left processes"),
        (lambda o: o.report.update(weights_sha256="ab"), "weights"),
        (lambda o: o.report["losses"].__setitem__(7, 2.0), "from step 7 on"),
        (lambda o: o.report["losses"].pop(), "59 losses of 60"),
        (lambda o: o.report.update(ranks=4), "ended with 4 ranks, expected 3"),
        (lambda o: o.report["events"][0].update(rank=2), "not killed"),
        (lambda o: o.notes["rank-0"].__setitem__(2, ("step", 15.0)), "went on 5.00 s after"),
        (lambda o: o.notes["rank-0"].clear() or o.notes["rank-2"].pop(), "went on inf s after"),
        (lambda o: o.notes.clear(), "nobody has gone on"),
    ],
)
def test_what_is_wrong_is_named(change, shown):
    found = outcome()
    change(found)
    assert any(shown in line for line in complaints(CASE, found, REPORT))


def test_a_run_that_cannot_be_compared_is_wrong():
    assert complaints(CASE, outcome(), None) == ["there is nothing to compare it with"]


def test_a_run_is_known_by_its_kind_and_number():
    assert case_of("shrink", 7) == case_of("shrink", 7) != case_of("shrink", 8)


def test_what_was_before_a_checkpoint_that_counts_has_not_been():
    fell = "all since the checkpoint of step 10"
    events = [
        {"event": "died", "rank": 2, "step": 12, "lost": "the step in flight"},
        {"event": "joined", "rank": 4, "step": 12, "lost": "nothing"},
        {"event": "died", "rank": 1, "step": 15, "lost": fell},
    ]
    assert departures(events) == "2:10,1:10" and departures(events[:2]) == "2:12"


def test_the_launcher_counts_newcomers_that_died_and_nobody_else():
    found = outcome()
    found.status = 137
    assert complaints(CASE, found, REPORT) == ["it ended with status 137"]
    found.killed["new-77"] = 11.0
    assert complaints(CASE, found, REPORT) == []
    found.status = 1
    assert complaints(CASE, found, REPORT) == ["it ended with status 1"]


def test_a_newcomer_that_never_opened_mpi_ends_the_run_with_a_word_of_it():
    text = "of 1 processes started in place of dead ranks, not all have opened MPI"
    found = Outcome(137, "", None, killed={"rank-1": 10.0, "new-77": 11.0})
    assert complaints(CASE, found, None) == ["it has written no report"]
    found.output = text
    assert complaints(CASE, found, None) == []
    found.status = 0
    assert complaints(CASE, found, None) == ["it ended with status 0"]
    found.status, found.killed = 137, {"rank-1": 10.0}
    assert "it has written no report" in complaints(CASE, found, None)
