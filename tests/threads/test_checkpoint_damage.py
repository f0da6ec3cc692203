"""What damage, a full disk and kills leave of checkpoints."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from checkpointed import network, numbers, same, three_of_them

import ringfold
from ringfold import CheckpointError, Checkpoints, run_local


def test_what_is_being_written_is_waited_for_before_loading(tmp_path):
    def main(comm):
        with Checkpoints(tmp_path, comm) as checkpoints:
            checkpoints.save(numbers(comm, 4, size=300_000), 4)
            assert checkpoints.newest() == 4
            checkpoints.save(numbers(comm, 5, size=300_000), 5)
            assert checkpoints.load({"v": None}).step == 5

    run_local(2, main)


def load_newest(tmp_path):
    def main(comm):
        model = network(0)
        loaded = ringfold.load(tmp_path, {"m": model, "v": None}, comm)
        same(dict(model.state_dict()), dict(network(loaded.step).state_dict()))
        assert loaded.values["v"]["step"] == loaded.step
        return loaded

    return run_local(2, main)[0]


def flip(path, place):
    data = bytearray(path.read_bytes())
    data[place] ^= 1
    path.write_bytes(data)


def test_the_newest_are_kept_and_what_kills_have_left_is_removed(tmp_path):
    (tmp_path / ".partial-000001-step-5").mkdir()
    (tmp_path / "notes.txt").write_text("not a checkpoint")
    three_of_them(tmp_path, keep=2)
    found = sorted(path.name for path in tmp_path.iterdir())
    assert found == ["000002-step-20", "000003-step-30", "notes.txt"]
    assert load_newest(tmp_path).step == 30


@pytest.mark.filterwarnings("ignore:.*is damaged:RuntimeWarning")
@pytest.mark.parametrize("rank", [0, 1])
def test_every_damaged_file_is_named_and_the_one_before_is_taken(tmp_path, rank):
    three_of_them(tmp_path)
    name = f"rank-0000{rank}.safetensors"
    newest, middle = tmp_path / "000003-step-30", tmp_path / "000002-step-20"
    flip(newest / name, -1)
    (middle / name).unlink()
    loaded = load_newest(tmp_path)
    assert loaded.step == 10 and len(loaded.damaged) == 2
    last = list(json.loads((newest / "manifest.json").read_text())["tensors"].items())
    assert f"{name}: tensor " in loaded.damaged[0] and "checksum" in loaded.damaged[0]
    assert any(f"tensor {key} " in loaded.damaged[0] for key, row in last if row["file"] == name)
    assert name in loaded.damaged[1] and "No such file" in loaded.damaged[1]
    (tmp_path / "000001-step-10" / "manifest.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"no checkpoint that can be loaded\n.*\n.*\n.*manif"):
        load_newest(tmp_path)


def test_damage_is_warned_of(tmp_path):
    three_of_them(tmp_path)
    (tmp_path / "000003-step-30" / "manifest.json").unlink()
    with pytest.warns(RuntimeWarning, match=r"000003-step-30 is damaged.*manifest\.json"):
        assert load_newest(tmp_path).step == 20


def test_no_byte_of_a_file_can_be_changed_unseen(tmp_path):
    """Every byte of a tensor file and of the manifest: damage, or the very same state."""
    run_local(1, lambda comm: ringfold.save(tmp_path, numbers(comm, 4, size=3), comm, step=4))
    (place,) = tmp_path.iterdir()

    def main(comm):
        try:
            return ringfold.load(tmp_path, {"v": None}, comm).values["v"]
        except CheckpointError:
            return None

    seen = 0
    for path in place.iterdir():
        data = path.read_bytes()
        for index in range(0, len(data), 3):
            flip(path, index)
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr("warnings.warn", lambda *args, **kwargs: None)
                found = run_local(1, main)[0]
            path.write_bytes(data)
            if found is None:
                seen += 1
            else:
                same(found, numbers(None, 4, size=3)["v"])
    assert seen > 200


def test_a_folder_that_cannot_be_written_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")

    def main(comm):
        for folder in (tmp_path / "file", Path("/proc/ringfold")):
            with pytest.raises(CheckpointError, match=r"step 1 in .*: rank 0: \[Errno"):
                ringfold.save(folder, numbers(comm, 1), comm, step=1)
            with pytest.raises(CheckpointError, match="rank 0"):
                Checkpoints(folder, comm).probe()

    run_local(2, main)


def test_a_disk_without_room_is_refused_before_writing(tmp_path, monkeypatch):
    three_of_them(tmp_path)
    real = os.statvfs(tmp_path)
    full = type("Full", (), {"f_bavail": 0, "f_frsize": real.f_frsize})
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    with pytest.raises(CheckpointError, match=r"the disk has 0 bytes free, the .* needs 160"):
        run_local(2, lambda comm: ringfold.save(tmp_path, numbers(comm, 40), comm, step=40))
    monkeypatch.undo()
    assert load_newest(tmp_path).step == 30


LIMITED = """
import resource, sys
import torch, ringfold
folder = sys.argv[1]
state = lambda step, n: {"v": {"step": step, "x": torch.full((n,), float(step))}}
ringfold.run_local(2, lambda comm: ringfold.save(folder, state(1, 10), comm, step=1, keep=1))
resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
try:
    ringfold.run_local(2, lambda comm: ringfold.save(folder, state(2, 10**6), comm, step=2, keep=1))
except ringfold.CheckpointError as error:
    print(error)
print(ringfold.run_local(2, lambda comm: ringfold.load(folder, {"v": None}, comm).step))
"""


def test_a_disk_that_fills_up_while_writing_leaves_the_old_one(tmp_path):
    run = [sys.executable, "-c", LIMITED, str(tmp_path)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "checkpoint of step 2" in done.stdout and "File too large" in done.stdout
    assert done.stdout.splitlines()[-1] == "[1, 1]"
    assert [path.name for path in tmp_path.iterdir()] == ["000001-step-1"]


KILLED = """
import os, random, signal, sys, time, warnings
import torch, ringfold
folder, kills = sys.argv[1], int(sys.argv[2])
torch.set_num_threads(1)
warnings.simplefilter("error")  # a damaged checkpoint would be warned of

def state(step):
    return {"v": {"step": step, "x": [torch.full((50_000,), float(step + i)) for i in range(4)]}}

def note(rank):
    return f"{folder}-done-{rank}"

def write(first):
    def main(comm):
        with ringfold.Checkpoints(folder, comm, keep=2) as checkpoints:
            for step in range(first, 10**9):
                checkpoints.save(state(step), step)
                with open(note(comm.rank), "w") as file:
                    file.write(str(step - 1))  # save() has waited for the one before
    ringfold.run_local(2, main)

def read(comm):
    if ringfold.Checkpoints(folder, comm).newest() is not None:
        return ringfold.load(folder, {"v": None}, comm)

def said():
    notes = [open(note(rank)).read() for rank in (0, 1) if os.path.exists(note(rank))]
    return max(int(text or 0) for text in [*notes, "0"])

def killed(first, enough):
    child = os.fork()
    if child == 0:
        write(first)
    while not enough():
        time.sleep(0.001)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)

draw, step, within = random.Random(7), 0, 0
os.mkdir(folder)
begun = time.monotonic()
killed(1, lambda: said() > 0)
one = time.monotonic() - begun  # how long this machine takes until a checkpoint is written
for _ in range(kills):
    end = time.monotonic() + draw.uniform(0.0, 2 * one)
    killed(step + 1, lambda: time.monotonic() > end)
    within += any(name.startswith(".partial") for name in os.listdir(folder))
    claimed = said()
    loaded = ringfold.run_local(1, read)[0]
    if loaded is None:
        assert claimed == 0
        continue
    assert loaded.step >= max(step, claimed), (loaded.step, step, claimed)
    found = loaded.values["v"]
    assert found["step"] == loaded.step
    assert all(x.eq(loaded.step + i).all() for i, x in enumerate(found["x"]))
    step = loaded.step
print(step, within)
"""


@pytest.mark.parametrize("kills", [8, pytest.param(100, marks=pytest.mark.slow)])
def test_a_kill_at_any_moment_leaves_the_last_whole_checkpoint(tmp_path, kills):
    run = [sys.executable, "-c", KILLED, str(tmp_path / "store"), str(kills)]
    done = subprocess.run(run, capture_output=True, text=True, timeout=110)
    assert done.returncode == 0, done.stderr
    step, within = map(int, done.stdout.split())
    assert step > 0 and within > 0  # some were written, and some kills fell into the writing
