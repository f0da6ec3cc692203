"""What `make` installs: pins that fit every build of torch, into an environment of one Python."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
FOLDERS = ["benchmarks", "comm", "docs", "examples", "kernels", "parallel", "src", "tests", "tools"]
FILES = [
    "CHANGELOG.md",
    "LICENSE",
    "MANIFEST.in",
    "Makefile",
    "README.md",
    "constraints.txt",
    "pyproject.toml",
    "setup.py",
    "train.py",
]


def load() -> Any:
    spec = importlib.util.spec_from_file_location("setup_venv", ROOT / "tools" / "setup_venv.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


setup = load()


def test_no_pin_is_of_a_package_that_a_build_of_torch_pins() -> None:
    """PyPI's torch needs a cuda-toolkit of one version, and that one version of each library."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pins = {re.sub("[-_.]+", "-", line.partition("==")[0].lower()) for line in lines}
    tools = {"nvidia-nvvm", "nvidia-cuda-crt", "nvidia-cuda-nvcc", "nvidia-cuda-nvdisasm"}
    libraries = {pin for pin in pins if pin.startswith(("nvidia-", "cuda-toolkit", "triton"))}
    assert libraries <= tools  # those of the extra gpu-test, which no torch needs


def test_a_script_beside_the_checkout_imports_the_package(tmp_path: Path) -> None:
    """It got the folder: "module 'ringfold' has no attribute 'Communicator'"."""
    (tmp_path / "ringfold" / "docs").mkdir(parents=True)
    script = tmp_path / "script.py"
    script.write_text("import ringfold; print(ringfold.Communicator)")
    packages = tmp_path / "venv" / "lib" / "python3" / "site-packages"
    packages.mkdir(parents=True)
    setup.find_before_folders(tmp_path / "venv")
    (line,) = packages.glob("*.pth")
    environment = os.environ | {"PYTHONPATH": line.read_text().strip()}
    command = [sys.executable, str(script)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert "communicator.Communicator" in done.stdout, done.stderr


class Made:
    """An environment that setups make, with the steps that install left out."""

    def __init__(self, venv: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.venv, self.monkeypatch = venv, monkeypatch
        self.steps: list[str] = []
        self.fails = False
        monkeypatch.setattr(setup, "create", self.create)
        monkeypatch.setattr(setup, "install", self.install)
        monkeypatch.setattr(setup, "provide_mpi", lambda venv, choice: choice)

    def create(self, venv: Path) -> None:
        (venv / "bin").mkdir(parents=True, exist_ok=True)
        (venv / f"of {sys.version}").touch()
        self.steps.append("create")

    def install(self, venv: Path, requirements: list[str], *, editable: bool = False) -> None:
        self.steps.append("install")
        if self.fails:
            raise SystemExit("pip could not install")

    def run(self, *, python: str = sys.version, fails: bool = False) -> list[str]:
        self.steps, self.fails = [], fails
        self.monkeypatch.setattr(sys, "version", python)
        options = ["setup_venv.py", str(self.venv), "--extras", "train", "--stamp", "train"]
        self.monkeypatch.setattr(sys, "argv", options)
        if fails:
            with pytest.raises(SystemExit):
                setup.main()
        else:
            setup.main()
        return self.steps

    def pythons(self) -> list[str]:
        return sorted(path.name for path in self.venv.glob("of *"))


def test_a_setup_that_failed_half_way_leaves_nothing_to_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path / "venv", monkeypatch)
    assert made.run(python="3.12", fails=True) == ["create", "install"]
    assert made.run(python="3.11") == ["create", "install"]
    assert made.pythons() == ["of 3.11"]
    assert made.run(python="3.11") == []


def test_a_setup_that_failed_half_way_is_ended_by_the_next(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path / "venv", monkeypatch)
    made.run(python="3.12", fails=True)
    assert made.run(python="3.12") == ["install"]
    assert made.run(python="3.12") == []


def test_a_setup_that_was_interrupted_as_it_began_is_begun_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path / "venv", monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(setup, "create", lambda venv: sys.exit(f"{(venv / 'half').mkdir()}"))
        assert made.run(python="3.12", fails=True) == []
    assert made.run(python="3.11") == ["create", "install"]
    assert made.pythons() == ["of 3.11"] and not (made.venv / "half").exists()


def test_an_environment_of_the_users_own_is_not_removed_for_another_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = Made(tmp_path / "venv", monkeypatch)
    for there in (True, False):
        monkeypatch.setattr(setup, "check_foreign", lambda venv, there=there: there)
        assert made.run(python="3.12") == ["create", "install"]
        if there:
            with pytest.raises(SystemExit, match="was there before: remove it"):
                made.run(python="3.11")
            assert made.pythons() == ["of 3.12"]
            shutil.rmtree(made.venv)
    assert made.run(python="3.11") == ["create", "install"]
    assert made.pythons() == ["of 3.11"]


@pytest.mark.skipif(shutil.which("make") is None, reason="there is no make")
def test_make_clean_removes_only_what_it_has_made(tmp_path: Path) -> None:
    """An environment that VENV names, be it by the shell's own variable, was removed; of a path
    with a space, its halves were."""
    shutil.copy(ROOT / "Makefile", tmp_path)
    for name in (".venv", "own", "made", "half"):
        (tmp_path / name).mkdir()
    (tmp_path / "made" / setup.MADE).touch()

    def clean(*options: str) -> str:
        command = ["make", "clean", *options]
        environ = {key: value for key, value in os.environ.items() if key != "VENV"}
        done = subprocess.run(command, cwd=tmp_path, env=environ, capture_output=True, text=True)
        return done.stderr + done.stdout

    assert "has to be one path without spaces" in clean("VENV=half own")
    told = clean("VENV=own")
    assert "own was there before, and stays" in told and "bash" not in told
    clean("VENV=made")
    clean()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["Makefile", "half", "own"]


def test_a_folder_that_no_setup_has_made_is_not_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept = tmp_path / "kept"
    kept.touch()
    made = Made(tmp_path, monkeypatch)
    with pytest.raises(SystemExit, match="is no environment, expected one of"):
        made.run(python="3.11")
    assert kept.exists() and made.steps == []


def test_the_source_distribution_has_all_that_the_checkout_has(tmp_path: Path) -> None:
    """It had the package alone: no train.py, tests or pins, and the metadata told nothing."""
    pytest.importorskip("setuptools")
    root, made = tmp_path / "root", tmp_path / "made"
    left_out = shutil.ignore_patterns("*.egg-info", "__pycache__")
    for folder in FOLDERS:
        shutil.copytree(ROOT / folder, root / folder, ignore=left_out)
    for file in FILES:
        shutil.copy(ROOT / file, root)
    files = {str(path.relative_to(root)) for end in ("py", "md") for path in root.rglob(f"*.{end}")}
    command = [sys.executable, "setup.py", "-q", "sdist", "--dist-dir", str(made)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = made.glob("*.tar.gz")
    with tarfile.open(path) as archive:
        found = {name.partition("/")[2] for name in archive.getnames()}
        about = archive.extractfile(f"{path.name.removesuffix('.tar.gz')}/PKG-INFO")
        assert about is not None and b"\n# ringfold" in about.read()
    assert {*files, *FILES, "benchmarks/gpu.sh"} <= found
