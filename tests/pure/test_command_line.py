"""What train.py refuses of its command line, before a rank has been asked anything."""

import pytest

from ringfold.workloads.command_line import parse
from ringfold.workloads.options import UsageError, check_membership
from ringfold.workloads.report import check_writable


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ("--steps 0", "expected 1 or more, got 0"),
        (f"--seed {2**63}", f"expected {2**63 - 1} at the most"),
        ("--bucket-mb 1e-9", "expected a byte"),
        ("--lr nan", "expected a finite number above 0"),
        ("--lr 1e300", "expected a number that float32 holds"),
        ("--report x.json --trace ./x.json", "--trace and --report name one file"),
        ("--membership 1", "expected RANK:STEP"),
        ("--every 5", "--every needs --checkpoint DIR"),
        ("--wire topk:1.5", "expected a ratio of at most 1"),
        ("--wire topk", "expected topk:RATIO, such as topk:0.01, got 'topk'"),
        ("--wire powersgd:", "expected powersgd:RANK, such as powersgd:4, got 'powersgd:'"),
        ("--dropout -0.1", "expected 0 or more, and less than 1, got -0.1"),
        ("--microbatches 4", "--microbatches 4 has no effect without --pipe P"),
        ("--schedule gpipe", "--schedule gpipe has no effect without --pipe P"),
        ("--balance time", "--balance time has no effect without --pipe P"),
        ("--checkpoint=", "--checkpoint: expected a path, got ''"),
        ("--report=", "--report: expected a path, got ''"),
        ("--schedule " + "x" * 300, "--schedule: expected a file, or one of: 1f1b"),
    ],
)
def test_refused_by_itself(options: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(options.split())


def test_options_of_a_pipe_are_taken_where_they_have_an_effect() -> None:
    for others in ("--pipe 1", "--pipe 2", "--recompute", "--reduction tree", "--dropout 0.1"):
        assert parse(["--microbatches", "4", *others.split()]).microbatches == 4
    assert parse([]).schedule == "1f1b" and parse([]).balance == "parameters"


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("5:2", "there is no rank 5, this job has ranks 0 to 1"),
        ("0:2,0:3", "rank 0 can leave only once"),
        ("0:2,1:3", "all 2 ranks leave"),
    ],
)
def test_ranks_that_cannot_leave(text: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        check_membership(parse(["--membership", text]), 2)
    check_membership(parse(["--membership", "1:4"]), 2)


def test_the_option_is_named_whose_file_cannot_be_written(tmp_path) -> None:
    files = {"--report": tmp_path / "r.json", "--trace": tmp_path / "no" / "t.json"}
    with pytest.raises(UsageError, match=r"^--trace .*t\.json: there is no folder"):
        check_writable(files)
    check_writable({**files, "--trace": None})
