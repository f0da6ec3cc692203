"""train.py --dump: what cannot be written is told on all ranks, at the start or by a full disk."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ringfold import Mesh, run_local
from ringfold.workloads.agree import settle
from ringfold.workloads.dump import Dump
from ringfold.workloads.options import UsageError


def dump_of(folder, comm, pipe=2):
    """Return a dump of one parameter in each stage, made as train.py makes it."""
    stage = comm.rank % pipe
    weights = [(f"{stage}.w", torch.full((3,), float(stage)))]
    engine = SimpleNamespace(named_parameters=lambda: weights)
    mesh = Mesh(comm, pipe=pipe)
    return settle(comm, lambda: Dump(folder, mesh, engine))


def test_every_stage_writes_its_weights_of_every_step(tmp_path):
    folder = tmp_path / "new" / "d"

    def main(comm):
        dump = dump_of(folder, comm)
        for step in (1, 2):
            dump.after(step)

    run_local(2, main)
    files = {path.name: load_file(path) for path in folder.iterdir()}
    names = [f"step0000000{step}.stage{stage}.safetensors" for step in (1, 2) for stage in (0, 1)]
    assert sorted(files) == names
    assert files["step00000002.stage1.safetensors"]["1.w"].tolist() == [1.0] * 3


@pytest.mark.parametrize("where", ["no folder", "half a file"])
def test_a_dump_that_can_no_longer_be_written_ends_all_ranks_with_one_line(
    tmp_path, monkeypatch, where
):
    """Of a full disk there was a traceback on one rank: the library's error is no OSError."""

    def half(tensors, path):
        if "stage1" in path.name:
            save_file(tensors, path)
            return
        path.write_text("half")
        raise SafetensorError("I/O error: No space left on device")

    def main(comm):
        dump = dump_of(tmp_path / "d", comm)
        dump.after(1)
        if comm.rank == 0 and where == "no folder":
            shutil.rmtree(tmp_path / "d")
        elif comm.rank == 0:
            monkeypatch.setattr("safetensors.torch.save_file", half)
        comm.barrier()
        told = r"cannot write the dump: .*step00000002\.stage0\.safetensors: .*(No such|No space)"
        with pytest.raises(UsageError, match=told):
            dump.after(2)

    run_local(2, main)
    assert not list(tmp_path.glob("d/step00000002.stage0*"))


def test_a_folder_that_may_not_be_written_is_refused_at_the_start(tmp_path, monkeypatch):
    """It was found out in the first step, by a traceback."""
    monkeypatch.setattr(os, "access", lambda path, mode: False)

    def main(comm):
        with pytest.raises(UsageError, match=f"--dump {tmp_path} may not be written"):
            dump_of(tmp_path, comm, pipe=1)

    run_local(2, main)
