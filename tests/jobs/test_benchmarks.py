"""The benchmarks as a user starts them, and PR-28: a figure that no hardware can reach."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
ROW = {
    "impl", "collective", "dtype", "op", "nbytes", "count", "ranks", "algorithm", "median_us",
    "p99_us", "algbw_gbs", "busbw_gbs", "wrong",
}  # fmt: skip

# Each rank sleeps differently, and once very long; then one rank's data is wrong.
SLEEPING = """
import sys, time
sys.path.insert(0, sys.argv[1])
import ringfold
from harness import Contender, contest, rates, verdict

comm = ringfold.Communicator()
calls = []

def sleep():
    calls.append(None)
    time.sleep(1 if len(calls) == 1 else 0.03 if comm.rank == 1 else 0.01)

def row(outcome):
    return {"impl": "fake", "nbytes": 1_000_000, "ranks": comm.size, "wrong": outcome.wrong}

outcome, = contest(comm, [Contender("fake", sleep)], repeats=10, warmup=1)
median = outcome.timing.median
algbw, busbw = rates("allreduce", 1_000_000, comm.size, median)
right = verdict([row(outcome)])
# One write, since the ranks share the output.
sys.stdout.write(f"rank {comm.rank} {median} {algbw} {busbw} {right}\\n")
sys.stdout.flush()

bad = Contender("fake", lambda: None, wrong=lambda result: 5 * (comm.rank == comm.size - 1))
status = verdict([row(outcome) for outcome in contest(comm, [bad])], speak=comm.rank == 0)
comm.close()
sys.exit(status)
"""


@pytest.mark.parametrize(("ranks", "factor"), [(1, 0.0), (2, 1.0), (4, 1.5)])
def test_pr28_the_slowest_rank_counts_the_first_call_does_not_and_wrong_data_fails(
    job: Callable[..., Any], ranks: int, factor: float
) -> None:
    done = job(ranks, SLEEPING, BENCHMARKS)
    lines = [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("rank ")]
    assert len(lines) == ranks, done.output
    assert len({tuple(line[1:]) for line in lines}) == 1, "ranks report different figures"
    median, algbw, busbw, right = map(float, lines[0][1:])
    slowest = 0.03 if ranks > 1 else 0.01
    assert slowest <= median <= 1.3 * slowest
    assert algbw == pytest.approx(1e6 / median / 1e9)
    assert busbw == pytest.approx(factor * algbw)
    assert right == 0
    assert done.returncode != 0
    assert f"failed: impl fake, nbytes 1000000, ranks {ranks}: 5 elements" in done.output


@pytest.fixture
def bench(job: Callable[..., Any], tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    """Run a benchmark on some ranks with little to do, and return the rows of its JSON file."""

    def run(ranks: int, script: str, *options: object, few: bool = True) -> list[dict[str, Any]]:
        path, picture = tmp_path / "out" / "rows.json", tmp_path / "out" / "rows.png"
        short = ("--repeats", 3, "--budget", 0.05) if few else ()
        options = (*options, *short, "--json", path, "--plot", picture)
        done = job(ranks, BENCHMARKS / script, *options, timeout=110)
        assert done.returncode == 0 and not done.leftovers, done.output
        assert picture.read_bytes().startswith(b"\x89PNG")
        record = json.loads(path.read_text())
        assert record.keys() == {"benchmark", "machine", "rows"}
        assert record["machine"].keys() >= {"cpu", "cores", "mpi", "commit"}
        assert record["rows"]
        return record["rows"]

    return run


def check_rows(rows: list[dict[str, Any]], ranks: int) -> None:
    for row in rows:
        assert row.keys() >= ROW
        assert row["ranks"] == ranks and row["wrong"] == 0
        assert 0 < row["median_us"] <= row["p99_us"]


def test_allreduce_beside_its_peers(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(2, "allreduce.py", "--sizes", "4,6KiB,64KiB", "--dtype", "float32,bfloat16")
    check_rows(rows, 2)
    impls = {"registered", "plan", "ordinary", "mpi", "gloo"}
    for nbytes, dtype, expected in (
        (4, "float32", impls),
        (65536, "float32", impls | {"limit"}),
        (6144, "bfloat16", impls - {"mpi"}),
    ):
        found = {r["impl"] for r in rows if (r["nbytes"], r["dtype"]) == (nbytes, dtype)}
        assert found == expected


@pytest.mark.slow
def test_every_collective_on_three_ranks(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(3, "collectives.py", "--sizes", "4,70KiB", "--peers", "mpi")
    check_rows(rows, 3)
    assert {row["collective"] for row in rows} == {
        "reduce", "broadcast", "allgather", "reduce_scatter", "gather", "scatter", "alltoall",
        "send", "sendrecv",
    }  # fmt: skip
    assert {row["nbytes"] for row in rows} == {4, 12, 71676, 71680}


def test_training_steps_beside_torch(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(2, "train_step.py", "--scale", 32)
    assert [(row["model"], row["impl"]) for row in rows] == [
        (model, impl)
        for model in ("mlp", "transformer")
        for impl in ("alone", "no_sync", "limit", "ours", "ddp")
    ]
    for row in rows:
        assert row["ranks"] == 2 and row["wrong"] == 0 and row["median_us"] > 0
        if row["impl"] == "ours":
            assert row["buckets"]
            # The reduction of a bucket has the bytes of its gradients, all of them together.
            assert sum(bucket["nbytes"] for bucket in row["buckets"]) == 4 * row["parameters"]
            for bucket in row["buckets"]:
                assert bucket["exposed_us"] >= 0 and bucket["hidden_us"] >= 0


@pytest.mark.slow
def test_the_linear_workload_beside_torch(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(3, "linear.py", "--steps", 3)
    assert [row["impl"] for row in rows] == ["alone", "no_sync", "limit", "ours", "ddp"]
    assert all(row["wrong"] == 0 and row["steps_per_second"] > 0 for row in rows)


@pytest.mark.slow
def test_pipeline_plans_beside_torch(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(3, "pipeline.py", "--width", 16, "--rows", 2, "--microbatches", 4)
    plans = {(row["impl"], row["plan"]): row for row in rows}
    assert {("alone", "-"), ("busy", "-"), ("ours", "gpipe"), ("torch", "1f1b")} <= plans.keys()
    assert all(row["wrong"] == 0 for row in rows)
    # (stages - 1) / (micro-batches + stages - 1), Huang et al. 2019, section 3.
    for plan in ("gpipe", "1f1b"):
        assert plans["ours", plan]["simulated_bubble"] == pytest.approx(2 / 6)


def test_what_the_checks_of_a_collective_cost(bench: Callable[..., list[dict[str, Any]]]) -> None:
    small, large = bench(2, "checks.py", "--sizes", "4,64KiB")
    assert (small["nbytes"], large["nbytes"]) == (4, 65536)
    for row in (small, large):
        assert row["checks_us"] > 0
        assert row["share"] == pytest.approx(row["checks_us"] / row["median_us"])
        assert row["wrong"] == 0


@pytest.mark.slow
def test_grids_of_the_text_workload(bench: Callable[..., list[dict[str, Any]]]) -> None:
    rows = bench(2, "scaling.py", "--batch", 2, "--microbatches", 2)
    assert [(row["impl"], row["data"], row["pipe"]) for row in rows] == [
        ("alone", 1, 1), ("ours", 2, 1), ("ours", 1, 2),
    ]  # fmt: skip
    assert all(row["wrong"] == 0 for row in rows)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--dtype", "float31"), "--dtype: unknown 'float31', expected: float32"),
        (("--json", "/proc/rows.json"), "--json: "),  # rank 0 alone writes
    ],
)
def test_what_is_refused_is_said_once_and_ends_every_rank(
    job: Callable[..., Any], options: tuple[str, str], said: str
) -> None:
    done = job(2, BENCHMARKS / "allreduce.py", *options)
    lines = [line for line in done.output.splitlines() if "error: " in line]
    assert done.returncode == 2 and len(lines) == 1 and said in lines[0], done.output
    assert "Traceback" not in done.output and "measured" not in done.output
