"""What a benchmark refuses before it measures, and batches that ranks cannot share evenly."""

import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from linear import batch_of, check_ranks
from options import Parser, parser_of, plain_parser, read_alone
from scaling import check_grids, grids

from ringfold.workloads.options import UsageError

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--repeats", "0"], "--repeats: expected 1 or more, got 0"),
        (["--repeats", "-1"], "--repeats: expected 1 or more, got -1"),
        (["--budget", "nan"], "--budget: expected a finite number above 0, got nan"),
        (["--sizes", ""], "--sizes: expected a size such as 5B, got ''"),
        (["--sizes", "4,,8"], "--sizes: expected a size such as 5B, got ''"),
        (["--sizes", "1.2.3KiB"], "--sizes: expected a size such as 5B, got '1.2.3KiB'"),
        (["--sizes", "1e999"], "--sizes: expected a size that is finite"),
        (["--sizes", "4,0"], "--sizes: expected 1 B or more, got '4,0'"),
        (["--peers", "nccl"], "--peers: unknown 'nccl', expected: mpi, gloo"),
        (["--json", ""], "--json: expected a path, got ''"),
        (["--bogus"], "unrecognized arguments: --bogus"),
    ],
)
def test_an_option_is_refused_by_its_name(options: list[str], told: str) -> None:
    with pytest.raises(UsageError) as refused:
        parser_of("", sizes="4", peers=True).parse_args(options)
    assert told in str(refused.value) and "\n" not in str(refused.value)


def test_defaults_are_read_as_what_is_given() -> None:
    found = parser_of("", sizes="4,1KiB", peers=True).parse_args(["--peers", ""])
    assert (found.sizes, found.peers, found.repeats) == ([4, 1024], [], 100)
    assert parser_of("", sizes="").parse_args([]).sizes == []


def said(parser: Parser, monkeypatch: pytest.MonkeyPatch, *options: object) -> object:
    monkeypatch.setattr(sys, "argv", ["bench.py", *map(str, options)])
    with pytest.raises(SystemExit) as ended:
        read_alone(parser)
    return ended.value.code


def test_a_file_that_cannot_be_written_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "file"
    file.touch()
    for path in (tmp_path, file / "rows.json", Path("/proc/rows.json")):
        assert said(plain_parser(""), monkeypatch, "--json", path) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert "error: --json: " in line and str(path.parent) in line


def test_grids_whose_replicas_cannot_share_the_batch_are_left_out() -> None:
    """Two replicas of a batch of 3 trained on 2 of its rows, and were said to be wrong."""
    assert grids(2, 4) == [(2, 1), (1, 2)]
    assert grids(2, 3) == [(1, 2)]
    assert grids(6, 4) == [(2, 3), (1, 6)]
    with pytest.raises(UsageError, match="--batch 3: no grid of 8192 ranks"):
        check_grids(Namespace(batch=3, microbatches=8, schedule="1f1b"), 8192)


def test_the_rows_that_are_reported_are_those_that_are_trained_on() -> None:
    assert [batch_of(size) for size in (1, 2, 3, 5, 32)] == [32, 32, 30, 30, 32]
    with pytest.raises(UsageError, match="32 rows are shared out over 32 ranks at most, not 33"):
        check_ranks(Namespace(), 33)


def test_what_compiles_for_gpus_tells_its_use_where_it_cannot_compile() -> None:
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / "gpu_compiles.py"), "--help"],
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and "Compile one of the kernels" in done.stdout, done
