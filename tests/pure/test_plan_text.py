"""Plans print and parse back, and a written plan runs at its own size only."""

import pytest

from ringfold.parallel.plan import PLANS, PlanError, whole_plan
from ringfold.parallel.plan_check import check_plan
from ringfold.parallel.plan_text import parse_plan, print_plan
from ringfold.workloads.command_line import parse
from ringfold.workloads.options import UsageError, grid_of


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("num_stages", "num_microbatches"), [(1, 1), (2, 3), (4, 8)])
def test_text_form_round_trips(name, num_stages, num_microbatches):
    plan = whole_plan(PLANS[name], num_stages, num_microbatches)
    written = parse_plan(print_plan(plan))
    assert written.rows == plan
    assert whole_plan(written, num_stages, num_microbatches) == plan


def test_text_is_what_one_would_write():
    text = "# mine\n\nstage 0: F0 F1 I0 W0 B1  # split once\nstage 1: F0 B0 F1 B1\n"
    written = parse_plan(text)
    assert written.num_microbatches == 2
    assert print_plan(written.rows) == "stage 0: F0 F1 I0 W0 B1\nstage 1: F0 B0 F1 B1\n"
    check_plan(written.rows, 2)


def test_several_stages_on_a_rank_are_written_out():
    text = "rank 0: F0@0 F0@2 B0@2 B0@0\nrank 1: F0@1 F0@3 B0@3 B0@1\n"
    written = parse_plan(text)
    assert print_plan(written.rows) == text
    assert [action.stage for action in written.rows[1]] == [1, 3, 3, 1]
    check_plan(written.rows, 1)
    with pytest.raises(PlanError, match="for 2 ranks and 1 micro-batches, not for 3 and 1"):
        whole_plan(written, 3, 1)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "a line for every stage, got none"),
        ("stage 1: F0", "line 1: expected 'stage 0: F0 ...', got 'stage 1: F0'"),
        ("stage 0: F0 B0\nF0 B0", "line 2: expected 'stage 1: "),
        ("stage 0: F0 X0", "stage 0, word 1: .*'X0'"),
    ],
)
def test_bad_text_is_named(text, message):
    with pytest.raises(ValueError, match=message):
        parse_plan(text)


def test_written_plan_of_another_size():
    with pytest.raises(PlanError, match="for 1 stages and 1 micro-batches, not for 2 and 3"):
        whole_plan(parse_plan("stage 0: F0 B0"), 2, 3)


def test_schedule_file_of_train(tmp_path):
    path = tmp_path / "plan.txt"
    path.write_text(print_plan(whole_plan(PLANS["gpipe"], 2, 2)))
    options = parse(["--pipe", "2", "--microbatches", "2", "--schedule", str(path)])
    assert grid_of(options, 2).microbatches == 2
    with pytest.raises(UsageError, match=r"--schedule .*plan\.txt: .*2 stages and 2 micro-batches"):
        grid_of(parse(["--pipe", "2", "--microbatches", "4", "--schedule", str(path)]), 2)
    path.write_text("stage 0: F0 B0\nstage 1: B0 F0\n")
    with pytest.raises(UsageError, match=r"deadlock: .*stage 1 is stuck at B0"):
        grid_of(parse(["--pipe", "2", "--microbatches", "1", "--schedule", str(path)]), 2)
    with pytest.raises(
        UsageError, match="a file, or one of: 1f1b, gpipe, interleaved, naive, zero-bubble"
    ):
        parse(["--schedule", "2f2b"])


def test_stages_per_rank_of_train():
    options = parse(["--pipe", "2", "--schedule", "interleaved", "--microbatches", "4"])
    assert grid_of(options, 2).stages == 4
    options = parse(["--stages-per-rank", "3", "--schedule", "interleaved"])
    assert grid_of(options, 1).stages == 3
    assert grid_of(parse(["--recompute"]), 2).stages == 1
    options = parse(["--pipe", "2", "--stages-per-rank", "3"])
    with pytest.raises(
        UsageError, match=r"--stages-per-rank: .*'1f1b' has one stage a rank, not 3"
    ):
        grid_of(options, 2)
