"""Read by Python as it starts, in the ranks of test jobs: torch.compile's tracer is left for later.

Making an optimizer imports torch._dynamo, a second of every rank's start, only to exempt the
optimizer from a tracer that most jobs never use.  Two functions do for that; whoever asks for
anything else, as torch's own DistributedDataParallel does, gets the real module.
"""

import importlib
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType

TRACER = "torch._dynamo"


class LateTracer(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == TRACER else None

    def exec_module(self, module: ModuleType) -> None:
        def real(name: str):
            if name.startswith("__") and name != "__path__":
                raise AttributeError(name)
            if self in sys.meta_path:
                sys.meta_path.remove(self)
                del sys.modules[TRACER]
            return getattr(importlib.import_module(TRACER), name)

        module.disable = lambda function, recursive=True, **_: function
        module.graph_break = lambda *_: None
        module.__getattr__ = real


sys.meta_path.insert(0, LateTracer())
