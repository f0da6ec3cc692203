"""Several runs write into one folder of checkpoints: each leaves the others' alone."""

import contextlib
import errno
import fcntl
import itertools
import os
import shutil
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
import torch

import ringfold
from ringfold import CheckpointError, Checkpoints, CommTimeout, run_local
from ringfold.parallel.checkpoint import partial, session, store, writer
from ringfold.parallel.checkpoint.partial import make_partial
from ringfold.parallel.checkpoint.snapshot import Snapshot


def numbers(step):
    return {"v": {"step": step, "x": torch.full((40,), float(step))}}


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def loaded(folder, comm, step):
    found = ringfold.load(folder, {"v": None}, comm, step=step).values["v"]
    assert found["x"].eq(step).all()
    return found["step"]


@pytest.mark.parametrize("slow", [0, 1])
def test_what_another_is_writing_is_left_alone(tmp_path, monkeypatch, slow):
    """As where a second job starts on the folder of one that runs, or keeps its best there."""
    go_on = threading.Event()
    write = writer.write_tensors

    def wait(path, tensors):
        if "step-7-" in path.parent.name and path.name == f"rank-0000{slow}.safetensors":
            assert go_on.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", wait)

    def main(comm):
        with Checkpoints(tmp_path, comm) as last, Checkpoints(tmp_path, comm) as best:
            last.save(numbers(7), 7)
            best.probe()
            best.save(numbers(5), 5)
            best.wait()
            best.save(numbers(7), 7)  # of the same step, and waiting, too
            comm.barrier()
            go_on.set()
        return loaded(tmp_path, comm, 5), loaded(tmp_path, comm, 7)

    assert run_local(2, main) == [(5, 7)] * 2
    assert names(tmp_path) == ["000001-step-5", "000002-step-7", "000003-step-7"]


def test_a_checkpoint_that_fails_leaves_nothing_and_the_others_alone(tmp_path, monkeypatch):
    write = writer.write_tensors

    def fail(path, tensors):
        if "step-7-" in path.parent.name and path.name == "rank-00001.safetensors":
            raise OSError(errno.EIO, "worn out")
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", fail)

    def main(comm):
        first, second = Checkpoints(tmp_path, comm), Checkpoints(tmp_path, comm)
        first.save(numbers(7), 7)
        second.save(numbers(8), 8)
        with pytest.raises(CheckpointError, match=r"rank 1: OSError: .*worn out"):
            first.wait()
        second.wait()

    run_local(2, main)
    assert names(tmp_path) == ["000001-step-8"]


HOLDER = """
import sys
from pathlib import Path
from ringfold.parallel.checkpoint.partial import make_partial
from ringfold.parallel.checkpoint.snapshot import Snapshot
made = make_partial(Path(sys.argv[1]), 3, 0)
(made.path / "half").write_text("half")
print(made.path.name, flush=True)
sys.stdin.read()
"""


def test_the_folder_of_a_killed_process_is_removed_and_that_of_a_living_one_is_not(tmp_path):
    command = [sys.executable, "-c", HOLDER, str(tmp_path)]
    holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        name = holder.stdout.readline().strip()
        make_partial(tmp_path, 4, 0).discard()
        assert names(tmp_path) == [name, f"{name}.lock"] and (tmp_path / name / "half").exists()
    finally:
        holder.kill()
        holder.communicate(timeout=60)
    made = make_partial(tmp_path, 5, 0)
    assert names(tmp_path) == [made.path.name, f"{made.path.name}.lock"]
    made.discard()
    assert names(tmp_path) == []


def test_without_locks_checkpoints_are_written_and_what_is_left_stays(tmp_path, monkeypatch):
    def refuse(descriptor, operation):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", refuse)
    left = make_partial(tmp_path, 1, 0).path.name

    def main(comm):
        ringfold.save(tmp_path, numbers(2), comm, step=2)
        return loaded(tmp_path, comm, 2)

    assert run_local(2, main) == [2, 2]
    assert names(tmp_path) == [left, f"{left}.lock", "000001-step-2"]


def test_a_lock_that_is_swept_away_before_it_is_held_is_made_again(tmp_path, monkeypatch):
    real, swept = fcntl.flock, []

    def sweep_first(descriptor, operation):
        if not swept:
            (lock,) = tmp_path.glob("*.lock")
            swept.append(lock.name)
            lock.unlink()
        real(descriptor, operation)

    monkeypatch.setattr(partial.fcntl, "flock", sweep_first)
    made = make_partial(tmp_path, 1, 0)
    assert names(tmp_path) == [made.path.name, f"{made.path.name}.lock"]
    assert f"{made.path.name}.lock" not in swept
    made.discard()


def test_two_that_take_the_same_number_at_once_get_two(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "places", lambda root: [])  # neither has seen the other
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(3), comm, step=3))
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(3), comm, step=3))
    assert names(tmp_path) == ["000001-step-3", "000002-step-3"]


def test_an_old_checkpoint_that_cannot_be_removed_stays_and_the_new_one_counts(
    tmp_path, monkeypatch
):
    """As another user's, where the folder has the sticky bit: every save was said to have failed,
    although its checkpoint was whole, and others that were old enough stayed, too.
    """
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(1), comm, step=1))
    rename = type(tmp_path).rename

    def refuse(path, target):
        if path.name == "000001-step-1":
            raise PermissionError(errno.EPERM, os.strerror(errno.EPERM))
        return rename(path, target)

    monkeypatch.setattr(type(tmp_path), "rename", refuse)

    def main(comm):
        checkpoints = Checkpoints(tmp_path, comm, keep=1)
        for step in (2, 3, 4):
            checkpoints.save(numbers(step), step)
            checkpoints.wait()
        return checkpoints.newest()

    with pytest.warns(RuntimeWarning, match="1 is to go, but stays: Operation not permitted"):
        assert run_local(2, main) == [4, 4]
    assert names(tmp_path) == ["000001-step-1", "000004-step-4"]


@pytest.mark.parametrize("step", [100.0, -1, "best", True, None, torch.tensor(3.0), np.int64(-2)])
def test_a_step_that_would_not_be_found_again_is_refused_on_all_ranks(tmp_path, step):
    def main(comm):
        with Checkpoints(tmp_path, comm) as checkpoints:
            with pytest.raises(CheckpointError, match="rank 1: expected a whole number from 0 on"):
                checkpoints.save(numbers(1), 1 if comm.rank == 0 else step)
            assert not list(tmp_path.iterdir())

    run_local(2, main)


@pytest.mark.parametrize("step", [0, np.int64(5), np.uint8(7), torch.tensor(9), 2**40])
def test_every_kind_of_whole_number_is_a_step(tmp_path, step):
    def main(comm):
        ringfold.save(tmp_path, numbers(int(step)), comm, step=step)
        found = ringfold.load(tmp_path, {"v": None}, comm, step=step)
        assert found.step == step and type(found.step) is int
        assert loaded(tmp_path, comm, int(step)) == step

    run_local(2, main)


def test_a_checkpoint_under_another_name_is_loaded_by_its_path_and_not_written_into(tmp_path):
    def main(comm):
        for step in (3, 5):
            ringfold.save(tmp_path / "runs", numbers(step), comm, step=step)
        if comm.rank == 0:
            (tmp_path / "runs" / "000001-step-3").rename(tmp_path / "the best")
        comm.barrier()
        for folder, step in ((tmp_path / "the best", 3), (tmp_path / "runs" / "000002-step-5", 5)):
            assert Checkpoints(folder, comm).newest() == step
            found = ringfold.load(folder, {"v": None}, comm)
            assert (found.step, found.path, found.values["v"]["step"]) == (step, folder, step)
            with pytest.raises(CheckpointError, match="the folder is a checkpoint"):
                ringfold.save(folder, numbers(7), comm, step=7)

    run_local(2, main)


def test_a_relative_folder_is_where_it_was_when_opened(tmp_path, monkeypatch):
    """It was looked for wherever the program had gone: what was being written failed, and what
    came then lay in another folder.
    """
    gone = threading.Event()
    write = writer.write_tensors

    def wait(path, tensors):
        assert gone.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", wait)
    (tmp_path / "link").symlink_to(tmp_path / "disk")
    (tmp_path / "disk").mkdir()
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    def main(comm):
        checkpoints = Checkpoints("link/runs", comm)
        checkpoints.save(numbers(3), 3)
        comm.barrier()
        if comm.rank == 0:
            os.chdir("elsewhere")
            gone.set()
        checkpoints.wait()
        checkpoints.save(numbers(5), 5)
        path = checkpoints.wait()
        assert path == (None if comm.rank else tmp_path / "link" / "runs" / "000002-step-5")

    run_local(2, main)
    assert names(tmp_path / "disk" / "runs") == ["000001-step-3", "000002-step-5"]
    assert names(tmp_path / "elsewhere") == []


@pytest.mark.parametrize("status", [0, 75])
@pytest.mark.parametrize("leaving", [[0, 1], [0], [1]])
def test_a_program_that_exits_waits_for_what_is_being_written(
    tmp_path, monkeypatch, leaving, status
):
    """As where the notice of a scheduler lets it save and exit: no checkpoint was there."""
    exits = threading.Event()
    write = writer.write_tensors

    def wait(path, tensors):
        if path.name == "rank-00001.safetensors":
            assert exits.wait(60)
            time.sleep(0.1)  # rank 0 has left by then, if it does not wait
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", wait)

    def main(comm):
        checkpoints = Checkpoints(tmp_path, comm, patience=60)
        if comm.rank in leaving:
            with checkpoints:
                checkpoints.save(numbers(7), 7)
                exits.set()
                sys.exit(status)
        checkpoints.save(numbers(7), 7)
        while checkpoints.busy:
            time.sleep(0.01)

    with pytest.raises(SystemExit) as caught:
        run_local(2, main)
    assert caught.value.code == status
    assert names(tmp_path) == ["000001-step-7"]


def test_a_program_that_exits_fails_where_the_checkpoint_does(tmp_path, monkeypatch):
    def fail(path, tensors):
        raise OSError(errno.EIO, "worn out")

    monkeypatch.setattr(writer, "write_tensors", fail)

    def main(comm):
        told = rf"step 7 in .*: rank {comm.rank}: .*worn out"
        with (
            pytest.raises(CheckpointError, match=told),
            Checkpoints(tmp_path, comm) as checkpoints,
        ):
            checkpoints.save(numbers(7), 7)
            sys.exit()

    run_local(2, main)
    assert names(tmp_path) == []


def test_a_folder_that_is_still_written_to_is_removed_all_the_same(tmp_path, monkeypatch):
    """A rank told its part's failure between the last file and the folder, which then stayed."""
    made = make_partial(tmp_path, 7, 0)
    (made.path / "0.safetensors").touch()

    def remove_late(folder, ignore_errors):
        assert ignore_errors
        for path in folder.iterdir():
            path.unlink()
        with contextlib.suppress(FileNotFoundError):
            (made.path / "1.json").touch()
        with contextlib.suppress(OSError):
            folder.rmdir()

    monkeypatch.setattr(shutil, "rmtree", remove_late)
    made.discard()
    assert names(tmp_path) == []


def rotated(monkeypatch, folder, times):
    """Let another job replace the only checkpoint, by itself, as often, once it is listed."""
    listing = session.places
    left = iter(range(times))

    def then_rotate(root):
        found = listing(root)
        for _ in itertools.islice(left, 1):
            found[0].path.rename(folder / f"{found[0].sequence + 1:06d}-step-7")
        return found

    monkeypatch.setattr(session, "places", then_rotate)


def test_a_checkpoint_that_another_job_removes_meanwhile_is_no_damage(tmp_path, monkeypatch):
    """An evaluator found none, since it had listed only that one, though one was always there."""
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(7), comm, step=7))
    rotated(monkeypatch, tmp_path, 1)

    def main(comm):
        found = ringfold.load(tmp_path, {"v": None}, comm)
        return found.path.name, found.damaged

    assert run_local(2, main) == [("000002-step-7", ())] * 2


def test_a_checkpoint_that_is_replaced_while_the_folder_is_listed_is_found(tmp_path, monkeypatch):
    """Its name was listed, and gone when looked at; that of the next was not listed."""
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(7), comm, step=7))
    listing = type(tmp_path).iterdir
    left = iter([True])

    def then_rename(root):
        found = list(listing(root))
        for _ in left:
            found[0].rename(tmp_path / "000002-step-7")
        return iter(found)

    monkeypatch.setattr(type(tmp_path), "iterdir", then_rename)
    assert [place.path.name for place in store.places(tmp_path)] == ["000002-step-7"]


def test_a_folder_that_is_rotated_faster_than_read_is_told(tmp_path, monkeypatch):
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(7), comm, step=7))
    monkeypatch.setattr(session, "_ROTATED", 3)
    rotated(monkeypatch, tmp_path, 9)

    def main(comm):
        with pytest.raises(CheckpointError, match="3 removed while they were read"):
            ringfold.load(tmp_path, {"v": None}, comm)

    run_local(2, main)


@pytest.mark.parametrize("what", ["result", "folder early", "folder late", "memory"])
def test_what_keeps_one_rank_from_writing_is_told_at_once(tmp_path, monkeypatch, what):
    """As where the disk is full by the very last file, or somebody removes the folder.

    It goes before rank 0 has begun to write its part, or after that is on the disk.
    """
    write, take = writer.write_text, Snapshot.take
    written, removed = threading.Event(), threading.Event()

    def full(path, text):
        if what == "result" and path.name == "rank-00001.json":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        write(path, text)
        if what.startswith("folder") and path.name == "rank-00001.json":
            assert what == "folder early" or written.wait(60)
            shutil.rmtree(tmp_path)
            removed.set()

    def slow(path, tensors):
        first = path.name.startswith("rank-00000")
        assert not (first and what == "folder early") or removed.wait(60)
        found = write_tensors(path, tensors)
        if first and what == "folder late":
            written.set()
            assert removed.wait(60)
        return found

    def short(self, tensors):
        if what == "memory" and "m/p1" in tensors:
            raise MemoryError
        return take(self, tensors)

    write_tensors = writer.write_tensors
    monkeypatch.setattr(writer, "write_text", full)
    monkeypatch.setattr(writer, "write_tensors", slow)
    monkeypatch.setattr(Snapshot, "take", short)
    told = {
        "result": "rank 1: OSError: .* No space left on device",
        "folder": "rank 0: FileNotFoundError: .* has been removed",
        "memory": "rank 1: no copies of the state: MemoryError",
    }[what.split()[0]]

    def main(comm):
        model = torch.nn.ParameterDict({f"p{comm.rank}": torch.zeros(4)})  # each rank has its own
        with pytest.raises(CheckpointError, match=told):
            ringfold.save(tmp_path, {"m": model}, comm, step=1)

    run_local(2, main)


def test_files_and_links_under_the_names_of_checkpoints_are_no_trouble(tmp_path):
    folder = tmp_path / "runs"

    def main(comm):
        ringfold.save(folder, numbers(1), comm, step=1)
        (folder / "000001-step-1").rename(tmp_path / "elsewhere")
        (folder / "000001-step-1").symlink_to(tmp_path / "elsewhere")
        (folder / "000002-step-2").write_text("no folder")
        assert loaded(folder, comm, 1) == 1
        ringfold.save(folder, numbers(2), comm, step=2, keep=1)

    run_local(1, main)
    assert names(folder) == ["000002-step-2", "000003-step-2"]
    assert "manifest.json" in names(tmp_path / "elsewhere")


def test_a_folder_that_rank_0_cannot_read_is_told_on_all_ranks(tmp_path):
    def main(comm):
        for use in (Checkpoints.newest, lambda found: found.load({})):
            with pytest.raises(CheckpointError, match=r"reading .*: rank 0: .* name too long"):
                use(Checkpoints(tmp_path / ("x" * 300), comm))

    run_local(2, main)


def test_a_slow_disk_is_waited_for_as_long_as_patience_lasts(tmp_path, monkeypatch):
    go_on = threading.Event()
    write = writer.write_tensors

    def slow(path, tensors):
        assert not path.name.startswith("rank-00000") or go_on.wait(60)
        return write(path, tensors)

    monkeypatch.setattr(writer, "write_tensors", slow)

    def main(comm):
        checkpoints = Checkpoints(tmp_path, comm, patience=0.2 if comm.rank else 60)
        checkpoints.save(numbers(3), 3)
        while True:
            try:
                checkpoints.wait()
                return loaded(tmp_path, comm, 3)
            except CommTimeout as error:  # of the impatient rank, which waits again
                assert "in barrier" in str(error)
                go_on.set()

    assert run_local(2, main) == [3, 3]
