"""What was to be reached, and where in the results to find what was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

KIB, MIB = 1 << 10, 1 << 20

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """One ratio or figure, and where it was measured."""

    value: float
    where: str


@dataclass(frozen=True)
class Goal:
    """What was to be reached. find: all that was measured; at_most: smaller is better."""

    what: str
    least: float
    find: Callable[[Sequence[Row]], Iterator[Measured]]
    unit: str = " x"
    aim: float | None = None
    at_most: bool = False

    def worst(self, rows: Sequence[Row]) -> Measured | None:
        """Return the figure that decides, None where nothing was measured."""
        found = list(self.find(rows))
        choose = max if self.at_most else min
        return choose(found, key=lambda one: one.value) if found else None

    def reached(self, value: float) -> bool:
        return value <= self.least if self.at_most else value >= self.least


def faster(
    impl: str, peer: str, low: int, high: int, ranks: Sequence[int] = (2, 4)
) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find peer's time / impl's of an fp32 allreduce on one node, at every size in low..high.

    Beside a size of registered memory stands what its share would be at the measured limit.
    """

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        times = allreduces(rows, "float32")
        for (name, nbytes, size), row in times.items():
            other = times.get((peer, nbytes, size))
            if name == impl and low <= nbytes <= high and size in ranks and other:
                where, limit = place(row), times.get(("limit", nbytes, size))
                if impl == "registered" and peer != "limit" and limit:
                    where += f"; memory allows {other['median_us'] / limit['median_us']:.3g}"
                yield Measured(other["median_us"] / row["median_us"], where)

    return find


def halves(rows: Sequence[Row]) -> Iterator[Measured]:
    """Find the bandwidth of bfloat16 over that of float32, from 16 MiB on."""
    wide, narrow = allreduces(rows, "float32"), allreduces(rows, "bfloat16")
    for key, row in narrow.items():
        if key[0] == "registered" and key[1] >= 16 * MIB and key in wide:
            yield Measured(row["algbw_gbs"] / wide[key]["algbw_gbs"], place(row))


def allreduces(rows: Sequence[Row], dtype: str) -> dict[tuple[str, int, int], Row]:
    return {
        (row["impl"], row["nbytes"], row["ranks"]): row
        for row in rows
        if row.get("collective") == "allreduce"
        and row["dtype"] == dtype
        and row.get("nodes", 1) == 1
    }


def value(key: str, **where: Any) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find a figure as it stands in the rows that fit."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in rows:
            if key in row and all(row.get(name) == wanted for name, wanted in where.items()):
                yield Measured(row[key], place(row))

    return find


def share_of_link(rows: Sequence[Row]) -> Iterator[Measured]:
    """Find the bandwidth between two hosts at 16 MiB, as a share of the link's one-way rate."""
    for row in rows:
        chosen = row.get("nodes", 1) == 2 and "(chosen)" in row["algorithm"]
        if chosen and row["nbytes"] == 16 * MIB:
            yield Measured(row["share"], place(row))


def share_of_checks(transport: str) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find what the checks take of an allreduce of 64 KiB and more."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in rows:
            mine = row.get("impl") == "checked" and row["transport"] == transport
            if mine and row["nbytes"] >= 64 * KIB:
                yield Measured(row["share"], place(row))

    return find


def beside(base: str, **where: Any) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find the time of a step of `base` over ours, on 2 ranks, and what it is at the limit."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        wanted = {"ranks": 2, "device": "cpu", **where}
        times = {
            row["impl"]: row["median_us"]
            for row in ({"device": "cpu", **row} for row in rows)
            if all(row.get(name) == one for name, one in wanted.items()) and "median_us" in row
        }
        if "ours" in times and base in times:
            most = f"; at the limit {times[base] / times['limit']:.3g}" if "limit" in times else ""
            yield Measured(times[base] / times["ours"], f"2 ranks{most}")

    return find


def kernels(*names: str) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find the rate of GPU kernels over that of a copy, from 16 MiB of float32 on."""

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        for row in rows:
            if row.get("kernel", "").startswith(names) and row["size"] >= 16 * MIB:
                yield Measured(row["share"], f"{row['kernel']}, {place({'nbytes': row['size']})}")

    return find


def on_gpu(
    impl: str, peer: str, *, mps: bool = False
) -> Callable[[Sequence[Row]], Iterator[Measured]]:
    """Find peer's time / impl's of an allreduce of 64 MiB of GPU memory on 2 ranks.

    mps: of ranks side by side on the card, by NVIDIA's MPS, or of ranks that take turns there.
    """

    def find(rows: Sequence[Row]) -> Iterator[Measured]:
        times = {
            row["impl"]: row
            for row in rows
            if "card" in row
            and row.get("nbytes") == 64 * MIB
            and "microseconds" in row
            and row.get("ranks") == 2
            and row.get("mps", False) == mps
        }
        if impl in times and peer in times:
            ours, other = times[impl], times[peer]
            where = f"{place(ours)}, {ours['transport']}"
            yield Measured(other["microseconds"] / ours["microseconds"], where)

    return find


def place(row: Row) -> str:
    """Say where a row was measured."""
    parts = [f"{row['ranks']} ranks"] if "ranks" in row else []
    if "nbytes" in row:
        nbytes = row["nbytes"]
        unit, name = next(
            (pair for pair in ((MIB, "MiB"), (KIB, "KiB")) if nbytes >= pair[0]), (1, "B")
        )
        parts.insert(0, f"{nbytes / unit:g} {name}")
    return ", ".join(parts)


GOALS = (
    Goal(
        "registered fp32 allreduce, 16 KiB-64 MiB, against MPI's own in place",
        4,
        faster("registered", "mpi", 16 * KIB, 64 * MIB),
    ),
    Goal(
        "the same through a plan, 4 B-4 KiB",
        0.9,
        faster("plan", "mpi", 4, 4 * KIB),
        aim=1.0,
    ),
    Goal(
        "ordinary arrays against the same, 16 KiB-16 MiB",
        1,
        faster("ordinary", "mpi", 16 * KIB, 16 * MIB),
        aim=1.5,
    ),
    Goal("the same, 64 MiB", 2, faster("ordinary", "mpi", 64 * MIB, 64 * MIB), aim=4),
    Goal("registered against gloo, up to 1 MiB", 40, faster("registered", "gloo", 0, MIB)),
    Goal("the same, 64 MiB", 8, faster("registered", "gloo", 64 * MIB, 64 * MIB)),
    Goal(
        "share of the measured memory limit, registered, >= 16 MiB, 2 ranks",
        0.7,
        faster("registered", "limit", 16 * MIB, 1 << 62, ranks=(2,)),
        unit="",
        aim=0.85,
    ),
    Goal("bf16 against fp32, registered, >= 16 MiB, in GB/s", 0.8, halves, unit=""),
    Goal(
        "two hosts, 1 Gbit/s, 16 MiB, 1 and 2 ranks a host, busbw / the link's one-way rate",
        0.85,
        share_of_link,
        unit="",
    ),
    Goal(
        "MLP of 16.8 M parameters, 2 ranks, step time alone / with sync",
        0.93,
        beside("alone", model="mlp"),
        unit="",
    ),
    Goal(
        "workload linear, 2 ranks, steps/s against DDP on gloo", 8, beside("ddp", workload="linear")
    ),
    Goal(
        "import ringfold without torch",
        0.2,
        value("seconds", what="import"),
        unit=" s",
        at_most=True,
    ),
    Goal(
        "first allreduce, compiled before",
        1.5,
        value("seconds", what="first allreduce, warm"),
        unit=" s",
        at_most=True,
    ),
    Goal(
        "first allreduce, nothing compiled before",
        20,
        value("seconds", what="first allreduce, cold"),
        unit=" s",
        at_most=True,
    ),
    Goal(
        "memory that an allreduce of ordinary arrays needs besides them, a rank",
        4,
        value("mib", what="memory"),
        unit=" MiB",
        at_most=True,
    ),
    Goal(
        "checks of a planned allreduce of 4 bytes, in shared memory",
        0.3,
        value("checks_us", impl="checked", transport="shared", nbytes=4),
        unit=" us",
        at_most=True,
    ),
    Goal(
        "the same from 64 KiB on, as a share of its time",
        0.02,
        share_of_checks("shared"),
        unit="",
        at_most=True,
    ),
    Goal(
        "the same over messages within one node",
        0.02,
        share_of_checks("messages"),
        unit="",
        at_most=True,
    ),
)


GPU_GOALS = (
    Goal(
        "pack, unpack and cast kernels, >= 16 MiB, against a copy of as many bytes",
        0.85,
        kernels("pack", "unpack", "cast"),
        unit="",
    ),
    Goal(
        "share of what the card's memory allows, allreduces over ipc in a row, 64 MiB, 2 ranks",
        0.7,
        on_gpu("ours, registered, in a row", "limit"),
        unit="",
    ),
    Goal(
        "the same, under MPS",
        0.7,
        on_gpu("ours, registered, in a row", "limit", mps=True),
        unit="",
    ),
    Goal("each waited for, under MPS", 0.7, on_gpu("ours, registered", "limit", mps=True), unit=""),
    Goal("ipc against gloo", 10, on_gpu("ours, registered", "gloo")),
    Goal("the same, under MPS", 10, on_gpu("ours, registered", "gloo", mps=True)),
    Goal("ordinary GPU memory against gloo", 1.5, on_gpu("ours", "gloo")),
)
"""What one card is to reach, with ranks that share it."""
