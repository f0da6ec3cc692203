"""Plans equal their drawings, their costs equal the closed forms, and bad plans are refused."""

import inspect
import textwrap

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ringfold.parallel.actions import Action, Kind, parse_actions
from ringfold.parallel.plan import (
    PLANS,
    PlanError,
    gpipe,
    interleaved,
    naive,
    one_f_one_b,
    plan_function,
    whole_plan,
    zero_bubble,
)
from ringfold.parallel.plan_check import check_plan, draw

SIZES = [(p, m) for p in (1, 2, 3, 4, 5, 8) for m in (1, 2, 3, 4, 5, 7, 8, 16)]


def words(actions):
    return " ".join(map(str, actions))


def test_one_f_one_b_first_of_four_stages():
    plan = one_f_one_b(stage=0, num_stages=4, num_microbatches=6)
    assert words(plan) == "F0 F1 F2 F3 B0 F4 B1 F5 B2 B3 B4 B5"


def test_one_f_one_b_last_of_four_stages():
    plan = one_f_one_b(stage=3, num_stages=4, num_microbatches=3)
    assert words(plan) == "F0 B0 F1 B1 F2 B2"


def test_fewer_microbatches_than_stages():
    plan = one_f_one_b(stage=0, num_stages=4, num_microbatches=2)
    assert words(plan) == "F0 F1 B0 B1"


def test_gpipe_of_any_stage():
    assert words(gpipe(stage=1, num_stages=2, num_microbatches=3)) == "F0 F1 F2 B0 B1 B2"


@pytest.mark.parametrize(
    ("function", "num_microbatches"),
    [(naive, 2), (gpipe, 3), (one_f_one_b, 3), (interleaved, 2), (zero_bubble, 3)],
)
def test_docstring_drawing(function, num_microbatches):
    lines = inspect.getdoc(function).splitlines()
    drawing = textwrap.dedent("\n".join(line for line in lines if " | " in line))
    plan = whole_plan(function, 2, num_microbatches)
    split = 2 if function is zero_bubble else 1
    drawn = draw(check_plan(plan, num_microbatches, backward_cost=split))
    assert [line.rstrip() for line in drawing.splitlines()] == drawn.splitlines()


def test_drawing_of_long_backwards():
    drawn = draw(check_plan(whole_plan(gpipe, 2, 2), 2, backward_cost=2))
    assert drawn.splitlines() == [
        "stage 0 | F0 F1 .  .  .  B0 -  B1 -",
        "stage 1 | .  F0 F1 B0 -  B1 -  .  .",
    ]


def test_what_takes_no_time_takes_no_room_in_a_drawing():
    plan = whole_plan(zero_bubble, 2, 2)
    drawn = draw(check_plan(plan, 2, backward_cost=2, weight_cost=0))
    assert drawn.splitlines() == [
        "stage 0 | F0 F1 .  .  I0 -  .  I1 -",
        "stage 1 | .  F0 I0 -  F1 I1 -  .  .",
    ]


def test_drawing_refuses_fractions():
    with pytest.raises(ValueError, match="whole units"):
        draw(check_plan(whole_plan(gpipe, 2, 2), 2, forward_cost=0.5))


@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
@pytest.mark.parametrize("costs", [(1, 1), (1, 2), (3, 2)])
def test_closed_forms(name, num_stages, num_microbatches, costs):
    forward, backward = costs
    report = check_plan(
        whole_plan(PLANS[name], num_stages, num_microbatches),
        num_microbatches,
        forward_cost=forward,
        backward_cost=backward,
    )
    slots = num_microbatches + num_stages - 1
    assert report.makespan == slots * (forward + backward)
    assert report.bubble == pytest.approx((num_stages - 1) / slots)
    peak = {
        "gpipe": lambda stage: num_microbatches,
        "1f1b": lambda stage: min(num_stages - stage, num_microbatches),
    }[name]
    assert report.peak_activations == tuple(peak(stage) for stage in range(num_stages))


@pytest.mark.parametrize("name", PLANS)
def test_backwards_keep_the_order_of_the_microbatches(name):
    for actions in whole_plan(PLANS[name], 3, 5):
        for kind in Kind:
            for stage in {a.stage for a in actions}:
                order = [a.microbatch for a in actions if (a.kind, a.stage) == (kind, stage)]
                assert order == sorted(order)


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_closed_form_of_naive(num_stages, num_microbatches):
    plan = whole_plan(naive, num_stages, num_microbatches)
    report = check_plan(plan, num_microbatches, forward_cost=2, backward_cost=3)
    assert report.makespan == 5 * num_stages * num_microbatches
    assert report.bubble == pytest.approx(1 - 1 / num_stages)
    assert report.peak_activations == (1,) * num_stages


@pytest.mark.parametrize(("num_stages", "num_microbatches"), SIZES)
def test_closed_form_of_zero_bubble(num_stages, num_microbatches):
    """All parts of one length: (stages - 1) (F + I - W) idle, a third of 1F1B's."""
    plan = whole_plan(zero_bubble, num_stages, num_microbatches)
    report = check_plan(plan, num_microbatches, backward_cost=2)
    held = min(num_stages, num_microbatches)
    assert report.makespan == 3 * num_microbatches + 2 * (num_stages - 1) - (held - 1)
    assert report.peak_activations == (held,) * num_stages


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 4, 5, 8])
@pytest.mark.parametrize("stages_per_rank", [1, 2, 3, 4])
def test_closed_form_of_interleaved(num_ranks, stages_per_rank):
    """Every M runs; for multiples of the ranks the bubble is a stages_per_rank-th of 1F1B's."""
    function = plan_function("interleaved", stages_per_rank)
    for num_microbatches in range(17):
        rows = whole_plan(function, num_ranks, num_microbatches)
        report = check_plan(rows, num_microbatches, forward_cost=1, backward_cost=2)
        work = 3 * stages_per_rank * num_microbatches
        if num_microbatches and num_microbatches % num_ranks == 0:
            assert report.makespan == work + 3 * (num_ranks - 1)
            assert report.bubble == pytest.approx(3 * (num_ranks - 1) / report.makespan)
            held = [
                min((stages_per_rank - 1) * num_ranks + 2 * (num_ranks - 1 - rank) + 1, work // 3)
                for rank in range(num_ranks)
            ]
            assert report.peak_activations == tuple(held)
        else:
            assert report.makespan >= work


def test_interleaved_of_one_stage_a_rank_has_the_bubble_of_1f1b():
    plan = whole_plan(plan_function("interleaved", 1), 3, 6)
    assert check_plan(plan, 6).bubble == check_plan(whole_plan(one_f_one_b, 3, 6), 6).bubble


def test_a_stage_on_the_wrong_rank_is_refused():
    rows = [parse_actions("F0@0 F0@1 B0@1 B0@0", 0), parse_actions("F0@2 B0@2", 1)]
    with pytest.raises(PlanError, match="rank 0, position 1: F0@1 belongs to rank 1"):
        check_plan(rows, 1)
    rows = [parse_actions("F0@0 F0@2 B0@2 B0@0", 0), parse_actions("F0@1 B0@1 F0@3", 1)]
    with pytest.raises(PlanError, match="rank 1: missing B0@3"):
        check_plan(rows, 1)


def test_deadlock_of_several_stages_a_rank():
    rows = [parse_actions("F0@2 F0@0 B0@2 B0@0", 0), parse_actions("F0@1 F0@3 B0@3 B0@1", 1)]
    with pytest.raises(PlanError) as caught:
        check_plan(rows, 1)
    assert str(caught.value) == (
        "deadlock: rank 0 is stuck at F0@2, waiting for F0 of stage 1; "
        "rank 1 is stuck at F0@1, waiting for F0 of stage 0"
    )


def test_interleaved_has_two_stages_a_rank_unless_another_number_is_asked_for():
    assert PLANS["interleaved"](0, 2, 3) == interleaved(0, 2, 3, stages_per_rank=2)
    assert plan_function("interleaved")(0, 2, 3) == interleaved(0, 2, 3)


def test_several_stages_a_rank_are_refused_where_the_plan_has_one():
    with pytest.raises(ValueError, match="'1f1b' has one stage a rank, not 2: choose interleaved"):
        plan_function("1f1b", 2)
    with pytest.raises(ValueError, match="stages_per_rank >= 1, got 0"):
        interleaved(0, 1, 1, stages_per_rank=0)


def test_weights_may_take_another_part_of_a_backward():
    report = check_plan(broken("F0 I0 W0"), 1, forward_cost=1, backward_cost=4, weight_cost=1)
    assert [placed.end for placed in report.timeline[0]] == [1, 4, 5]


def test_no_microbatches():
    report = check_plan(whole_plan(one_f_one_b, 3, 0), 0)
    assert (report.makespan, report.bubble, report.peak_activations) == (0.0, 0.0, (0, 0, 0))


def broken(*rows):
    return [parse_actions(row, stage) for stage, row in enumerate(rows)]


def test_deadlock_names_the_stuck_action_of_every_stage():
    stages = broken("F0 B0 F1 B1", "F1 F0 B0 B1", "F0 B0 F1 B1")
    with pytest.raises(PlanError) as caught:
        check_plan(stages, 2)
    assert str(caught.value) == (
        "deadlock: stage 0 is stuck at B0, waiting for B0 of stage 1; "
        "stage 1 is stuck at F1, waiting for F1 of stage 0; "
        "stage 2 is stuck at F0, waiting for F0 of stage 1"
    )


def test_weights_before_inputs_are_a_deadlock():
    with pytest.raises(PlanError, match="stage 0 is stuck at W0, waiting for B0 of stage 0"):
        check_plan(broken("F0 W0 I0"), 1)


def test_split_and_whole_backwards_may_meet():
    report = check_plan(broken("F0 F1 B0 B1", "F0 F1 I0 I1 W0 W1"), 2)
    assert report.peak_activations == (2, 2)


def test_backward_before_its_own_forward_is_a_deadlock():
    with pytest.raises(PlanError, match="stage 0 is stuck at B0, waiting for F0 of stage 0"):
        check_plan(broken("B0 F0"), 1)


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (("F0 B0", "F0"), "stage 1: missing B0"),
        (("F0 I0", "F0 B0"), "stage 0: missing W0"),
        (("F0 I0 W0 B0",), "position 3: B0 doubles a backward that is split"),
        (("F0 F0 B0", "F0 B0"), "stage 0, position 1: F0 is doubled"),
        (("F0 B0 F1", "F0 B0"), "stage 0, position 2: F1 is beyond the 1 micro-batches"),
    ],
)
def test_incomplete_plans_are_refused(rows, message):
    with pytest.raises(PlanError, match=message):
        check_plan(broken(*rows), 1)


def test_action_of_another_stage_is_refused():
    with pytest.raises(PlanError, match="stage 1, position 0: F0 belongs to stage 0"):
        check_plan([parse_actions("F0 B0", 0), parse_actions("F0 B0", 0)], 1)


def test_numbers_below_zero_are_named():
    """F-1 was said to double a backward that is split; F0@-1 on stage 0, to belong to stage 0."""
    for bad in (Action(Kind.FORWARD, -1, 0), Action(Kind.FORWARD, 0, -1)):
        with pytest.raises(PlanError) as caught:
            check_plan([parse_actions("F0 B0", 0), [*parse_actions("F0 B0", 1), bad]], 1)
        assert str(caught.value) == f"rank 1, position 2: {bad.placed} has a number below 0"


def test_what_is_no_action_is_named():
    """It was an AttributeError; and a kind told by its letter, a deadlock of F0 with itself."""
    with pytest.raises(TypeError, match=r"^rank 0, position 0: expected an Action, got 'F0'"):
        check_plan([["F0", "B0"]], 1)
    assert Action("F", 0, 0).kind is Kind.FORWARD
    with pytest.raises(ValueError, match="'X' is not a valid Kind"):
        Action("X", 0, 0)


@given(st.data())
def test_any_swap_is_judged_without_hanging(data):
    """A mutated plan runs or is refused; the same multiset is never reported as incomplete."""
    num_stages, num_microbatches = data.draw(st.tuples(st.integers(1, 4), st.integers(1, 5)))
    stages = [list(row) for row in whole_plan(one_f_one_b, num_stages, num_microbatches)]
    row = stages[data.draw(st.integers(0, num_stages - 1))]
    places = st.integers(0, len(row) - 1)
    i, j = data.draw(st.tuples(places, places))
    row[i], row[j] = row[j], row[i]
    try:
        report = check_plan(stages, num_microbatches)
    except PlanError as error:
        assert str(error).startswith("deadlock: ")
    else:
        ends = {placed.action: placed for placed_row in report.timeline for placed in placed_row}
        for action, placed in ends.items():
            assert all(ends[need].end <= placed.start for need in action.needs(num_stages))


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ValueError, match=r"unknown pipeline schedule '2f2b'.*1f1b, gpipe"):
        plan_function("2f2b")


@pytest.mark.parametrize(("stage", "num_stages"), [(-1, 2), (2, 2), (0, 0)])
@pytest.mark.parametrize("function", [gpipe, one_f_one_b])
def test_stage_outside_of_the_pipe(function, stage, num_stages):
    with pytest.raises(ValueError, match="0 <= stage < num_stages"):
        function(stage, num_stages, 1)


@pytest.mark.parametrize("name", PLANS)
def test_fewer_than_no_microbatches(name):
    with pytest.raises(ValueError, match="num_microbatches >= 0, got -1"):
        PLANS[name](0, 2, -1)
