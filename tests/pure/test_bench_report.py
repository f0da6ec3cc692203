"""The report of the benchmarks: the worst place decides, and what is missing is said to be."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import report
from harness import commit_of


def row(impl: str, nbytes: int, ranks: int, median_us: float, dtype: str = "float32") -> dict:
    return {
        "impl": impl, "collective": "allreduce", "dtype": dtype, "nbytes": nbytes, "ranks": ranks,
        "median_us": median_us, "algbw_gbs": nbytes / median_us / 1e3, "wrong": 0,
    }  # fmt: skip


def line(rows: list[dict], start: str) -> str:
    return next(text for text in report.lines(rows) if text.startswith(f"| {start}"))


def test_the_worst_size_and_number_of_ranks_decides() -> None:
    rows = [
        row(impl, nbytes, ranks, us)
        for nbytes, ranks, ours, theirs in ((16384, 2, 10, 90), (1 << 20, 4, 10, 45))
        for impl, us in (("registered", ours), ("mpi", theirs))
    ]
    assert "| 4.5 x | 1 MiB, 4 ranks | reached |" in line(rows, "registered fp32 allreduce")
    rows[-1]["median_us"] = 39
    assert "| 3.9 x | 1 MiB, 4 ranks | **missed** |" in line(rows, "registered fp32 allreduce")


def test_sizes_outside_of_a_goal_do_not_count() -> None:
    rows = [row("registered", 4, 2, 10), row("mpi", 4, 2, 5)]
    assert line(rows, "registered fp32 allreduce").endswith("| - | - | not measured |")
    assert all("not measured" in text for text in list(report.lines([]))[2:])


def test_shares_and_times_are_read_in_the_right_direction() -> None:
    nbytes = 16 << 20
    rows = [
        row("registered", nbytes, 2, 400),
        row("limit", nbytes, 2, 300),
        row("registered", nbytes, 2, 480, "bfloat16"),
        {"what": "import", "seconds": 0.25},
    ]
    assert "| 0.75 | 16 MiB, 2 ranks | reached |" in line(rows, "share of the measured")
    assert "| 0.833 | 16 MiB, 2 ranks | reached |" in line(rows, "bf16 against fp32")
    assert "| 0.25 s |  | **missed** |" in line(rows, "import ringfold")


def test_steps_say_what_the_limit_would_allow() -> None:
    times = {"alone": 60.0, "limit": 75.0, "ours": 100.0, "ddp": 150.0}
    rows = [
        {"impl": impl, "model": "mlp", "ranks": 2, "median_us": us} for impl, us in times.items()
    ]
    assert "| 0.6 | 2 ranks; at the limit 0.8 | **missed** |" in line(rows, "MLP")
    rows = [
        {"impl": impl, "workload": "linear", "ranks": 2, "median_us": us}
        for impl, us in times.items()
        if impl != "limit"
    ]
    assert "| 1.5 x | 2 ranks | **missed** |" in line(rows, "workload linear")


def test_what_a_card_reached_stands_apart() -> None:
    def measured(impl: str, microseconds: float, transport: str = "ipc", mps: bool = False) -> dict:
        return {
            "card": "a card", "mps": mps, "ranks": 2, "impl": impl, "nbytes": 64 << 20,
            "microseconds": microseconds, "transport": transport, "wrong": 0,
        }  # fmt: skip

    found = [
        measured("ours, registered", 100),
        measured("ours, registered, in a row", 90),
        measured("ours, registered, in a row", 77, mps=True),
        measured("ours", 4000, "staged, shared"),
        measured("limit", 75, "-"),
        measured("gloo", 5000, "host"),
        measured("ours, registered", 80, mps=True),
        measured("limit", 76, "-", mps=True),
        *(
            {"card": "a card", "kernel": name, "size": size, "nbytes": 2 * size, "share": share}
            for name, size, share in (
                ("pack bfloat16", 16 << 20, 0.9),
                ("cast float32 to bfloat16", 64 << 20, 0.8),
                ("cast float32 to bfloat16", 1 << 20, 0.1),
                ("mask", 64 << 20, 0.1),
            )
        ),
    ]
    text = list(report.cards(found))
    assert text[0] == "On one a card:"
    wanted = (
        "| 0.8 | cast float32 to bfloat16, 64 MiB | **missed** |",
        "| 0.833 | 64 MiB, 2 ranks, ipc | reached |",
        "| 0.987 | 64 MiB, 2 ranks, ipc | reached |",
        "| 0.95 | 64 MiB, 2 ranks, ipc | reached |",
        "| 50 x | 64 MiB, 2 ranks, ipc | reached |",
        "| - | - | not measured |",
        "| 1.25 x | 64 MiB, 2 ranks, staged, shared | **missed** |",
    )
    for line, end in zip(text[4:11], wanted, strict=True):
        assert line.endswith(end), line
    assert not list(report.cards([row("registered", 4, 2, 10)]))


def test_steps_on_a_gpu_do_not_count_as_the_hosts() -> None:
    rows = [
        {"impl": impl, "model": "mlp", "ranks": 2, "median_us": us, "device": device}
        for device, factor in (("cpu", 1.0), ("a card", 0.01))
        for impl, us in (("alone", 60.0), ("ours", 100.0 * factor))
    ]
    assert "| 0.6 | 2 ranks |" in line(rows, "MLP")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "Expecting value"),
        ('{"machine": {', "Expecting property name"),
        ("[]", "expected a machine and rows"),
        ('{"losses": [1.0]}', "expected a machine and rows"),
        ('{"machine": {"cpu": "x"}, "rows": []}', "lacks cores, mpi, python"),
        (json.dumps({"machine": dict.fromkeys(report.ORIGIN), "rows": [1]}), "its rows are none"),
    ],
)
def test_a_file_that_is_no_result_is_named_in_one_line(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    text: str,
    told: str,
) -> None:
    (tmp_path / "foreign.json").write_text(text)
    monkeypatch.setattr(sys, "argv", ["report.py", str(tmp_path)])
    assert report.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert str(tmp_path / "foreign.json") in line and told in line
    assert not (tmp_path / "README.md").exists()


def test_results_that_a_run_has_written_do_not_change_its_commit(tmp_path: Path) -> None:
    """`make bench` wrote one result, and the next was of "a1ac688-dirty"."""

    def git(*arguments: str) -> None:
        who = ["-c", "user.name=x", "-c", "user.email=x@localhost"]
        subprocess.run(["git", *who, *arguments], cwd=tmp_path, check=True)

    result = tmp_path / "benchmarks" / "results" / "a.json"
    code = tmp_path / "benchmarks" / "a.py"
    result.parent.mkdir(parents=True)
    for path in (result, code):
        path.write_text("1")
    git("init", "--quiet")
    git("add", ".")
    git("commit", "--quiet", "--message=first")
    clean = commit_of(tmp_path)
    assert "dirty" not in clean
    result.write_text("2")
    assert commit_of(tmp_path) == clean
    code.write_text("2")
    assert commit_of(tmp_path) == f"{clean}-dirty"
