"""Data-parallel and pipeline training on top of comm.

Names are looked up on first use, so that importing this package imports no torch.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_parallel import DataParallel
    from .drift import check_replicas
    from .join import even_batches
    from .mesh import Mesh
    from .metrics import Metrics
    from .objects import (
        allgather_objects,
        broadcast_object,
        gather_objects,
        recv_object,
        scatter_objects,
        send_object,
    )
    from .optimizer_state import broadcast_optimizer
    from .pipeline import Pipeline
    from .plan import PLANS, PlanError
    from .powersgd import PowerSGD
    from .random_keys import Dropout, name_layers, same_masks, show_samples
    from .sampler import GlobalBatchSampler, NoneIfEmpty, ShardSampler
    from .sharded_optimizer import ShardedOptimizer
    from .stage_error import StageError
    from .sync_batchnorm import SyncBatchNorm, convert_sync_batchnorm
    from .topk import TopK

    __all__ = [
        "PLANS",
        "DataParallel",
        "Dropout",
        "GlobalBatchSampler",
        "Mesh",
        "Metrics",
        "NoneIfEmpty",
        "Pipeline",
        "PlanError",
        "PowerSGD",
        "ShardSampler",
        "ShardedOptimizer",
        "StageError",
        "SyncBatchNorm",
        "TopK",
        "allgather_objects",
        "broadcast_object",
        "broadcast_optimizer",
        "check_replicas",
        "convert_sync_batchnorm",
        "even_batches",
        "gather_objects",
        "name_layers",
        "recv_object",
        "same_masks",
        "scatter_objects",
        "send_object",
        "show_samples",
    ]

_HOMES = {
    "PLANS": "plan",
    "DataParallel": "data_parallel",
    "Dropout": "random_keys",
    "GlobalBatchSampler": "sampler",
    "Mesh": "mesh",
    "Metrics": "metrics",
    "NoneIfEmpty": "sampler",
    "Pipeline": "pipeline",
    "PlanError": "plan",
    "PowerSGD": "powersgd",
    "ShardSampler": "sampler",
    "ShardedOptimizer": "sharded_optimizer",
    "StageError": "stage_error",
    "SyncBatchNorm": "sync_batchnorm",
    "TopK": "topk",
    "allgather_objects": "objects",
    "broadcast_object": "objects",
    "broadcast_optimizer": "optimizer_state",
    "check_replicas": "drift",
    "convert_sync_batchnorm": "sync_batchnorm",
    "even_batches": "join",
    "gather_objects": "objects",
    "name_layers": "random_keys",
    "recv_object": "objects",
    "same_masks": "random_keys",
    "scatter_objects": "objects",
    "send_object": "objects",
    "show_samples": "random_keys",
}

_WITHOUT_TORCH = ("join", "mesh", "objects", "plan", "sampler")
"""The homes that need no torch."""


def __getattr__(name: str) -> Any:
    from ..comm.optional import look_up

    return _public() if name == "__all__" else look_up(__name__, _HOMES, name, "torch")


def __dir__() -> list[str]:
    from ..comm.optional import listed

    return listed(globals(), _public())


def _public() -> list[str]:
    """Return the names that can be had here, `__all__`."""
    from ..comm.optional import usable

    return usable(
        _HOMES, [name for name, home in _HOMES.items() if home in _WITHOUT_TORCH], "torch"
    )
