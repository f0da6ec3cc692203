"""A little network, trained, for the tests of checkpoints, and what tells two states apart."""

import threading
from dataclasses import replace

import torch
from torch import nn

from ringfold import Checkpoints, run_local
from ringfold.parallel.checkpoint.manifest import from_text, to_text

LOCK = threading.Lock()  # torch's and Python's global random streams are one for all threads


def network(seed):
    with LOCK, torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(
            nn.Linear(5, 7),
            nn.BatchNorm1d(7, affine=False),
            nn.Linear(7, 7, bias=False),
            nn.Tanh(),
            nn.Linear(7, 3),
        )


def trained(seed, make=lambda m: torch.optim.AdamW(m.parameters(), lr=0.01, betas=(0.8, 0.9))):
    model = network(seed)
    optimizer = make(model)
    for step in range(3):
        optimizer.zero_grad()
        model(torch.arange(20.0).view(4, 5) + step).square().mean().backward()
        optimizer.step()
    return model, optimizer


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert left.dtype == right.dtype and left.shape == right.shape
        bits = [t.contiguous().reshape(-1).view(torch.uint8) for t in (left, right)]
        assert bits[0].equal(bits[1])
    elif isinstance(left, dict):
        assert left.keys() == right.keys()
        for key in left:
            same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for pair in zip(left, right, strict=True):
            same(*pair)
    else:
        assert left == right or (left != left and right != right)


def groups(model):
    """Two groups, a frozen parameter, and one that never had a gradient."""
    model[0].bias.requires_grad_(False)
    rows = [
        {"params": list(model[0].parameters()), "lr": 0.05},
        {"params": [*model[2].parameters(), *model[4].parameters()], "lr": 0.005},
    ]
    return torch.optim.Adam(rows, lr=0.1)


def rewrite(folder, change):
    """Replace the values of the only checkpoint's manifest, as if another version had written."""
    (path,) = folder.glob("*/manifest.json")
    manifest = from_text(path.read_text())
    path.write_text(to_text(replace(manifest, values=change(manifest))))


def numbers(comm, step, size=40):
    return {"v": {"step": step, "x": torch.full((size,), float(step))}}


def three_of_them(tmp_path, keep=None):
    def main(comm):
        with Checkpoints(tmp_path, comm, keep=keep) as checkpoints:
            for step in (10, 20, 30):
                model = network(step)
                checkpoints.save({"m": model, **numbers(comm, step)}, step)

    run_local(2, main)
