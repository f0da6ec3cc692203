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
    ],
)
def test_refused_by_itself(options: str, told: str) -> None:
    with pytest.raises(UsageError, match=told):
        parse(options.split())


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
