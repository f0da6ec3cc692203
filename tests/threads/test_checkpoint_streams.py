"""Random streams go on where a checkpoint has left them."""

import numpy as np
import pytest
import torch
from checkpointed import LOCK, network, same
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ringfold
from ringfold import CheckpointError, RandomStreams, run_local
from ringfold.parallel import GlobalBatchSampler


def test_random_streams_go_on(tmp_path):
    import random

    def draw(streams):
        generator, twister = streams.generators["numpy"], streams.generators["torch"]
        return (
            torch.rand(3).tolist(),
            np.random.rand(3).tolist(),
            random.random(),
            random.gauss(0, 1),
            generator.random(3).tolist(),
            torch.rand(3, generator=twister).tolist(),
        )

    def streams():
        return RandomStreams(numpy=np.random.default_rng(5), torch=torch.Generator().manual_seed(6))

    def main(comm):
        own = streams()
        draw(own)
        ringfold.save(tmp_path, {"random": own}, comm)
        expected = draw(own)
        other = streams()
        ringfold.load(tmp_path, {"random": other}, comm)
        assert draw(other) == expected

    def read(comm):
        twister = torch.Generator()
        ringfold.load(tmp_path, {"random": RandomStreams(own=twister)}, comm)
        return torch.rand(1, generator=twister).item()

    with torch.random.fork_rng():
        run_local(1, main)
        on_two = run_local(2, read)
        assert len(set(on_two)) == 2 and on_two == run_local(2, read)


def test_an_epoch_goes_on_in_its_middle_where_its_loader_has_a_generator_of_its_own(tmp_path):
    """As docs/checkpoints.md has it: torch's loader draws from the global stream once an epoch."""
    data = TensorDataset(torch.arange(48.0).view(16, 3) / 48)

    def train(comm, resumed):
        torch.manual_seed(9 if resumed else 5)
        model = nn.Sequential(nn.Linear(3, 9), nn.Dropout(0.5), nn.Linear(9, 1))
        state = {"m": model, "o": torch.optim.SGD(model.parameters(), lr=0.1)}
        state["random"] = RandomStreams()
        sampler = GlobalBatchSampler(len(data), 4, comm.rank, comm.size)
        loader = DataLoader(data, batch_sampler=sampler, generator=torch.Generator())
        at = {"epoch": 0, "batch": 0}
        if resumed:
            at = ringfold.load(tmp_path, {**state, "at": None}, comm).values["at"]
        for epoch in range(at["epoch"], 3):
            sampler.set_epoch(epoch, done=at["batch"] if epoch == at["epoch"] else 0)
            for batch, (x,) in enumerate(loader, sampler.done):
                state["o"].zero_grad()
                model(x).square().mean().backward()
                state["o"].step()
                if (epoch, batch) == (1, 1) and not resumed:
                    place = {"epoch": epoch, "batch": batch + 1}
                    ringfold.save(tmp_path, {**state, "at": place}, comm)
        return dict(model.state_dict())

    with LOCK, torch.random.fork_rng():
        same(*(run_local(1, lambda comm, r=r: train(comm, r))[0] for r in (False, True)))


@pytest.mark.parametrize(
    ("kept", "complaint"),
    [
        (None, r"random/1: the checkpoint of step 3 has no such value"),
        ({"other": 5}, r"random/1/generators/aug: the checkpoint of step 3 .* only \['other'\]"),
        ({"aug": np.random.default_rng(5)}, r"aug: expected a state of torch.Generator, .* PCG64"),
    ],
)
def test_streams_that_do_not_fit_are_refused_before_anything_is_changed(tmp_path, kept, complaint):
    def streams(generators):
        made = {k: torch.Generator() if v == 5 else v for k, v in generators.items()}
        return RandomStreams(**made)

    def main(comm):
        extra = {} if kept is None else {"random": streams(kept)}
        ringfold.save(tmp_path, {"m": network(1), **extra}, comm, step=3)
        model, augmentation = network(2), torch.Generator().manual_seed(7 + comm.rank)
        # Rank 0 has none of that name, and is told, too.
        own = {"aug": augmentation} if comm.rank == 1 or kept is None else {}
        before = [*model.state_dict().values(), augmentation.get_state()]
        before = [value.clone() for value in before]
        says = complaint if kept is not None else complaint.replace("1", "0", 1)
        with pytest.raises(CheckpointError, match=says):
            ringfold.load(tmp_path, {"m": model, "random": RandomStreams(**own)}, comm)
        same(before, [*model.state_dict().values(), augmentation.get_state()])

    run_local(2, main)


@pytest.mark.parametrize(("kept", "here"), [("PCG64", "MT19937"), ("MT19937", "torch.Generator")])
def test_a_stream_of_another_kind_is_refused_by_both_names(tmp_path, kept, here):
    def made(kind):
        if kind == "torch.Generator":
            return torch.Generator()
        return np.random.Generator(getattr(np.random, kind)(5))

    def main(comm):
        ringfold.save(tmp_path, {"random": RandomStreams(a=made(kept))}, comm)
        with pytest.raises(CheckpointError, match=f"a: expected a state of {here}, .* of {kept}"):
            ringfold.load(tmp_path, {"random": RandomStreams(a=made(here))}, comm)

    run_local(1, main)


@pytest.fixture
def pcg64():
    """Let NumPy's global stream draw by PCG64."""
    before = np.random.get_bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    yield
    np.random.set_bit_generator(before)


def test_numpys_global_stream_goes_on_with_another_bit_generator(tmp_path, pcg64):
    """After np.random.set_bit_generator a save ended in "too many values to unpack", and a resume
    on another number of ranks would have seeded it as only MT19937 can be."""

    def main(comm):
        np.random.normal()  # one more is kept for the next call
        ringfold.save(tmp_path, {"random": RandomStreams()}, comm)
        expected = np.random.normal(size=3).tolist(), np.random.rand(3).tolist()
        ringfold.load(tmp_path, {"random": RandomStreams()}, comm)
        assert (np.random.normal(size=3).tolist(), np.random.rand(3).tolist()) == expected

    draws = []
    with torch.random.fork_rng():
        run_local(1, main)
        for seed in (5, 6, 5):  # as a resume on another number of ranks does
            RandomStreams().seed(seed)
            draws.append(np.random.rand())
    assert draws[0] == draws[2] != draws[1]


def test_a_global_stream_of_another_kind_is_refused_by_both_names(tmp_path, pcg64):
    def main(comm):
        ringfold.save(tmp_path, {"random": RandomStreams()}, comm)
        np.random.set_bit_generator(np.random.MT19937(3))
        with pytest.raises(CheckpointError, match=r"/numpy: expected a state of MT19937, .* PCG64"):
            ringfold.load(tmp_path, {"random": RandomStreams()}, comm)

    run_local(1, main)
