"""Collective communication you can read, prove and price."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .comm.communicator import Communicator
    from .comm.elastic import Elastic
    from .comm.errors import (
        CommError,
        CommTimeout,
        MismatchError,
        NotFinite,
        PeerLost,
        ScheduleError,
    )
    from .comm.launch import run_local
    from .comm.schedule import Round, Schedule
    from .comm.settings import Settings
    from .comm.work import Work
    from .parallel.checkpoint.errors import CheckpointError
    from .parallel.checkpoint.session import Checkpoints, load, save
    from .parallel.checkpoint.streams import RandomStreams
    from .parallel.data_parallel import DataParallel
    from .parallel.loss_scale import LossScaler
    from .parallel.mesh import Mesh
    from .parallel.pipeline import Pipeline
    from .parallel.random_keys import Dropout
    from .parallel.sharded_optimizer import ShardedOptimizer
    from .parallel.stage_error import StageError
    from .parallel.tracing import trace

    __all__ = [
        "CheckpointError",
        "Checkpoints",
        "CommError",
        "CommTimeout",
        "Communicator",
        "DataParallel",
        "Dropout",
        "Elastic",
        "LossScaler",
        "Mesh",
        "MismatchError",
        "NotFinite",
        "PeerLost",
        "Pipeline",
        "RandomStreams",
        "Round",
        "Schedule",
        "ScheduleError",
        "Settings",
        "ShardedOptimizer",
        "StageError",
        "Work",
        "load",
        "run_local",
        "save",
        "trace",
    ]

_HOMES = {
    "Communicator": "comm.communicator",
    "Elastic": "comm.elastic",
    "Settings": "comm.settings",
    "Work": "comm.work",
    "run_local": "comm.launch",
    "Round": "comm.schedule",
    "Schedule": "comm.schedule",
    "CommError": "comm.errors",
    "CommTimeout": "comm.errors",
    "MismatchError": "comm.errors",
    "NotFinite": "comm.errors",
    "PeerLost": "comm.errors",
    "ScheduleError": "comm.errors",
    "CheckpointError": "parallel.checkpoint.errors",
    "Checkpoints": "parallel.checkpoint.session",
    "RandomStreams": "parallel.checkpoint.streams",
    "load": "parallel.checkpoint.session",
    "save": "parallel.checkpoint.session",
    "DataParallel": "parallel.data_parallel",
    "Dropout": "parallel.random_keys",
    "LossScaler": "parallel.loss_scale",
    "Mesh": "parallel.mesh",
    "Pipeline": "parallel.pipeline",
    "ShardedOptimizer": "parallel.sharded_optimizer",
    "trace": "parallel.tracing",
    "StageError": "parallel.stage_error",
}
"""name -> the module that has it, imported when the name is first used: torch only for engines."""

_WITHOUT_TORCH = ("comm.", "parallel.mesh", "parallel.checkpoint.errors", "parallel.tracing")
"""What the homes begin with that need no torch."""

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    from .comm.optional import look_up

    return _public() if name == "__all__" else look_up(__name__, _HOMES, name, "torch")


def __dir__() -> list[str]:
    from .comm.optional import listed

    return listed(globals(), _public())


def _public() -> list[str]:
    """Return the names that can be had here, `__all__`."""
    from .comm.optional import usable

    bare = [name for name, home in _HOMES.items() if home.startswith(_WITHOUT_TORCH)]
    return usable(_HOMES, bare, "torch")
