"""Data-parallel and pipeline training on top of comm.

Names are looked up on first use, so that importing this package imports no torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .data_parallel import DataParallel
    from .mesh import Mesh
    from .pipeline import Pipeline
    from .plan import PLANS, PlanError
    from .sampler import GlobalBatchSampler, ShardSampler

__all__ = [
    "PLANS",
    "DataParallel",
    "GlobalBatchSampler",
    "Mesh",
    "Pipeline",
    "PlanError",
    "ShardSampler",
]

_HOMES = {
    "PLANS": "plan",
    "DataParallel": "data_parallel",
    "GlobalBatchSampler": "sampler",
    "Mesh": "mesh",
    "Pipeline": "pipeline",
    "PlanError": "plan",
    "ShardSampler": "sampler",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
