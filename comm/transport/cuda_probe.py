"""Find out whether the MPI library sends device memory, by sending some in a child process.

A library that cannot would read a device address as a host address, and the process would die of
it; so a process that may die tries first. The answer holds for a version of the library.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from ..text_file import write_whole

SECONDS = 60.0

NBYTES = (64, 1 << 20)
"""A message that goes at once, and one that is announced first: MPI treats them differently."""

NO_CORE = """
import resource
resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
"""
"""Who may crash leaves no image of a process with a GPU's memory in the user's folder."""

CHILD = """
import sys
import cupy
from mpi4py import MPI
for nbytes in map(int, sys.argv[1:]):
    source = cupy.arange(nbytes, dtype=cupy.uint8) + cupy.uint8(7)
    target = cupy.zeros(nbytes, cupy.uint8)
    cupy.cuda.runtime.deviceSynchronize()
    MPI.COMM_SELF.Sendrecv([source, MPI.BYTE], 0, 0, [target, MPI.BYTE], 0, 0)
    if not bool((source == target).all()):
        sys.exit("what arrived is not what was sent")
print("sent device memory")
"""


@dataclass(frozen=True)
class Verdict:
    """Whether MPI sends device memory, and how that is known."""

    aware: bool
    reason: str


def probe(environ: Mapping[str, str], child: str = CHILD, seconds: float = SECONDS) -> Verdict:
    """Send device memory in a child process that is no rank of any job.

    environ: of the child, without what the launcher tells its ranks (`settings.beside_the_job`).
    """
    command = [sys.executable, "-c", NO_CORE + child, *map(str, NBYTES)]
    try:
        done = subprocess.run(
            command, env=dict(environ), capture_output=True, text=True, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        return Verdict(False, f"the process that tried has not ended after {seconds:g} s")
    except OSError as error:
        return Verdict(False, f"no process could be started to try it: {error}")
    if done.returncode == 0 and "sent device memory" in done.stdout:
        return Verdict(True, "a process that tried sent device memory")
    said = done.stderr.strip().splitlines()
    last = said[-1][:200] if said else "without a word"
    how = f"signal {-done.returncode}" if done.returncode < 0 else f"status {done.returncode}"
    return Verdict(False, f"the process that tried ended with {how}: {last}")


def recalled(path: Path | None, key: str) -> Verdict | None:
    """Return what an earlier probe found for a key; None where nothing can be read."""
    try:
        found = json.loads(path.read_text())[key] if path else None
        return None if found is None else Verdict(bool(found["aware"]), str(found["reason"]))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None


def remember(path: Path | None, key: str, verdict: Verdict) -> None:
    """Keep an answer, where it can be written; a file that cannot is no error."""
    if path is None:
        return
    try:
        known = json.loads(path.read_text())
        if not isinstance(known, dict):
            known = {}
    except (OSError, ValueError, RecursionError):
        known = {}
    known[key] = {"aware": verdict.aware, "reason": verdict.reason}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(known, indent=1))
    except OSError:
        return


def gpu_aware(
    environ: Mapping[str, str], path: Path | None, key: str, child: str = CHILD
) -> Verdict:
    """Return the answer for a library, probing where it is not known yet; not collective.

    key: what the answer depends on: MPI library, CUDA driver, CuPy.
    """
    known = recalled(path, key)
    if known is None:
        known = probe(environ, child)
        remember(path, key, known)
    return known
