"""ringfold tune measures, later runs choose by it, and what cannot be used is said once."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

RUN = """
import numpy as np, ringfold
with ringfold.Communicator(settings=ringfold.Settings(shared=False, tuning=TUNING)) as comm:
    work = comm.allreduce(np.ones(1000), blocking=False)
    assert (work.wait() == comm.size).all()
    reasons = {comm.rank: work.receipt.reason}
    with comm.split(0) as group:
        work = group.allreduce(np.ones(3), blocking=False)
        work.wait()
    print("REASON", reasons, work.receipt.reason)
"""


def test_tune_and_use(job: Callable[..., Any], tmp_path: Path) -> None:
    path = tmp_path / "folder" / "tuning.json"
    done = job(2, ["-m", "ringfold", "tune"], "--out", path, timeout=60)
    assert done.returncode == 0, done.output
    assert "within a node (2 ranks, measured): latency" in done.stdout
    table = json.loads(path.read_text())
    assert table["intra"]["ranks"] == 2 and table["inter"] is None
    run = RUN.replace("TUNING", f"__import__('pathlib').Path({str(path)!r})")
    done = job(2, run)
    assert done.returncode == 0 and done.stdout.count(f"tuned on {table['date']}") == 4, done.output

    table["machine"]["cores"] += 1
    for text, why in ((json.dumps(table), "another machine"), ("{", "it is damaged")):
        path.write_text(text)
        done = job(2, run)
        assert done.returncode == 0 and done.stdout.count("default table") == 4, done.output
        assert done.stderr.count("is ignored") == 1 and why in done.stderr


def test_one_rank_has_nothing_to_measure(job: Callable[..., Any]) -> None:
    done = job(1, ["-m", "ringfold", "tune"])
    assert done.returncode == 2 and "one rank has no links" in done.stderr
