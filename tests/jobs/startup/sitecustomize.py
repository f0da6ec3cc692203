"""Read by Python as it starts, in the ranks of test jobs: torch.compile's tracer stays unimported.

Making an optimizer imports torch._dynamo, a second of every rank's start, only to exempt the
optimizer from a tracer that nothing here uses.  An optimizer needs two of its functions.
"""

import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType


class NoTracer(MetaPathFinder, Loader):
    def find_spec(self, name, path=None, target=None):
        return ModuleSpec(name, self) if name == "torch._dynamo" else None

    def exec_module(self, module: ModuleType) -> None:
        module.disable = lambda function, recursive=True, **_: function
        module.graph_break = lambda *_: None


sys.meta_path.insert(0, NoTracer())
