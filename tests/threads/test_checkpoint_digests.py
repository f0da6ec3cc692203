"""How tensors of several ranks are told apart, and what a manifest says of them."""

import pytest
import torch

from ringfold.parallel.checkpoint import manifest
from ringfold.parallel.checkpoint.errors import Damaged
from ringfold.parallel.checkpoint.manifest import Entry, Manifest, from_text, to_text
from ringfold.parallel.checkpoint.samples import are_apart, digest_of, samples_of
from ringfold.parallel.checkpoint.shares import assign


def test_a_manifest_reads_back_what_it_was_and_nothing_else():
    manifest = Manifest(
        3, 2, {"f": 10}, {"a/b": Entry("f", "F32", (2, 0), "00")}, {"v": {"mapping": [[1, None]]}}
    )
    text = to_text(manifest)
    assert from_text(text) == manifest
    huge = text.replace('"step": 3', '"step": 1e999')
    later = text.replace("checkpoint 1", "checkpoint 2")
    for other in ("", "[]", "null", text.replace("F32", "F64"), later, huge):
        if other != text:
            with pytest.raises(Damaged, match=r"manifest\.json"):
                from_text(other)


def test_writing_is_shared_out_evenly_over_the_holders():
    holders = {f"t{i}": (100 + i, [0, 1, 2]) for i in range(30)} | {"only": (5000, [1])}
    chosen = assign(holders, 3)
    load = [sum(holders[n][0] for n, r in chosen.items() if r == rank) for rank in range(3)]
    assert chosen["only"] == 1 and load[1] == 5000 and abs(load[0] - load[2]) <= 130


def test_tensors_are_apart_where_half_of_their_samples_are_far_from_each_other():
    """By more than a sixteenth, as replicas of half width on other processors are not."""
    ones = [1.0] * 8
    assert are_apart([1.07] * 4 + ones[:4], ones) and are_apart(ones, [1.07] * 4 + ones[:4])
    assert not are_apart([1.07] * 3 + ones[:5], ones)
    assert not are_apart([1.06] * 8, ones) and not are_apart([float("nan")] * 8, ones)
    assert are_apart([1e-9], [0.0]) and not are_apart([0.0], [0.0]) and not are_apart([], [])


@pytest.mark.parametrize("number", [1, 7, 8, 9, 16, 100])
def test_samples_are_evenly_spaced_however_a_tensor_lies(number):
    row = torch.arange(float(2 * number))
    tensors = {"whole": row, "turned": row.reshape(2, number).t().contiguous().t()}
    tensors |= {"ints": row.long(), "none": row[:0], "sparse": row.to_sparse(), "half": row.half()}
    found = samples_of(tensors)
    step = max(1, 2 * number // 8)
    assert found["whole"] == found["turned"] == row[::step][:8].tolist() == found["half"]
    assert [found[name] for name in ("ints", "none", "sparse")] == [[], [], []]
    assert samples_of({}) == {}


def test_a_digest_is_of_the_bits_in_their_order_wherever_they_lie():
    some = torch.arange(1.0, 10_004.0)
    digest = digest_of(some)
    assert digest == digest_of(torch.cat([some[:1], some])[1:])  # at an odd place in memory
    assert digest == digest_of(some.view(-1, 1).expand(-1, 2)[:, 0])
    for changed in ((0, 1), (17, 4_112), (9_998, 10_002)):
        other = some.clone()
        other[list(changed)] = other[list(changed[::-1])]
        assert digest_of(other) != digest
    odd = [torch.tensor(1.0), torch.zeros(0, 3), torch.ones(3, dtype=torch.complex64).conj()]
    assert len({*map(digest_of, [*odd, torch.ones(5, dtype=torch.float8_e4m3fn)])}) == 4


def test_a_manifest_of_another_format_is_refused_by_both_names(monkeypatch):
    """Of a later version, whose checksum is right."""
    monkeypatch.setattr(manifest, "FORMAT", "ringfold checkpoint 2")
    text = to_text(Manifest(1, 1, {}, {}, {}))
    monkeypatch.undo()
    says = "expected format 'ringfold checkpoint 1', got 'ringfold checkpoint 2'"
    with pytest.raises(Damaged, match=says):
        from_text(text)
