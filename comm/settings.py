"""The only reader of the environment, and writer."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import NoneType
from typing import Any

from .arguments import require, seconds, shown, whole
from .texts import few, shown_ranks


@dataclass(frozen=True)
class Settings:
    """How a Communicator behaves, whatever it is asked to do.

    A Communicator without settings takes `read()`: the defaults below, where the environment names
    nothing else. Settings made by their fields do not look there; `read(timeout=60)` does both.

    segment_bytes, max_message_bytes, shared, cma and watch must be the same on all ranks.

    timeout: seconds that a rank waits for its peers before CommTimeout; to open a communicator all
        have 60 at least.  RINGFOLD_TIMEOUT
    segment_bytes: chunks travel in pieces of at most this size.  RINGFOLD_SEGMENT_BYTES
    max_message_bytes: no single message is larger; like segment_bytes, must stay below 2**31 for
        MPI's 32-bit counts.  RINGFOLD_MAX_MESSAGE_BYTES
    abort: an uncaught exception on one rank ends the whole job.  RINGFOLD_ABORT (0 or 1)
    compiled: messages are sent and added in compiled code where the transport has a way; the
        results are the same.  RINGFOLD_COMPILED (0 or 1)
    shared: ranks of one node meet in shared memory.  RINGFOLD_SHARED (0 or 1)
    cma: ranks of one node read and write each other's own memory where they may, see comm/cma.py.
        RINGFOLD_CMA (0 or 1)
    watch: a thread of every rank says where it is when others ask, or when SIGUSR1 comes, and looks
        for ranks that have died.
    tuning: file of `ringfold tune`, None for none; where rank 0 has it, all ranks follow.  Lies in
        ringfold/ under XDG_CACHE_HOME, or under .cache in HOME.
    """

    timeout: float = 300.0
    segment_bytes: int = 1 << 19
    max_message_bytes: int = 1 << 30
    abort: bool = True
    compiled: bool = True
    shared: bool = True
    cma: bool = True
    tuning: Path | None = None
    watch: bool = True

    def __post_init__(self) -> None:
        seconds("timeout", self.timeout)
        for field in ("segment_bytes", "max_message_bytes"):
            if not 1 <= (nbytes := whole(field, getattr(self, field))) < 1 << 31:
                raise ValueError(f"{field} must be in 1..{(1 << 31) - 1}, got {nbytes}")
        for field in ("abort", "compiled", "shared", "cma", "watch"):
            if (value := getattr(self, field)) not in (0, 1):
                raise TypeError(f"{field}: expected a bool, got {shown(value)}")
        require("tuning", self.tuning, (Path, NoneType))

    @classmethod
    def of(cls, given: Settings | None) -> Settings:
        """Return those that are given, or for None what is read; TypeError for anything else."""
        require("settings", given, (cls, NoneType))
        return cls.read() if given is None else given

    @property
    def alike(self) -> tuple[int, ...]:
        """Return, as numbers, what all ranks must have alike."""
        return tuple(int(getattr(self, field)) for field in _ALIKE)

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None, **fields: Any) -> Settings:
        """Return the defaults, overridden by the RINGFOLD_ names above, and these by `fields`.

        environ: where the names are looked up; this process's environment for None.
        Raises: ValueError that names the variable whose value cannot be read, or is out of range.
        """
        environ = _or_own(environ)
        found: dict[str, Any] = {"tuning": _tuning(environ)}
        for field, (parse, expected) in _PARSERS.items():
            name = f"RINGFOLD_{field.upper()}"
            if name not in environ:
                continue
            try:
                found[field] = parse(environ[name])
            except (ValueError, KeyError):
                raise ValueError(f"{name}: expected {expected}, got {environ[name]!r}") from None
            try:
                cls(**{field: found[field]})
            except ValueError as error:
                raise ValueError(f"{name}={environ[name]}: {error}") from None
        return cls(**{**found, **fields})


def _or_own(environ: Mapping[str, str] | None) -> Mapping[str, str]:
    """Return environ, or this process's for None: help() writes defaults out, tokens included."""
    return os.environ if environ is None else environ


def _tuning(environ: Mapping[str, str]) -> Path | None:
    cache, home = environ.get("XDG_CACHE_HOME"), environ.get("HOME")
    base = Path(cache) if cache else Path(home) / ".cache" if home else None
    return base / "ringfold" / "tuning.json" if base else None


def survives_failures(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether the launcher has asked MPI to go on when a rank dies.

    Open MPI 5 says so to its ranks: mpirun --with-ft ulfm.
    """
    return _or_own(environ).get("OMPI_MCA_mpi_ft_enable", "0") not in ("0", "false")


_LAUNCHERS = ("OMPI_", "PMIX_", "PMI_", "PRTE_", "MPI_", "HYDRA_", "HYDI_", "I_MPI_", "SLURM_")


def beside_the_job(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the environment for a child that starts MPI as one process alone.

    What a launcher tells its ranks would make the child one of them a second time. For programs,
    too: subprocess.run(..., env=beside_the_job()).
    """
    kept = {"OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"}
    return {
        name: value
        for name, value in _or_own(environ).items()
        if name in kept or not name.startswith(_LAUNCHERS)
    }


_STARTED = {
    "OMPI_COMM_WORLD_SIZE": "OMPI_COMM_WORLD_RANK",
    "PMI_SIZE": "PMI_RANK",
    "SLURM_STEP_NUM_TASKS": "SLURM_PROCID",
    "WORLD_SIZE": "TORCHELASTIC_RUN_ID",
}
"""What a launcher says of how many processes it has started -> what it says beside it."""


def started_together(environ: Mapping[str, str] | None = None) -> dict[str, int]:
    """Return how many processes a launcher has started, this one among them, by who says so.

    Empty where one has started this process alone, be it among several that another started. What
    srun says to a shell, as that of an interactive session, is not meant for what is started there.
    """
    environ = _or_own(environ)
    told = {
        name: int(environ[name])
        for name, beside in _STARTED.items()
        if beside in environ and environ.get(name, "").isdigit()
    }
    if "SLURM_PTY_PORT" in environ:
        told.pop("SLURM_STEP_NUM_TASKS", None)
        if "PMI_JOBID" in environ:  # which srun --mpi=pmi2 sets, and mpiexec does not
            told.pop("PMI_SIZE", None)
    return told if told and min(told.values()) > 1 else {}


def cache_folder(environ: Mapping[str, str] | None = None) -> Path | None:
    """Return where ringfold keeps what it has measured; None without a HOME."""
    tuning = _tuning(_or_own(environ))
    return tuning.parent if tuning else None


def names_threads(environ: Mapping[str, str] | None = None) -> bool:
    """Tell whether the user has said how many threads compute in a process."""
    return "OMP_NUM_THREADS" in _or_own(environ)


def asks_for_huge_pages(environ: Mapping[str, str] | None = None) -> str:
    """Name who asks Linux for huge pages for host tensors: "malloc", "torch" or nobody."""
    environ = _or_own(environ)
    tunables = environ.get("GLIBC_TUNABLES", "").split(":")
    if {"glibc.malloc.hugetlb=1", "glibc.malloc.hugetlb=2"} & set(tunables):
        return "malloc"
    return "torch" if environ.get("THP_MEM_ALLOC_ENABLE") == "1" else ""


_ALIKE = ("segment_bytes", "max_message_bytes", "shared", "cma", "watch")
"""Fields by which ranks send and meet, so that all must have them alike."""


def unlike(rows: Sequence[Sequence[int]]) -> str:
    """Return what the ranks' settings differ in, "" where they do not.

    rows: `Settings.alike` of each rank.
    """
    told = []
    for field, values in zip(_ALIKE, zip(*rows, strict=True), strict=True):
        if len(set(values)) > 1:
            name = f" (RINGFOLD_{field.upper()})" if field in _PARSERS else ""
            kind = type(getattr(Settings, field))
            holders: dict[int, list[int]] = {}
            for rank, value in enumerate(values):
                holders.setdefault(value, []).append(rank)
            found = [f"{kind(value)} on {shown_ranks(ranks)}" for value, ranks in holders.items()]
            told.append(f"{field}{name} is {few(found)}")
    return "; ".join(told)


Parser = tuple[Callable[[str], object], str]
"""What reads a text, and what it expects."""

_SECONDS: Parser = float, "seconds, such as 60"
_BYTES: Parser = int, "a whole number of bytes, such as 524288"
_SWITCH: Parser = {"0": False, "1": True}.__getitem__, "0 or 1"
_PARSERS = {
    "timeout": _SECONDS,
    "segment_bytes": _BYTES,
    "max_message_bytes": _BYTES,
    **dict.fromkeys(("abort", "compiled", "shared", "cma"), _SWITCH),
}


@dataclass(frozen=True)
class Seat:
    """What the launcher tells a rank before MPI has started.

    job: its name, alike on all ranks.  local_size: the ranks of this node.
    """

    job: str
    rank: int
    size: int
    local_size: int

    @classmethod
    def read(cls, environ: Mapping[str, str] | None = None) -> Seat | None:
        """Return what Open MPI 5's launcher has told; None under others, or without one."""
        environ = _or_own(environ)
        try:
            rank, size, local = (int(environ[f"OMPI_COMM_WORLD_{name}"]) for name in _SEAT)
            return cls(environ["PMIX_NAMESPACE"], rank, size, local)
        except (KeyError, ValueError):
            return None


_SEAT = ("RANK", "SIZE", "LOCAL_SIZE")
_COMPONENTS = "OMPI_MCA_btl"


@contextmanager
def fit_to_start_mpi() -> Iterator[None]:
    """Let Open MPI start without what is for one-sided messages, unless the user has chosen.

    Ordinary messages over libfabric or UCX go other ways. Where `ofi` finds no network of its own,
    Open MPI 5 sleeps a second as it closes it (opal/mca/btl/ofi/btl_ofi_component.c); in a process
    without mpirun `uct` may not return at all (open-mpi/ompi issue 14383).

    Without a HOME, as under some service managers, it would end the process: it gets one meanwhile.
    """
    home = os.path.expanduser("~")  # of the user's entry, where there is one
    fitting = {_COMPONENTS: "^ofi,uct", "HOME": home if os.path.isabs(home) else "/"}
    added = {name: value for name, value in fitting.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


_HOLDER = "RINGFOLD_HOLDER"


def hold_place() -> None:
    """Tell the processes that this one starts whose place in the job they inherit."""
    place = _place(os.environ)
    if place:
        os.environ[_HOLDER] = f"{os.getpid()} {place}"


def free_place() -> None:
    """Let the processes that this one starts take its place in the job, which it has left."""
    os.environ.pop(_HOLDER, None)


def holder(environ: Mapping[str, str] | None = None) -> tuple[int, int] | None:
    """Return the other process that has this one's place in the job, and its rank there."""
    environ = _or_own(environ)
    process, _, place = environ.get(_HOLDER, "").partition(" ")
    if not place or place != _place(environ) or int(process) == os.getpid():
        return None
    return int(process), int(environ["PMIX_RANK"])


def _place(environ: Mapping[str, str]) -> str:
    """Return what only one rank of one job is told; "" where no launcher says it.

    By PMIx, whose job's name is of no other job. What MPICH's says may be that of another job, as
    a number of a file descriptor; it is closed in what a rank starts, where MPICH ends at once.
    """
    names = ("PMIX_RANK", "PMIX_NAMESPACE")
    return " ".join(environ[name] for name in names) if environ.keys() >= set(names) else ""


def started_in(environ: Mapping[str, str] | None = None) -> str:
    """Return the folder in which this process was started, as far as that can be known.

    mpirun and shells keep PWD, which os.chdir leaves as it is.
    """
    folder = _or_own(environ).get("PWD", "")
    return folder if os.path.isabs(folder) and os.path.isdir(folder) else os.getcwd()
