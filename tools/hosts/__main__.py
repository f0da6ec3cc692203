"""Run a program under mpirun on two hosts that this machine makes of itself.

    python tools/hosts --ranks-per-host 2 -- python train.py

Ends with the program's status, or with 77 and the reason where the machine does not allow hosts.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from network import PIDS, Host, Refused, hosts, isolate, require_tools

SKIPPED = 77
"""Exit status: not run, as this machine cannot; the number that test harnesses agree on."""


def main() -> int:
    """Make the hosts, run the program on them, remove them."""
    arguments = _parser().parse_args()
    # The first process of a process namespace is sent only the signals that it handles.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))
    try:
        require_tools()
        mpirun = _mpirun()
        isolate([sys.executable, *sys.orig_argv[1:]])
        with hosts(arguments.rate) as pair, tempfile.TemporaryDirectory() as folder:
            return _launch(mpirun, pair, arguments.ranks_per_host, arguments.program, folder)
    except Refused as reason:
        print(f"two hosts: skipped: {reason}", file=sys.stderr)
        return SKIPPED


def _parser() -> argparse.ArgumentParser:
    assert __doc__
    parser = argparse.ArgumentParser(prog="tools/hosts", description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks-per-host", type=int, default=1)
    parser.add_argument("--rate", default="1gbit", help="of the link, each way, as tc writes it")
    parser.add_argument("program", nargs="+", help="after --: the program and its arguments")
    return parser


def _mpirun() -> str:
    beside = Path(sys.executable).with_name("mpirun")
    found = str(beside) if beside.exists() else shutil.which("mpirun")
    if found is None:
        raise Refused("there is no mpirun beside the interpreter or on PATH")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if "Open MPI) 5" not in version:
        raise Refused(f"needs Open MPI 5's mpirun, {found} is {version.strip()[:60]!r}")
    return found


def _launch(
    mpirun: str, pair: tuple[Host, ...], ranks_per_host: int, program: list[str], folder: str
) -> int:
    places = ",".join(f"{host.name}:{ranks_per_host}" for host in pair)
    command = [mpirun, "--prtemca", "plm_ssh_agent", str(Path(__file__).with_name("agent"))]
    command += ["--host", places, "--map-by", f"ppr:{ranks_per_host}:node:oversubscribe"]
    command += ["--mca", "pml", "ob1", "--mca", "btl", "self,sm,tcp"]
    environment = {
        **os.environ,
        PIDS: " ".join(f"{host.name}={host.pid}" for host in pair),
        "TMPDIR": folder,
    }
    return subprocess.run(pair[0].enter([*command, *program]), env=environment).returncode


if __name__ == "__main__":
    sys.exit(main())
