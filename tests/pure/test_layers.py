"""Who may import what: the layers, the optional libraries, and nothing at import."""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {
    "ringfold.kernels": ROOT / "kernels",
    "ringfold.comm": ROOT / "comm",
    "ringfold.parallel": ROOT / "parallel",
    "ringfold": ROOT / "src" / "ringfold",
}
ORDER = ("ringfold.kernels", "ringfold.comm", "ringfold.parallel", "ringfold")
OPTIONAL = {"mpi4py", "torch", "cupy", "sklearn", "tqdm", "rich", "matplotlib", "safetensors"}
PURE_IN_PARALLEL = {
    f"ringfold.parallel.{name}" for name in ("actions", "plan", "buckets", "bucketing")
} | {"ringfold.parallel.partition"}


def allowed(module: str) -> set[str]:
    """Name the optional libraries that a module may import."""
    layer = layer_of(module)
    libraries: set[str] = set()
    if module in {f"ringfold.comm.transport.mpi{part}" for part in ("", "_start", "_survivors")}:
        libraries |= {"mpi4py"}
    if module in ("ringfold.comm.transport.device", "ringfold.comm.buffer"):
        libraries |= {"cupy"}
    if module.startswith("ringfold.kernels.device"):
        libraries |= {"cupy"}
    if layer == "ringfold.parallel" and module not in PURE_IN_PARALLEL:
        libraries |= {"torch"}
    if module.startswith("ringfold.parallel.checkpoint."):
        libraries |= {"safetensors"}
    if layer == "ringfold":
        libraries |= OPTIONAL - {"mpi4py"}
    return libraries


def layer_of(module: str) -> str:
    """Find the layer of a module's full name; the facade is what is in no other."""
    return next((la for la in ORDER[:3] if module == la or module.startswith(la + ".")), ORDER[3])


def violations(module: str, source: str, *, is_package: bool = False) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        where = f"{module}:{getattr(node, 'lineno', 0)}"
        match node:
            case ast.Global():
                yield f"{where}: rebinds module state by `global {', '.join(node.names)}`"
            case ast.Import():
                for alias in node.names:
                    yield from refused(module, where, alias.name)
            case ast.ImportFrom(level=0):
                yield from refused(module, where, node.module or "")
            case ast.ImportFrom():
                yield from climbs(module, where, node, is_package)
            case ast.Attribute(value=ast.Name(id="os"), attr="environ" | "getenv" | "putenv"):
                if module != "ringfold.comm.settings":
                    yield f"{where}: only comm/settings.py reads the environment"


def refused(module: str, where: str, imported: str) -> Iterator[str]:
    top = imported.partition(".")[0]
    if top in ("ringfold", "comm", "kernels", "parallel"):
        yield f"{where}: imports {imported} by its absolute name"
    if top in OPTIONAL and top not in allowed(module):
        yield f"{where}: imports {imported}"


def climbs(module: str, where: str, node: ast.ImportFrom, is_package: bool) -> Iterator[str]:
    """Resolve a relative import and refuse a layer to the right of the module's own."""
    parts = module.split(".")
    keep = len(parts) - node.level + is_package
    if keep < 1:
        yield f"{where}: a relative import leaves the package"
        return
    base = ".".join(parts[:keep])
    base = f"{base}.{node.module}" if node.module else base
    for alias in node.names:
        target = layer_of(f"{base}.{alias.name}" if base == "ringfold" else base)
        if ORDER.index(target) > ORDER.index(layer_of(module)):
            yield f"{where}: {layer_of(module)} imports {target}, a layer above it"


def modules() -> Iterator[tuple[str, Path]]:
    for package, folder in FOLDERS.items():
        for path in sorted(folder.rglob("*.py")):
            inner = path.relative_to(folder).with_suffix("").parts
            yield ".".join((package, *(part for part in inner if part != "__init__"))), path


def test_every_module_keeps_to_its_layer():
    found = [
        violation
        for module, path in modules()
        for violation in violations(module, path.read_text(), is_package=path.stem == "__init__")
    ]
    assert found == []


def test_the_walk_finds_the_modules():
    names = {module for module, _ in modules()}
    assert {"ringfold", "ringfold.comm", "ringfold.kernels", "ringfold.parallel"} <= names
    assert len(names) > 10


def test_every_folder_with_sources_is_a_package():
    """setup.py finds packages by their __init__.py; a folder without one is left out of a wheel."""
    folders = {path.parent for _, path in modules()}
    assert [folder for folder in folders if not (folder / "__init__.py").exists()] == []


@pytest.mark.parametrize(
    ("module", "source", "complaint"),
    [
        ("ringfold.kernels.pack", "from ..comm import chunks", "a layer above"),
        ("ringfold.kernels.pack", "from .. import comm", "a layer above"),
        ("ringfold.comm.cost", "from ..parallel.mesh import Mesh", "a layer above"),
        ("ringfold.comm.transport.mpi", "from ...cli import main", "a layer above"),
        ("ringfold.comm.cost", "def f():\n    from .. import Communicator", "a layer above"),
        ("ringfold.comm.cost", "import mpi4py.MPI", "imports mpi4py"),
        ("ringfold.comm.communicator", "from mpi4py import MPI", "imports mpi4py"),
        ("ringfold.comm.buffer", "def f():\n    import torch", "imports torch"),
        ("ringfold.parallel.plan", "import torch", "imports torch"),
        ("ringfold.kernels.reduce", "import cupy", "imports cupy"),
        ("ringfold.parallel.mesh", "import ringfold.comm", "absolute name"),
        ("ringfold.parallel.mesh", "from comm import errors", "absolute name"),
        ("ringfold.comm.cost", "from .... import x", "leaves the package"),
        ("ringfold.comm.cost", "def f():\n    global STATE\n    STATE = 1", "global STATE"),
        ("ringfold.comm.cost", "import os\nx = os.environ['A']", "reads the environment"),
        ("ringfold.cli", "from mpi4py import MPI", "imports mpi4py"),
    ],
)
def test_a_violation_is_refused(module, source, complaint):
    found = list(violations(module, source))
    assert len(found) == 1
    assert complaint in found[0]


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("ringfold.comm.transport.mpi", "from mpi4py import MPI\nfrom ..errors import CommError"),
        ("ringfold.comm.executor", "from ..kernels import reduce\nfrom . import chunks"),
        ("ringfold.parallel.pipeline", "import torch\nfrom ..comm.errors import CommError"),
        ("ringfold.kernels.device_pack", "import cupy"),
        ("ringfold.comm.settings", "import os\ndef f(): return os.environ.get('A')"),
        ("ringfold.workloads.digits", "import torch\nfrom .. import Communicator"),
    ],
)
def test_what_the_layers_allow_passes(module, source):
    assert list(violations(module, source)) == []


def test_a_relative_import_in_a_package_file_starts_at_the_package():
    source = "from .mesh import Mesh\nfrom ..comm import errors"
    assert list(violations("ringfold.parallel", source, is_package=True)) == []
    assert list(violations("ringfold", "from .parallel import Mesh", is_package=True)) == []


def python(code: str) -> str:
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100
    )
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_importing_the_package_loads_no_heavy_library():
    code = "import ringfold, sys; ringfold.Communicator; print(*sys.modules)"
    loaded = python(code).split()
    assert "ringfold.comm.communicator" in loaded
    assert {"mpi4py", "numba", "torch", "cupy"}.isdisjoint(loaded)


def test_importing_every_module_of_comm_and_kernels_compiles_nothing():
    """Kernels are compiled at their first call: an import must not cost seconds."""
    code = """
import gc, importlib, importlib.util, os, pkgutil
before = dict(os.environ)
import ringfold.comm, ringfold.kernels
for package in (ringfold.kernels, ringfold.comm):
    for found in pkgutil.walk_packages(package.__path__, package.__name__ + "."):
        if found.name.rpartition(".")[2] not in ("mpi", "device") and "device" not in found.name:
            importlib.import_module(found.name)
from numba.core.dispatcher import Dispatcher
kernels = [item for item in gc.get_objects() if isinstance(item, Dispatcher)
           and item.py_func.__module__.startswith("ringfold.")]
print(sum(len(kernel.overloads) for kernel in kernels))
print(dict(os.environ) == before)
import sys
print("mpi4py.MPI" in sys.modules)
"""
    assert python(code).split() == ["0", "True", "False"]


BARE = """
import importlib, inspect, pydoc, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
for package in map(importlib.import_module, ("ringfold", "ringfold.parallel")):
    lacking = []
    for name in package._HOMES:
        try:
            getattr(package, name)
        except ModuleNotFoundError as error:
            told = f"{package.__name__}.{name} needs torch: pip install 'ringfold[torch]'"
            assert str(error) == told and error.name == "torch", error
            lacking.append(name)
    assert "DataParallel" in lacking and "Mesh" not in lacking
    assert sorted([*package.__all__, *lacking]) == sorted(package._HOMES), package.__all__
    found = {}
    exec(f"from {package.__name__} import *", found)
    assert found.keys() >= set(package.__all__) and "DataParallel" not in found
    assert dict(inspect.getmembers(package)).keys() >= set(package.__all__)
    assert "Mesh" in pydoc.plain(pydoc.render_doc(package))
    assert not hasattr(package, "bogus")

import ringfold, numpy

def main(comm):
    with ringfold.trace(comm) as found:
        comm.allreduce(numpy.ones(1000))
    return [row.wire_bytes for row in found.rows]

assert ringfold.run_local(2, main) == [[8000.0, 8000.0], []]
"""


def test_without_torch_the_names_that_need_it_say_so_and_are_not_listed():
    """help(ringfold), inspect.getmembers and `import *` ended with "No module named 'torch'"."""
    python(BARE)


@pytest.mark.parametrize("name", ["ringfold", "ringfold.parallel"])
def test_with_torch_all_names_are_listed(name):
    package = importlib.import_module(name)
    path = next(path for module, path in modules() if module == name)
    lists = [node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Assign)]
    (listed,) = [ast.literal_eval(n.value) for n in lists if n.targets[0].id == "__all__"]
    assert sorted(listed) == sorted(package._HOMES) == package.__all__
    assert set(package.__all__) <= set(dir(package))
    others = {found for found in dir(package) if found[0] != "_"} - set(package.__all__)
    assert all(inspect.ismodule(getattr(package, found)) for found in others)  # no Any
