"""Hosts on one machine: network namespaces of their own names, joined by a link of limited rate.

Everything lives in anonymous namespaces, whose processes the kernel ends, and whose interfaces it
removes, when the process that made them ends - however it ends. Nothing appears in the machine's
own tables of interfaces and namespaces, and no traffic leaves.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

TOOLS = ("ip", "tc", "unshare", "nsenter", "hostname", "mount")
KINDS = ("--net", "--uts", "--ipc", "--mount")
"""What a host has of its own: network, name, System V memory, and mounts for its /dev/shm."""

INSIDE = "RINGFOLD_HOSTS_INSIDE"
PIDS = "RINGFOLD_HOSTS_PIDS"
"""Environment of the launcher's agent: `hosta=123 hostb=124`, a process inside each host."""


class Refused(Exception):
    """This machine does not allow the hosts; the message is the reason."""


@dataclass(frozen=True)
class Host:
    """One host: its name, its address on the link, and a process that keeps its namespaces."""

    name: str
    address: str
    pid: int

    def enter(self, command: Sequence[str]) -> list[str]:
        """Return the command line that runs `command` on this host, in the same directory."""
        stay = ["sh", "-c", 'cd "$0" && exec "$@"', os.getcwd()]
        return ["nsenter", f"--target={self.pid}", *KINDS, "--", *stay, *command]


def require_tools() -> None:
    """Raise Refused unless the system's tools for networks and namespaces are there."""
    missing = [tool for tool in TOOLS if shutil.which(tool) is None]
    if missing:
        raise Refused(f"needs {', '.join(missing)} (packages iproute2 and util-linux)")


def isolate(argv: Sequence[str]) -> None:
    """Replace this process by `argv` in a process namespace: when it ends, so does all it started.

    Returns at once where that has happened already.
    Raises: Refused without the right to do it.
    """
    if INSIDE in os.environ:
        return
    command = ["unshare", "--pid", "--fork", "--kill-child", "--mount-proc"]
    if os.geteuid() != 0:
        command += ["--user", "--map-root-user"]
    _run([*command, "--", "true"])
    os.execvpe(command[0], [*command, "--", *argv], {**os.environ, INSIDE: "1"})


@contextmanager
def hosts(rate: str) -> Iterator[tuple[Host, Host]]:
    """Lend two hosts; each sends to the other at `rate` at most, in the words of tc: 1gbit.

    To be used after isolate().
    Raises: Refused where a step is not allowed.
    """
    with ExitStack() as stack:
        pair = (
            stack.enter_context(_host("hosta", "10.77.0.1")),
            stack.enter_context(_host("hostb", "10.77.0.2")),
        )
        peer = f"peer name link0 netns {pair[1].pid}"
        _run(pair[0].enter(f"ip link add link0 type veth {peer}".split()))
        for host in pair:
            for command in (
                f"ip address add {host.address}/24 dev link0",
                "ip link set link0 up",
                f"tc qdisc add dev link0 root tbf rate {rate} burst 128kb latency 20ms",
            ):
                _run(host.enter(command.split()))
        yield pair


@contextmanager
def _host(name: str, address: str) -> Iterator[Host]:
    """Start the process that keeps a host's namespaces: it waits for the end of its input."""
    script = (
        f"hostname {name} && mount -t tmpfs -o size=1g none /dev/shm && ip link set lo up "
        "&& echo ready && exec cat"
    )
    with subprocess.Popen(
        ["unshare", *KINDS, "--", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as keeper:
        try:
            assert keeper.stdin and keeper.stdout and keeper.stderr
            if keeper.stdout.readline() != "ready\n":
                raise Refused(f"cannot make host {name}: {keeper.stderr.read().strip()}")
            yield Host(name, address, keeper.pid)
        finally:
            keeper.kill()


def _run(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise Refused(f"`{' '.join(command)}` ended with {done.returncode}: {done.stderr.strip()}")
