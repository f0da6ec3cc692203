"""A trace of all ranks: what it records, on one clock, and the bytes that it reports."""

import json
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import ringfold
from ringfold import CommError, Communicator, run_local
from ringfold.comm.clock import measure_offset
from ringfold.comm.trace import State
from ringfold.comm.trace_file import wire_bytes
from ringfold.parallel.hooks import WireHook
from ringfold.parallel.powersgd import PowerSGD
from ringfold.parallel.topk import TopK
from ringfold.parallel.tracing import trace


def model() -> nn.Sequential:
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(6, 10), nn.Tanh(), nn.Linear(10, 4))


def train(comm: Communicator, path: Path | None, **settings) -> tuple[str, list]:
    wrapped = ringfold.DataParallel(model(), comm, **settings)
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.1)
    with trace(comm, path) as found:
        for _ in range(2):
            optimizer.zero_grad()
            wrapped(torch.ones(3, 6)).square().sum().backward()
            optimizer.step()
    assert comm.timeline is None
    return str(found), found.rows


@pytest.mark.parametrize("name", ["missing/trace.json", ""])
def test_a_file_that_cannot_be_written_is_refused_before_anything_is_traced(
    name: str, tmp_path: Path
) -> None:
    """What was traced was lost: rank 0 found out at the end, and the others did not."""

    def main(comm: Communicator) -> None:
        with (
            pytest.raises(OSError, match="rank 0 cannot write the trace"),
            trace(comm, tmp_path / name),
        ):
            raise AssertionError("traced")
        assert comm.timeline is None

    run_local(2, main)
    assert not list(tmp_path.iterdir())


def test_a_disk_that_is_full_at_the_end_is_told_on_all_ranks_with_the_table_there() -> None:
    """Rank 0 raised alone, and the others went on into what it never called."""

    def main(comm: Communicator) -> int:
        with (
            pytest.raises(OSError, match="write the trace: /dev/full: No space left"),
            trace(comm, "/dev/full") as found,
        ):
            comm.barrier()
        comm.barrier()
        return len(found.rows)

    assert run_local(2, main) == [2, 0]


def test_a_trace_takes_the_place_of_the_old_one_at_once(tmp_path: Path) -> None:
    """It was written in place: where the disk was full, an empty file stayed in its place."""
    path = tmp_path / "trace.json"
    path.write_text("old")
    with path.open() as reader:
        run_local(2, lambda comm: train(comm, path))
        assert reader.read() == "old"
    assert json.loads(path.read_text()) and list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("size", [1, 2, 3])
def test_replicas_show_compute_packing_and_buckets(size: int, tmp_path: Path) -> None:
    path = tmp_path / "trace.json"
    texts = run_local(size, lambda comm: train(comm, path, bucket_bytes=100))
    assert texts[0][0].count("\n") == size
    assert all(text == "no trace on this rank" for text, _ in texts[1:])
    shown = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    for rank in range(size):
        mine = [event for event in shown if event["pid"] == rank]
        names = [e["name"] for e in sorted(mine, key=lambda e: e["ts"]) if e["cat"] == "compute"]
        assert names == ["forward", "backward", "optimizer"] * 2
        packed = [e for e in mine if e["cat"] == "pack"]
        reduced = [e for e in mine if e["name"].startswith("bucket") and e["tid"]]
        if size > 1:
            assert {e["name"] for e in packed} >= {"bucket 0", "bucket 1"}
            assert {e["name"] for e in reduced} >= {"bucket 0: allreduce", "bucket 1: allreduce"}
        else:
            assert not packed and not reduced


@pytest.mark.parametrize(
    ("wire", "elements_to_bytes"),
    [
        (None, lambda shapes: [4 * (sum(r * c for r, c in shapes) + len(shapes) + 1)]),
        ("bf16", lambda shapes: [2 * (sum(r * c for r, c in shapes) + len(shapes) + 1)]),
    ],
)
@pytest.mark.parametrize("size", [2, 3])
def test_wire_bytes_of_a_bucket_are_those_of_a_ring(size, wire, elements_to_bytes) -> None:
    shapes = [(10, 6), (10, 1), (4, 10), (4, 1)]
    _, rows = run_local(size, lambda comm: train(comm, None, wire=wire))[0]
    steps = 2
    expected = steps * sum(wire_bytes("allreduce", n, size) for n in elements_to_bytes(shapes))
    assert [row.wire_bytes for row in rows] == pytest.approx([expected] * size)


def reported(size: int, make: Callable[[], WireHook]) -> list[float]:
    """Return each rank's bytes of 2 steps of one matrix, by the trace."""

    def main(comm: Communicator):
        wrapped = ringfold.DataParallel(nn.Linear(32, 24, bias=False), comm, wire=make())
        with trace(comm) as found:
            for step in range(2):
                wrapped(torch.full((2, 32), step + 1.0)).sum().backward()
        return found.rows

    return [row.wire_bytes for row in run_local(size, main)[0]]


@pytest.mark.parametrize("size", [2, 3])
def test_wire_bytes_of_powersgd_are_those_of_its_factors(size: int) -> None:
    # Vogels et al. 2019, algorithm 1: P of n x r and Q of m x r are added; 2 flags of 4 bytes.
    rank = 2
    factors = sum(wire_bytes("allreduce", 4 * n * rank, size) for n in (24, 32))
    flags = wire_bytes("allreduce", 4 * 2, size)
    assert reported(size, lambda: PowerSGD(rank, start_step=0)) == pytest.approx(
        [2 * (factors + flags)] * size
    )


@pytest.mark.parametrize("size", [2, 3])
def test_wire_bytes_of_topk_are_those_of_values_and_places(size: int) -> None:
    kept = round(0.125 * 24 * 32)
    gathered = (size - 1) * kept * 8  # a float32 and an int32 each
    flags = wire_bytes("allreduce", 4 * 2, size)
    assert reported(size, lambda: TopK(0.125)) == pytest.approx([2 * (gathered + flags)] * size)


def test_a_pipeline_shows_its_actions_and_its_bubble(tmp_path: Path) -> None:
    path = tmp_path / "trace.json"

    def main(comm: Communicator) -> list:
        mesh = ringfold.Mesh(comm, data=1, pipe=2)
        engine = ringfold.Pipeline(
            list(model()), mesh, loss_fn=nn.functional.mse_loss, microbatches=3, schedule="gpipe"
        )
        with trace(comm, path) as found:
            engine.step(torch.ones(6, 6), torch.zeros(6, 4))
        engine.close()
        return found.rows

    rows = run_local(2, main)[0]
    assert all(row.bubble is not None and 0 < row.bubble < 1 for row in rows)
    shown = [e for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    for stage in range(2):
        mine = sorted((e for e in shown if e["pid"] == stage), key=lambda e: e["ts"])
        actions = [e["name"] for e in mine if e["cat"] == "compute"]
        assert actions == ["F0", "F1", "F2", "B0", "B1", "B2"]
        assert [e["name"] for e in mine if e["cat"] == "step"] == ["step 0"]


def test_a_relative_file_is_where_it_was_when_the_trace_began(tmp_path: Path, monkeypatch) -> None:
    """It was written, after all that was traced, wherever the program had gone meanwhile."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def main(comm):
        with ringfold.trace(comm, "trace.json"):
            os.chdir("elsewhere")

    run_local(1, main)
    assert (tmp_path / "trace.json").exists()


def test_clocks_that_differ_are_measured() -> None:
    skew = [0, 5_000_000_000, -3_000_000_000]

    def main(comm: Communicator):
        ahead = skew[comm.rank]
        return measure_offset(comm, lambda: time.monotonic_ns() + ahead, leaders=[0, 1, 2])

    for offset, ahead in zip(run_local(3, main), skew, strict=True):
        assert abs(offset.ahead - ahead) <= offset.error + 1
        assert offset.error < 1e9


def test_ranks_of_one_node_share_a_clock() -> None:
    assert {o.ahead for o in run_local(3, lambda comm: measure_offset(comm))} == {0.0}


def test_a_second_trace_is_refused_and_an_error_ends_the_first() -> None:
    def main(comm: Communicator) -> None:
        with pytest.raises(ZeroDivisionError), trace(comm):
            with pytest.raises(CommError, match="traced already"):
                comm.start_timeline()
            raise ZeroDivisionError
        assert comm.timeline is None
        with trace(comm) as found:
            comm.barrier()
        assert comm.rank or found.rows[0].communication > 0

    run_local(2, main)


def test_more_operations_than_the_ring_keeps_are_all_there() -> None:
    def main(comm: Communicator) -> int:
        timeline = comm.start_timeline()
        for _ in range(600):
            comm.allreduce(np.ones(1))
        comm.stop_timeline()
        assert timeline.thread == threading.get_ident()
        return len(timeline.operations) + timeline.lost * 1000

    assert run_local(2, main) == [600, 600]


@pytest.mark.parametrize("polled", [False, True])
def test_operations_in_flight_while_the_ring_wraps_are_all_there(polled: bool) -> None:
    """Of 600 allreduces that were started before any was waited for, 344 were lost.

    Operations were collected where a span ended, which polling by done() never makes; and what
    had left the ring before it ended could not be found at all.
    """
    count = 600
    started, now = threading.Event(), []

    def main(comm: Communicator) -> list:
        timeline = comm.start_timeline()
        if comm.rank:
            started.wait()
        works = [comm.allreduce(np.ones(1), blocking=False) for _ in range(count)]
        if not comm.rank:  # all are in flight, and most have left the ring
            now.append(time.monotonic_ns())
            started.set()
        if polled:
            while not all(work.done() for work in works):
                time.sleep(0)
        for work in works:
            work.wait()
        comm.stop_timeline()
        assert not timeline.lost
        return [operation.entry for operation in timeline.operations]

    first, second = run_local(2, main)
    for entries in (first, second):
        assert sorted(entry.sequence for entry in entries) == list(range(1, count + 1))
        assert all(entry.state is State.DONE and entry.start <= entry.end for entry in entries)
    assert all(entry.start < now[0] < entry.end for entry in first)


def test_an_operation_that_fails_after_it_has_left_the_ring_is_there_as_failed() -> None:
    """Its end is not noted in the ring any more: the work tells of it."""

    def main(comm: Communicator) -> list:
        if comm.rank:
            return []
        timeline = comm.start_timeline()
        late = comm.irecv(np.ones(1), 1)
        for _ in range(300):
            sent = comm.isend(np.ones(1), 0)
            comm.recv(np.ones(1), 0)
            sent.wait()
        late.fail(CommError("given up"))
        comm.stop_timeline()
        return [operation.entry for operation in timeline.operations]

    entries = run_local(2, main)[0]
    failed = [entry for entry in entries if entry.state is State.FAILED]
    assert len(entries) == 601 and min(entry.number for entry in entries) == failed[0].number
    assert len(failed) == 1
