"""Compare two runs of train.py: name the first step and tensor that differ, and by how much."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["Difference", "Unreadable", "compare"]


class Unreadable(Exception):
    """A report, or a dump that it names, cannot be read."""


@dataclass(frozen=True)
class Difference:
    """One thing that two runs do not agree on.

    step: from 1 on; None for what holds for the whole run.
    """

    step: int | None
    what: str
    how: str

    def __str__(self) -> str:
        where = "" if self.step is None else f"step {self.step}: "
        return f"{where}{self.what}: {self.how}"


def compare(first: Path, second: Path, rtol: float = 0.0) -> list[Difference]:
    """Return the first difference of each kind: settings, weights, dumps, losses, final metric.

    Weights are compared where both reports name a dump; their digests where none of these differs.
    rtol: largest relative difference that counts as none; 0 for equality to the last bit, which
    alone a digest can tell.

    Raises: Unreadable; ValueError for an rtol that is negative or not finite.
    """
    if not 0 <= rtol < math.inf:
        raise ValueError(f"expected an rtol that is 0 or more and finite, got {rtol}")
    reports = [_read(path) for path in (first, second)]
    dumps = _dumps(reports)
    found = [
        Difference(None, key, f"{reports[0].get(key)} against {reports[1].get(key)}")
        for key in ("workload", "steps")
        if reports[0].get(key) != reports[1].get(key)
    ]
    for kind in (
        _weights(reports, dumps, rtol),
        _lacking(dumps),
        _losses(reports, rtol),
        _metrics(reports, rtol),
    ):
        found += [difference for difference in [next(kind, None)] if difference is not None]
    return found


def _read(path: Path) -> dict[str, Any]:
    try:
        report = json.loads(path.read_text())
    except OSError as error:
        raise Unreadable(f"{path}: expected a report of train.py: {error.strerror}") from None
    except ValueError as error:
        raise Unreadable(f"{path}: expected a report of train.py: {error}") from None
    if not isinstance(report, dict) or not isinstance(report.get("losses"), list):
        raise Unreadable(f"{path} is no report of train.py")
    metrics = report.setdefault("final_metric", {})
    if not isinstance(metrics, dict):
        raise Unreadable(f"{path}: expected numbers by name in final_metric, got {metrics!r}")
    for number in (*report["losses"], *metrics.values()):
        if not isinstance(number, int | float):
            raise Unreadable(f"{path}: expected a number, got {number!r}")
    return report


def _off(a: float, b: float) -> float:
    """Return the relative difference of two numbers, 0 for equal ones and for two NaN."""
    if a == b or (math.isnan(a) and math.isnan(b)):
        return 0.0
    scale = max(abs(a), abs(b))
    return abs(a - b) / scale if math.isfinite(a) and math.isfinite(b) else math.inf


def _unlike(a: float | None, b: float | None, rtol: float) -> str:
    """Return how two numbers differ, nothing where they do not; None is one that is not there."""
    if a is None or b is None:
        return _only(a is None)
    off = _off(a, b)
    return f"{a!r} against {b!r}, relative difference {off:.3g}" if off > rtol else ""


def _only(second: bool) -> str:
    return f"only in the {'second' if second else 'first'} run"


def _losses(reports: Sequence[dict[str, Any]], rtol: float) -> Iterator[Difference]:
    for step, (a, b) in enumerate(zip_longest(*(report["losses"] for report in reports)), 1):
        if how := _unlike(a, b, rtol):
            yield Difference(step, "loss", how)


def _metrics(reports: Sequence[dict[str, Any]], rtol: float) -> Iterator[Difference]:
    first, second = (report["final_metric"] for report in reports)
    for name in sorted(first.keys() | second.keys()):
        if how := _unlike(first.get(name), second.get(name), rtol):
            yield Difference(None, name, how)


Dumped = dict[int, list[Path]]
"""step -> the files that hold its weights."""


def _dumps(reports: Sequence[dict[str, Any]]) -> list[Dumped]:
    """Return what both runs have dumped; nothing where one has none."""
    folders = [report.get("dump") for report in reports]
    return [_steps(Path(str(folder))) for folder in folders] if all(folders) else []


def _weights(
    reports: Sequence[dict[str, Any]], dumps: Sequence[Dumped], rtol: float
) -> Iterator[Difference]:
    for step in sorted(set.intersection(*map(set, dumps))) if dumps else ():
        first, second = (_tensors(dump[step]) for dump in dumps)
        for name in [*first, *(name for name in second if name not in first)]:
            how = _differ(first.get(name), second.get(name), rtol)
            if how:
                yield Difference(step, name, how)
    a, b = (report.get("weights_sha256") for report in reports)
    if a != b and not rtol:
        more = "no tensor that both dumped differs"
        if not dumps:
            more = "runs with --dump DIR tell which step and tensor"
        yield Difference(None, "weights_sha256", f"{a} against {b}; {more}")


def _lacking(dumps: Sequence[Dumped]) -> Iterator[Difference]:
    for step in sorted(set.symmetric_difference(*map(set, dumps))) if dumps else ():
        yield Difference(step, "dump", _only(step in dumps[1]))


def _steps(folder: Path) -> Dumped:
    from .workloads.dump import step_of

    steps: Dumped = {}
    for path in sorted(folder.glob("step*.safetensors")):
        steps.setdefault(step_of(path), []).append(path)
    if not steps:
        raise Unreadable(f"there is no dump in {folder}")
    return steps


def _tensors(paths: Sequence[Path]) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found: dict[str, Tensor] = {}
    for path in paths:
        try:
            found |= load_file(path)
        except (OSError, SafetensorError) as error:
            raise Unreadable(f"{path}: {error}") from None
    return dict(sorted(found.items()))


def _differ(a: Tensor | None, b: Tensor | None, rtol: float) -> str:
    """Return how two tensors differ, nothing where they do not."""
    import torch

    if a is None or b is None:
        return _only(a is None)
    if a.shape != b.shape or a.dtype != b.dtype:
        return f"{a.dtype} {tuple(a.shape)} against {b.dtype} {tuple(b.shape)}"
    if torch.equal(*(x.flatten().view(torch.uint8) for x in (a, b))):
        return ""
    wide, other = (x.double().flatten() for x in (a, b))
    gap = (wide - other).abs()
    scale = torch.maximum(wide.abs(), other.abs())
    off = torch.where(gap == 0, 0.0, gap / scale).nan_to_num(math.inf, math.inf)
    off[wide.isnan() & other.isnan()] = 0.0
    worst = int(off.argmax())
    if float(off[worst]) <= rtol and rtol:
        return ""
    num = int((gap != 0).sum())
    place = [int(k) for k in torch.unravel_index(torch.tensor(worst), a.shape)]
    return (
        f"{num} of {a.numel()} elements, largest relative difference {float(off[worst]):.3g} at "
        f"{place}: {float(wide[worst])!r} against {float(other[worst])!r}, largest difference "
        f"{float(gap.max()):.3g}"
    )
