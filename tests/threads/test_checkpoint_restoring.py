"""What is loaded is given to all objects of a state or to none, and what is saved is one thing."""

import pytest
import torch
from checkpointed import same
from little_layers import Times
from torch import nn

import ringfold
from ringfold import CheckpointError, Mesh, Pipeline, run_local
from ringfold.parallel.checkpoint import attempt
from ringfold.parallel.checkpoint.handover import hand_over
from ringfold.parallel.checkpoint.snapshot import Snapshot


class Kept:
    """An object with a state, of the user's."""

    def __init__(self, value, fails=False):
        self.value, self.fails = [value], fails

    def state_dict(self):
        if self.fails is None:
            raise OSError("no server")
        return {"value": self.value}

    def load_state_dict(self, state):
        self.value = state["value"]
        if self.fails:
            raise KeyError("of a newer version")


class Extra(Times):
    """A layer with more to it than tensors."""

    def get_extra_state(self):
        return 1

    def set_extra_state(self, state):
        pass


def test_an_object_that_does_not_take_its_state_on_one_rank_leaves_all_as_they_were(tmp_path):
    def main(comm):
        model = Times(2)
        ringfold.save(tmp_path, {"m": model, "a": Kept(1), "b": Kept(2), "c": Kept(3)}, comm)
        with torch.no_grad():
            model.w.fill_(7)
        state = {"m": model, "a": Kept(8), "b": Kept(8, fails=comm.rank == 1), "c": Kept(8)}
        with pytest.raises(CheckpointError) as caught:
            ringfold.load(tmp_path, state, comm)
        assert model.w == 7 and [state[key].value for key in "abc"] == [[8]] * 3
        state["b"].fails = False
        ringfold.load(tmp_path, state, comm)
        assert model.w == 2 and [state[key].value for key in "abc"] == [[1], [2], [3]]
        return str(caught.value), type(caught.value.__cause__)

    (text, nothing), (same, cause) = run_local(2, main)
    assert text == same and (nothing, cause) == (type(None), KeyError)
    assert text.endswith(
        "rank 1: b did not take its state: KeyError: 'of a newer version'; nothing is changed"
    )


def test_a_module_that_fails_on_one_rank_is_told_on_all(tmp_path):
    def main(comm):
        ringfold.save(tmp_path, {"m": Extra(2)}, comm)
        broken = Extra(2)
        if comm.rank:
            broken.set_extra_state = None
        with pytest.raises(CheckpointError, match=r"rank 1: m did not take its state: TypeError"):
            ringfold.load(tmp_path, {"m": broken}, comm)

    run_local(2, main)


class Range(nn.Module):
    """A buffer that is loaded with whatever size it had, as of torch's observers of channels."""

    def __init__(self, size):
        super().__init__()
        self.register_buffer("low", torch.arange(float(size)))

    def forward(self, x):
        return x

    def _load_from_state_dict(self, state, prefix, *rest):
        self.low.resize_(state[f"{prefix}low"].shape)
        super()._load_from_state_dict(state, prefix, *rest)


class Seen(Times):
    """A layer with a tensor beside, of any size, or none yet."""

    seen = None

    def get_extra_state(self):
        return self.seen

    def set_extra_state(self, state):
        self.seen = state


def with_seen(seen):
    layer = Seen(2)
    layer.seen = seen
    return layer


def hooked(size):
    """A part whose size a hook of the whole decides."""
    whole = nn.Sequential(nn.BatchNorm1d(size, affine=False))

    def fit(module, state, prefix, *rest):
        for name, buffer in module[0].named_buffers():
            buffer.resize_(state[f"{prefix}0.{name}"].shape)

    whole.register_load_state_dict_pre_hook(fit)
    return whole


@pytest.mark.parametrize("wrap", ["plain", "wrapped", "within", "pipeline"])
@pytest.mark.parametrize(
    ("saved", "fresh"),
    [
        (lambda: Range(8), lambda: Range(0)),
        (lambda: with_seen(torch.ones(3)), lambda: with_seen(torch.ones(0, dtype=torch.int64))),
        (lambda: with_seen(torch.ones(3)), lambda: with_seen(None)),
        (lambda: with_seen({"a": torch.ones(3)}), lambda: with_seen(torch.ones(2))),
        (lambda: hooked(4), lambda: hooked(2)),
    ],
)
def test_what_a_module_loads_by_its_own_code_may_have_another_size(tmp_path, wrap, saved, fresh):
    """torch loads it, and a checkpoint was refused: expected (0,), has (8,)."""

    def main(comm):
        def state(layer):
            if wrap == "pipeline":
                return {"m": Pipeline([Times(3), layer], Mesh(comm, pipe=2))}
            m = nn.Sequential(Times(3), layer)
            if wrap == "within":
                m[1] = ringfold.DataParallel(layer, comm)
            return {"m": ringfold.DataParallel(m, comm) if wrap == "wrapped" else m}

        there, here = state(saved()), state(fresh())
        ringfold.save(tmp_path, there, comm)
        ringfold.load(tmp_path, here, comm)
        same(dict(here["m"].state_dict()), dict(there["m"].state_dict()))

    run_local(2, main)


def test_sizes_that_such_code_does_not_take_are_told_on_all_ranks(tmp_path):
    class Picky(Range):
        def _load_from_state_dict(self, *given):
            nn.Module._load_from_state_dict(self, *given)

    def main(comm):
        ringfold.save(tmp_path, {"m": Picky(8)}, comm)
        with pytest.raises(CheckpointError, match=r"rank 1: m did not take .*\n.*size mismatch"):
            ringfold.load(tmp_path, {"m": Picky(8 - comm.rank)}, comm)

    run_local(2, main)


def test_an_object_that_does_not_tell_its_state_on_one_rank_is_told_on_all(tmp_path):
    def main(comm):
        state = {"a": Kept(1, fails=None if comm.rank else False)}
        with pytest.raises(CheckpointError, match=r"rank 1: a did not tell .* OSError: no server"):
            ringfold.save(tmp_path, state, comm)

    run_local(2, main)
    assert [*tmp_path.iterdir()] == []


class Mute(Times):
    """A module that at times does not tell its state."""

    error = None

    def state_dict(self, *given, **named):
        if self.error is not None:
            raise self.error
        return super().state_dict(*given, **named)


@pytest.mark.parametrize("how", ["load", "hand_over"])
def test_a_module_that_does_not_tell_what_it_needs_on_one_rank_is_told_on_all(tmp_path, how):
    """It was a bare error there, and the others waited for a rank that had gone on."""

    def main(comm):
        old, new = Mute(2), Mute(3)
        ringfold.save(tmp_path, {"m": old}, comm)
        new.error = RuntimeError("no server") if comm.rank else None
        with pytest.raises(CheckpointError) as caught:
            if how == "load":
                ringfold.load(tmp_path, {"m": new}, comm)
            else:
                hand_over(comm, {"m": old}, {"m": new})
        assert new.w == 3
        cause = caught.value.__cause__ and caught.value.__cause__.__cause__
        return str(caught.value), type(cause)

    (text, nothing), (same, cause) = run_local(2, main)
    assert text == same and (nothing, cause) == (type(None), RuntimeError)
    assert text.endswith("m did not tell its state: RuntimeError: no server")


@pytest.mark.parametrize("state", [{"a/b": None}, None])
def test_a_state_that_is_none_on_one_rank_is_told_on_all(tmp_path, state):
    """`load` raised on that rank alone."""

    def main(comm):
        ringfold.save(tmp_path, {"v": 1}, comm)
        given = state if comm.rank else {"v": None}
        for use in (ringfold.load, ringfold.save):
            with pytest.raises(CheckpointError, match=r"rank 1: (expected names|Attrib)"):
                use(tmp_path, given, comm)

    run_local(2, main)


def test_an_object_that_fails_without_a_word_is_not_left_out(tmp_path):
    """A TypeError without text was no complaint: all was saved but the object's state."""

    def main(comm):
        mute = Mute(2)
        mute.error = TypeError()
        with pytest.raises(CheckpointError, match="rank 0: m did not tell its state: TypeError"):
            ringfold.save(tmp_path, {"m": mute}, comm)

    run_local(1, main)


@pytest.mark.parametrize("error", [MemoryError(), RuntimeError("CUDA out of memory")])
def test_a_rank_without_memory_to_read_or_copy_is_told_on_all(tmp_path, monkeypatch, error):
    """The others waited for it."""
    read, take = attempt.read_tensors, Snapshot.take

    def short(call):
        def instead(*given):
            if any(isinstance(names, dict) and "m1/w" in names for names in given):
                raise error
            return call(*given)

        return instead

    def main(comm):
        state = {f"m{comm.rank}": Times(2)}
        ringfold.save(tmp_path, state, comm)
        comm.barrier()
        if comm.rank == 0:
            monkeypatch.setattr(attempt, "read_tensors", short(read))
            monkeypatch.setattr(Snapshot, "take", short(take))
        comm.barrier()
        for use in (ringfold.load, ringfold.save):
            with pytest.raises(CheckpointError, match=type(error).__name__):
                use(tmp_path, state, comm)

    run_local(2, main)


def test_two_values_of_a_weight_that_stages_share_are_refused(tmp_path):
    """Each rank took that of its own layer, and they trained apart from then on."""

    def main(comm):
        layers = [Times(2), Times(3), Times(4)]
        ringfold.save(tmp_path, {"m": nn.Sequential(*layers)}, comm)
        layers[2].w = layers[0].w
        engine = Pipeline(layers, Mesh(comm, pipe=2), loss_fn=lambda out, _: out.mean())
        with pytest.raises(CheckpointError, match=r"tensors m/0\.w and m/2\.w are one weight"):
            ringfold.load(tmp_path, {"m": engine}, comm)
        ringfold.save(tmp_path, {"m": engine}, comm, step=1)
        ringfold.load(tmp_path, {"m": engine}, comm)
        return [p.item() for p in engine.parameters()]

    first, last = run_local(2, main)
    assert sorted(first + last) == [2, 2, 3]


def test_parts_of_a_layer_under_one_name_are_not_saved_as_one(tmp_path):
    """As of tensor-parallel layers: that of one rank was written, and all went on from it."""

    def main(comm):
        model = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)).bfloat16()
        with torch.no_grad():
            for p in model.parameters():
                p.fill_(0.1 + 0.001 * comm.rank)  # replicas that differ in the last bit
            model[1].running_mean.add_(comm.rank)
            model[0].weight[0, 0] = -comm.rank  # or in one place
        ringfold.save(tmp_path, {"m": model}, comm)
        turned = torch.arange(6.0).view(2, 3).t()
        model[0].weight = nn.Parameter(turned + 1 + 100 * comm.rank)
        with pytest.raises(CheckpointError, match=r"m/0.weight is another tensor on rank 0"):
            ringfold.save(tmp_path, {"m": model}, comm)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.0, momentum=0.9)
        model[0].weight.grad = turned + 1 + 100 * comm.rank
        optimizer.step()
        state = {f"m{comm.rank}": model, "o": optimizer}
        with pytest.raises(CheckpointError, match=r"o/state/0\.weight/momentum_buffer is another"):
            ringfold.save(tmp_path, state, comm)
        ringfold.save(tmp_path, {f"m{comm.rank}": model, f"o{comm.rank}": optimizer}, comm)
        before = model[0].weight.clone()
        ringfold.load(tmp_path, {f"m{comm.rank}": model}, comm)
        assert torch.equal(model[0].weight, before)

    run_local(2, main)
