"""A thread that says where this rank is, when the rank itself cannot, and looks for the dead.

It needs nothing of the main thread: it answers peers that ask, writes a report of all ranks when
the process gets SIGUSR1, and ends the job where a rank has died and this one does not come to
notice. A rank that holds the interpreter lock in native code answers to nobody; its peers on the
node then send it SIGUSR1, at which faulthandler writes its stacks into a file that they can read.
They do so only where that handler is all that runs: the file's first byte says whether it is.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import faulthandler
import functools
import os
import signal
import threading
import time
from collections.abc import Callable

from ..kernels.say import say
from .deaths import Deaths, Process
from .errors import PeerLost
from .inquiry import Inquiry
from .transport.base import Transport

_LOOK = 0.15
_PATIENCE = 1.5
_GIVE_UP = 8.0
"""Seconds after a death until a rank that has not come to notice it ends the job."""

_SIGNAL = signal.SIGUSR1


class Watchdog:
    """The thread, its signal, and what it knows of the other ranks of the node."""

    def __init__(
        self,
        inquiry: Inquiry,
        transport: Transport,
        deaths: Deaths,
        abort: bool,
    ) -> None:
        """Start; `files` tells later where peers write.  abort: end the job after a death.

        owner: stays alive as long as this runs, as a group that nobody closes may not.
        """
        self.owner: object = None
        self._inquiry, self._transport = inquiry, transport
        self._deaths, self._abort = deaths, abort
        self._process = os.getpid()
        self._stop = threading.Event()
        self._said: set[int] = set()
        self._peers: dict[int, tuple[Process, int]] = {}
        self.file = _stacks_file()
        self._written = os.fstat(self.file).st_size
        catch(self)
        _ALIVE.append(self)
        self._thread = threading.Thread(target=self._run, name="ringfold-watchdog", daemon=True)

    def start(self, peers: dict[int, tuple[Process, int]]) -> None:
        """Begin.  peers: of this node, each with its file descriptor for stacks."""
        self._peers = peers
        self._inquiry.force = self.force
        atexit.register(self.stop)
        self._thread.start()

    def _run(self) -> None:
        while not self._stop.wait(_LOOK):
            _publish()
            if self._transport.threads:
                self._inquiry.listen()
            size = os.fstat(self.file).st_size
            if size > self._written:
                self._written = size
                if self is _ALIVE[0] and not self._inquiry.was_asked(5.0):
                    self._report()
            self._mourn()

    def _report(self) -> None:
        """Write where all ranks are."""
        size, rank = self._transport.size, self._transport.rank
        told = self._inquiry.ask(range(size), _PATIENCE)
        told[rank] = self._inquiry.answer()
        rows = (f"  rank {one}: {told.get(one, 'does not answer')}" for one in range(size))
        say(f"where the ranks are (SIGUSR1 at rank {rank}):\n" + "\n".join(rows))

    def _mourn(self) -> None:
        """Say who has died, once, on one rank; end the job where this rank does not notice."""
        self._deaths.look()
        if not self._deaths.dead:
            return
        if self._transport.threads:
            with contextlib.suppress(PeerLost):
                self._transport.check(())  # reads who has left in good order
        left = self._transport.departed()
        now = time.monotonic()
        for rank, since in list(self._deaths.dead.items()):
            if rank in left:
                continue
            alive = [one for one in self._peers if one not in self._deaths.dead]
            if rank not in self._said and all(self._transport.rank < one for one in alive):
                say(self._deaths.told(rank))
            self._said.add(rank)
            if self._abort and self._transport.threads and now - since > _GIVE_UP:
                self._transport.abort(1)

    def force(self, rank: int) -> str | None:
        """Return the stacks of a rank of this node that does not answer; None for no way."""
        if rank not in self._peers:
            return None
        process, descriptor = self._peers[rank]
        try:
            # Open before it is asked: what it writes can be read even if it ends at that.
            with open(f"/proc/{process.pid}/fd/{descriptor}", "rb") as file:
                if not process.lives:
                    return "has died"
                if not _catches(process.pid):
                    return "does not answer, and does not listen to signals any more"
                if file.read(1) != _ALONE:
                    return f"does not answer, and handles {_SIGNAL.name} by itself"
                before = os.fstat(file.fileno()).st_size
                os.kill(process.pid, _SIGNAL)
                end = time.monotonic() + 1.0
                while os.fstat(file.fileno()).st_size == before and time.monotonic() < end:
                    time.sleep(0.01)
                time.sleep(0.05)
                file.seek(before)
                stacks = file.read().decode(errors="replace")
        except OSError as error:
            return f"cannot be asked: {error}"
        lines = [line.strip() for line in stacks.splitlines() if line.strip()]
        return "does not answer; its stacks: " + " | ".join(lines) if lines else None

    def stop(self) -> None:
        """End the thread and give the signal back; idempotent."""
        if self._stop.is_set() or os.getpid() != self._process:
            return
        self._stop.set()
        atexit.unregister(self.stop)
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(5)
        _ALIVE.remove(self)
        self._inquiry.force = lambda rank: None
        let_go(self)
        self._deaths.close()
        self.owner = None


_ALIVE: list[Watchdog] = []
"""Those of this process: the first of them answers the signal."""

_CATCHING: list[object] = []

_REGISTERED: list[tuple[int, bool]] = []
"""faulthandler's handler: its address, and whether no other is called behind it."""

_ALONE, _SHARED = b"1", b"0"


def catch(holder: object) -> None:
    """Let the signal write this process's stacks, where it would end the process otherwise."""
    if not _CATCHING:
        chain = callable(signal.getsignal(_SIGNAL))
        faulthandler.register(_SIGNAL, file=_stacks_file(), all_threads=True, chain=chain)
        _REGISTERED.append((_action()[0], not chain))
        _publish()
    _CATCHING.append(holder)


def let_go(holder: object) -> None:
    """Give the signal back once nobody holds it any more; who has taken it meanwhile keeps it."""
    _CATCHING.remove(holder)
    if not _CATCHING:
        (registered, _), now = _REGISTERED.pop(), _action()
        faulthandler.unregister(_SIGNAL)  # puts back what was there before it
        if now[0] != registered:
            _sigaction()(int(_SIGNAL), now, None)
        _publish()


@functools.cache
def _stacks_file() -> int:
    file = os.memfd_create("ringfold-stacks", os.MFD_CLOEXEC)
    os.write(file, _SHARED)
    return file


def _publish() -> None:
    """Tell peers whether the signal does nothing but write stacks.

    The program may take it at any time, for a notice of its scheduler's, say: a peer's question
    must not pass for that.
    """
    alone = (_action()[0], True) in _REGISTERED
    os.pwrite(_stacks_file(), _ALONE if alone else _SHARED, 0)


_Action = ctypes.c_size_t * 32
"""A struct sigaction, which begins with the handler (glibc, musl)."""


def _action() -> ctypes.Array[ctypes.c_size_t]:
    """Return what is done at the signal; first, the address of the handler, 0 for the default."""
    action = _Action()
    _sigaction()(int(_SIGNAL), None, action)
    return action


@functools.cache
def _sigaction() -> Callable[..., int]:
    # Once: a library is opened with a class of its own, which the garbage collector alone removes.
    function: Callable[..., int] = ctypes.CDLL(None).sigaction
    return function


def _catches(pid: int) -> bool:
    """Tell whether a process has a handler for the signal, which would end it otherwise."""
    with open(f"/proc/{pid}/status") as file:
        masks = dict(line.split(":", 1) for line in file if line.startswith("Sig"))
    return bool(int(masks["SigCgt"], 16) >> (_SIGNAL - 1) & 1)
