"""Processes that need the same kernel at the same moment, with nothing compiled before."""

import errno
import fcntl
import os
import signal
import subprocess
import sys
import zlib
from types import SimpleNamespace

import numba
import numpy as np
import pytest
from numba import types

from ringfold.kernels import compiled

SCRIPT = """
from numba import types
import numpy
from ringfold.kernels.compiled import compile_kernel, flat

def twice(x):
    return 2 * x[0]

kernel = compile_kernel("twice", twice, flat(types.int64))
assert kernel(numpy.array([4])) == 8
print(sum(kernel.stats.cache_misses.values()))
"""


def start(folder, script):
    environment = os.environ | {"NUMBA_CACHE_DIR": str(folder / "cache")}
    command = [sys.executable, str(script)]
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_one_process_compiles_and_says_so(tmp_path):
    """The script is a file, as Numba keeps nothing of what has no source."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    jobs = [start(tmp_path, script) for _ in range(4)]
    outputs = [job.communicate(timeout=100) for job in jobs]
    assert [job.returncode for job in jobs] == [0] * 4, outputs
    assert sorted(int(out) for out, _ in outputs) == [0, 0, 0, 1]
    words = "".join(err for _, err in outputs)
    assert words.count("\n") == 1, words
    assert words.startswith("ringfold: compiling kernels for this machine, once; they are kept in ")
    again = start(tmp_path, script).communicate(timeout=100)
    assert again == ("0\n", "")


def test_kernels_of_another_python_are_not_taken_for_this_ones(monkeypatch, tmp_path):
    """Its index was, in a checkout that two Pythons share: every rank compiled, without a word."""
    other = SimpleNamespace(cache_tag="cpython-399")
    with monkeypatch.context() as patch:
        patch.setattr(compiled.sys, "implementation", other)
        name = f"twice_{compiled._fingerprint.__wrapped__()}"
    (tmp_path / f"script.{name}-10.py399.nbi").touch()
    own = f"twice_{compiled._fingerprint()}"
    assert compiled._kept(tmp_path, name) and not compiled._kept(tmp_path, own)


def test_numbers_are_converted_and_nothing_else_is_taken():
    kernel = compiled.compile_kernel("half", lambda x, y: x // y, types.int64, types.int64)
    assert kernel(8, np.int64(2)) == kernel(8.9, True) / 2 == 4
    for wrong in ((8,), (8, 2, 1), (np.zeros(3), 2), (None, 2)):
        with pytest.raises(TypeError):
            kernel(*wrong)


def test_patience_ends_where_another_process_stands_still(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(compiled, "_PATIENCE", 0.3)
    held = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(tmp_path / "ringfold.lock"), str(zlib.crc32(b"kernel"))],
        stdout=subprocess.PIPE,
        stdin=subprocess.PIPE,
    )
    try:
        assert held.stdout is not None and held.stdout.readline() == b"held\n"
        with compiled._turn(tmp_path, "kernel"):
            pass
        with (tmp_path / "ringfold.lock").open("ab") as file, pytest.raises(BlockingIOError):
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, zlib.crc32(b"kernel"))
    finally:
        held.kill()
        held.communicate()
    assert "compiling kernels" in capsys.readouterr().err


HOLD = """
import fcntl, sys
file = open(sys.argv[1], "ab")
fcntl.lockf(file, fcntl.LOCK_EX, 1, int(sys.argv[2]))
print("held", flush=True)
sys.stdin.read()
"""


def test_where_nothing_can_be_locked_everybody_compiles(tmp_path, capsys):
    for _ in range(2):
        with compiled._turn(tmp_path / "missing", "kernel"):
            assert not (tmp_path / "missing").exists()
    assert capsys.readouterr().err.count("compiling kernels") == 2


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A folder of kernels that has one for `compile_twice`, and what was said so far forgotten."""
    monkeypatch.setattr(numba.config, "CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(compiled, "_NOT_KEPT", [])
    compile_twice()
    return tmp_path


def compile_twice():
    def twice(x):
        return 2 * x[0]

    kernel = compiled.compile_kernel("twice", twice, compiled.flat(types.int64))
    assert kernel(np.array([4])) == 8


@pytest.mark.parametrize("end", ["nbi", "nbc"])
def test_a_kept_kernel_that_is_damaged_is_compiled_again(kept, capsys, end):
    """A machine that loses power leaves such: every start ended with EOFError."""
    for file in kept.rglob(f"*.{end}"):
        file.write_bytes(file.read_bytes()[:1])
    capsys.readouterr()
    for _ in range(2):
        compile_twice()
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and "remove it where it is damaged" in said


def test_a_full_disk_keeps_no_kernels_and_ends_nothing(kept, monkeypatch, capsys):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    for file in kept.rglob("*.nb?"):
        file.unlink()
    monkeypatch.setattr(compiled.caching.IndexDataCacheFile, "_save_data", full)
    compile_twice()
    assert "No space left" in capsys.readouterr().err


def test_what_a_handler_raises_in_the_cache_is_no_matter_of_the_cache(kept, monkeypatch, capsys):
    """It was taken for a cache that failed, and a preemption's signal was lost."""

    class Stop(Exception):
        pass

    def stop(*_):
        raise Stop

    def save(*_):
        signal.raise_signal(signal.SIGALRM)

    for file in kept.rglob("*.nb?"):
        file.unlink()
    monkeypatch.setattr(compiled.caching.IndexDataCacheFile, "_save_data", save)
    before = signal.signal(signal.SIGALRM, stop)
    try:
        with pytest.raises(Stop):
            compile_twice()
    finally:
        signal.signal(signal.SIGALRM, before)
    assert "anew" not in capsys.readouterr().err


def test_it_is_said_where_no_folder_keeps_kernels(monkeypatch, capsys):
    def none(_):
        raise RuntimeError("cannot cache function 'twice': no locator available for file")

    monkeypatch.setattr(compiled, "_NOT_KEPT", [])
    monkeypatch.setattr(compiled.caching, "FunctionCache", none)
    compile_twice()
    assert "compiled anew by every start: no folder to keep" in capsys.readouterr().err


def test_without_numbas_compiler_it_is_said_what_switches_it_off(monkeypatch):
    monkeypatch.setattr(numba.config, "DISABLE_JIT", 1)
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT=1 switches off: unset it"):
        compile_twice()


def test_what_is_wrong_with_a_kernel_is_no_matter_of_the_cache(kept, capsys):
    capsys.readouterr()
    with pytest.raises(numba.TypingError):
        compiled.compile_kernel("wrong", lambda x: x.nothing, types.int64)
    assert "anew" not in capsys.readouterr().err
