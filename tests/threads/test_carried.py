"""A run that stops and is resumed goes on with the bits of the run that did not stop."""

import itertools
import random
from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import ringfold
from ringfold import DataParallel, Dropout, LossScaler, Mesh, Pipeline, Settings, run_local
from ringfold.parallel.carried import merged

STEPS, STOP, BATCH = 14, 12, 12  # PowerSGD sends the first ten as they are
MESSAGES = Settings(shared=False)


def ring(bucket, comm):
    """Add in an order that follows an element's place in its bucket."""
    return comm.allreduce(bucket.flat, op="mean", algorithm="ring", blocking=False)


@dataclass(frozen=True)
class Run:
    """One way to train. ranks: data x pipe."""

    ranks: tuple[int, int]
    wire: str | None
    optimizer: str
    scaler: bool
    check_finite: bool
    dropout: bool
    reduction: str
    bucket_bytes: int | str

    @property
    def fits(self):
        staged = self.ranks[1] > 1 or self.dropout or self.reduction == "tree"
        auto = self.bucket_bytes == "auto"
        return not (
            (self.reduction == "tree" and (self.wire or self.ranks[0] == 3))
            or (staged and auto)
            # fp16 overflows on a scaled loss: that is what a scaler is for, but not a check.
            or (self.scaler and self.check_finite)
        )


EVERY = [
    run
    for values in itertools.product(
        ((3, 1), (2, 2), (1, 2)),
        (None, "bf16", "fp16", "powersgd:1", "topk:0.2", ring),
        ("sgd", "adamw", "sharded", "sharded sgd"),
        (False, True),
        (False, True),
        (False, True),
        ("bucket", "tree"),
        (120, "auto"),
    )
    if (run := Run(*values)).fits
]


def layers(dropout):
    """Made so that gradients do not arrive in the reverse of the parameters' order."""
    generator = torch.Generator().manual_seed(4)
    found = [nn.Linear(5, 9), nn.Tanh(), Crossed(), Dropout(0.3) if dropout else nn.Identity()]
    found += [nn.Linear(9, 8), nn.LayerNorm(8), nn.Linear(8, 3)]
    for parameter in nn.Sequential(*found).parameters():
        with torch.no_grad():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    return found


class Crossed(nn.Module):
    """Use the layer that is defined last first."""

    def __init__(self):
        super().__init__()
        self.second = nn.Linear(9, 9)
        self.first = nn.Linear(9, 9)

    def forward(self, x):
        return self.second(self.first(x).tanh())


OPTIMIZERS = {
    "sgd": lambda named, comm: torch.optim.SGD([p for _, p in named], lr=0.05, momentum=0.9),
    "adamw": lambda named, comm: torch.optim.AdamW([p for _, p in named], lr=0.02),
    "sharded": lambda named, comm: ringfold.ShardedOptimizer(
        named, comm, torch.optim.AdamW, lr=0.02, bucket_bytes=150
    ),
    "sharded sgd": lambda named, comm: ringfold.ShardedOptimizer(
        named, comm, torch.optim.SGD, lr=0.05, momentum=0.9, bucket_bytes=150
    ),
}


class Trained:
    """A run on one rank: what it holds, and a step of it."""

    def __init__(self, comm, run):
        self.run, self.mesh = run, Mesh(comm, data=run.ranks[0], pipe=run.ranks[1])
        self.scaler = LossScaler(comm, 2.0**14, interval=2) if run.scaler else None
        modules = layers(run.dropout)
        self.plain = run.ranks[1] == 1 and not run.dropout and run.reduction == "bucket"
        if self.plain:
            self.engine = DataParallel(
                nn.Sequential(*modules),
                self.mesh.data,
                bucket_bytes=run.bucket_bytes,
                wire=run.wire,
                check_finite=run.check_finite,
                loss_scaler=self.scaler,
            )
        else:
            self.engine = Pipeline(
                modules,
                self.mesh,
                loss_fn=nn.functional.mse_loss,
                microbatches=4,
                bucket_bytes=run.bucket_bytes,
                wire_dtype=run.wire,
                reduction=run.reduction,
                check_finite=run.check_finite,
                loss_scaler=self.scaler,
            )
        named = list(self.engine.named_parameters())
        self.optimizer = OPTIMIZERS[run.optimizer](named, self.mesh.data)
        self.schedule = torch.optim.lr_scheduler.StepLR(self.optimizer, 2, gamma=0.7)

    @property
    def state(self):
        scaler = {"scaler": self.scaler} if self.scaler else {}
        return {
            "model": self.engine,
            "optimizer": self.optimizer,
            "schedule": self.schedule,
            **scaler,
        }

    def step(self, number):
        generator = torch.Generator().manual_seed(1000 + number)
        x = torch.randn(BATCH, 5, generator=generator)
        y = torch.randn(BATCH, 3, generator=generator)
        own = BATCH // self.mesh.data.size
        part = slice(self.mesh.data.rank * own, (self.mesh.data.rank + 1) * own)
        self.optimizer.zero_grad()
        if self.plain:
            loss = nn.functional.mse_loss(self.engine(x[part]), y[part])
            (self.scaler.scale(loss) if self.scaler else loss).backward()
        else:
            self.engine.step(x[part], y[part])
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.step(self.optimizer)
        self.schedule.step()

    def weights(self):
        return {name: value.clone() for name, value in self.engine.state_dict().items()}


def both(run, folder, load=ringfold.load):
    """Return, by rank, the weights of the unbroken run and those of the resumed one."""
    size = run.ranks[0] * run.ranks[1]

    def unbroken(comm):
        trained = Trained(comm, run)
        for number in range(STEPS):
            if number == STOP:
                ringfold.save(folder, trained.state, comm, step=STOP)
            trained.step(number)
        return trained.weights()

    def resumed(comm):
        trained = Trained(comm, run)
        load(folder, trained.state, comm)
        for number in range(STOP, STEPS):
            trained.step(number)
        return trained.weights()

    return run_local(size, unbroken, settings=MESSAGES), run_local(size, resumed, settings=MESSAGES)


def equal(left, right):
    return all(a[n].equal(b[n]) for a, b in zip(left, right, strict=True) for n in a | b)


def a_few(count):
    """Return runs in which every value of every choice occurs, with others at random."""
    draw = random.Random(3)
    chosen = draw.sample(EVERY, count)
    for name in Run.__dataclass_fields__:
        missing = {str(getattr(r, name)): r for r in EVERY}.keys() - {
            str(getattr(r, name)) for r in chosen
        }
        chosen += [next(r for r in EVERY if str(getattr(r, name)) == value) for value in missing]
    return chosen


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("runs", [a_few(24), pytest.param(EVERY, marks=pytest.mark.slow)])
def test_every_way_to_train_goes_on_to_the_last_bit(tmp_path, runs):
    for number, run in enumerate(runs):
        assert equal(*both(run, tmp_path / str(number))), run


PLAIN = Run((3, 1), None, "sgd", False, False, False, "bucket", 120)


@pytest.mark.parametrize("wire", [ring, "powersgd:1", "topk:0.2"])
def test_without_what_reductions_carry_the_bits_are_others(tmp_path, wire, monkeypatch):
    """So that the comparison above can fail."""
    monkeypatch.setattr(DataParallel, "carry_on", lambda self, carried: None)
    assert not equal(*both(replace(PLAIN, wire=wire), tmp_path))


def test_wrappers_within_a_module_go_on_to_the_last_bit(tmp_path):
    """What they had not sent was lost, though the parent was in the state."""

    def make(comm):
        parts = {name: nn.Linear(5, 5) for name in ("first", "last")}
        for shift, part in enumerate(parts.values()):
            with torch.no_grad():
                part.weight.copy_(torch.arange(25.0).reshape(5, 5).sin() + shift)
                part.bias.zero_()
        return nn.ModuleDict({n: DataParallel(p, comm, wire="topk:0.2") for n, p in parts.items()})

    def train(model, comm, steps):
        for step in steps:
            model.zero_grad()
            x = torch.linspace(-1, 1, 10).reshape(2, 5) + comm.rank + step / 7
            model["last"](model["first"](x).tanh()).square().sum().backward()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter -= 0.01 * parameter.grad

    def main(comm):
        unbroken, resumed = make(comm), make(comm)
        train(unbroken, comm, range(4))
        ringfold.save(tmp_path, {"model": unbroken}, comm)
        ringfold.load(tmp_path, {"model": resumed}, comm)
        for model in (unbroken, resumed):
            train(model, comm, range(4, 7))
        return unbroken.state_dict(), resumed.state_dict()

    for unbroken, resumed in run_local(2, main):
        assert equal([unbroken], [resumed])


@pytest.mark.parametrize("wire", ["powersgd:1", "topk:0.2"])
def test_on_other_ranks_nothing_that_was_not_sent_is_lost(tmp_path, wire):
    """The mean over the ranks of what each has not sent stays what it was."""
    run = replace(PLAIN, wire=wire)

    def errors(trained):
        state = trained.engine.carried().hook
        return {name: e["error"].double() for name, e in state.items() if "error" in e}

    def write(comm):
        trained = Trained(comm, run)
        for number in range(13):
            trained.step(number)
        ringfold.save(tmp_path, trained.state, comm, step=13)
        return errors(trained)

    def read(comm):
        trained = Trained(comm, replace(run, ranks=(2, 1)))
        ringfold.load(tmp_path, trained.state, comm)
        return errors(trained)

    before, after = run_local(3, write), run_local(2, read)
    assert before[0] and any(error.any() for error in before[0].values())
    for name in before[0]:
        expected = sum(rank[name] for rank in before) / 3
        for rank in after:
            torch.testing.assert_close(rank[name], expected, rtol=1e-5, atol=1e-7)


def test_another_wire_starts_with_nothing_and_a_rank_of_its_own_with_its_error(tmp_path):
    def write(comm):
        trained = Trained(comm, replace(PLAIN, wire="powersgd:1"))
        for number in range(13):
            trained.step(number)
        ringfold.save(tmp_path, trained.state, comm, step=13)

    def read(comm, wire):
        trained = Trained(comm, replace(PLAIN, wire=wire))
        ringfold.load(tmp_path, trained.state, comm)
        trained.step(13)
        return trained.engine.carried().hook

    run_local(3, write)
    assert run_local(3, lambda comm: read(comm, None)) == [{}, {}, {}]
    for state in run_local(3, lambda comm: read(comm, "topk:0.5")):
        assert all(set(entry) == {"error"} for entry in state.values())
    for state in run_local(3, lambda comm: read(comm, "powersgd:2")):
        assert any(entry["steps"] == 14 and "factor" in entry for entry in state.values())


def test_a_hook_of_ones_own_is_kept_where_it_has_a_state(tmp_path):
    class Counting:
        def __init__(self):
            self.seen = {}

        def __repr__(self):
            return "Counting"

        def __call__(self, bucket, comm):
            self.seen |= {name: self.seen.get(name, 0) + 1 + comm.rank for name in bucket.names}
            return comm.allreduce(bucket.flat, op="mean", blocking=False)

        def state_dict(self):
            return {name: {"seen": count} for name, count in self.seen.items()}

        def load_state_dict(self, state):
            self.seen = {name: entry["seen"] for name, entry in state.items()}

    def main(comm):
        hook, again = Counting(), Counting()
        model = DataParallel(nn.Linear(3, 2), comm, wire=hook)
        for _ in range(3):
            model(torch.ones(2, 3)).sum().backward()
        ringfold.save(tmp_path, {"m": model}, comm)
        ringfold.load(tmp_path, {"m": DataParallel(nn.Linear(3, 2), comm, wire=again)}, comm)
        return again.seen

    assert run_local(2, main) == [{"weight": 3, "bias": 3}, {"weight": 6, "bias": 6}]


def test_the_means_of_states_are_of_floats_only():
    rows = [{"e": torch.tensor([1.0, 2.0]), "n": 3}, {"e": torch.tensor([3.0, 5.0]), "n": 3}]
    found = merged(rows)
    assert found["n"] == 3 and found["e"].tolist() == [2.0, 3.5]
    assert rows[0]["e"].tolist() == [1.0, 2.0]
