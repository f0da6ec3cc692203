"""One tree whatever the order and the holders of its leaves; keyed random numbers."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ringfold import Dropout
from ringfold.kernels.masks import random_words
from ringfold.parallel.batch import global_leaves
from ringfold.parallel.random_keys import Samples, key_of, name_layers, show_samples
from ringfold.parallel.tree import Tree, frontier, meets_in_pairs


def bracket(left, right):
    return f"({left}+{right})"


def whole(num_leaves):
    tree = Tree(num_leaves, bracket)
    for leaf in range(num_leaves):
        tree.put((0, leaf), str(leaf))
    return tree.total


def test_docstring_drawing():
    assert whole(5) == "(((0+1)+(2+3))+4)"
    assert whole(1) == "0"
    assert whole(6) == "(((0+1)+(2+3))+(4+5))"


@given(st.data())
def test_brackets_depend_on_the_number_of_leaves_only(data):
    num_leaves = data.draw(st.integers(1, 33))
    edges = sorted(data.draw(st.lists(st.integers(0, num_leaves), max_size=5)))
    edges = [0, *edges, num_leaves]
    order = data.draw(st.permutations(range(len(edges) - 1)))
    rest = Tree(num_leaves, bracket)
    for part in order:
        mine = Tree(num_leaves, bracket)
        for leaf in data.draw(st.permutations(range(edges[part], edges[part + 1]))):
            mine.put((0, leaf), str(leaf))
        assert set(mine.nodes) == set(frontier(num_leaves, edges[part], edges[part + 1]))
        for node, value in mine.nodes.items():
            rest.put(node, value)
    assert rest.total == whole(num_leaves)


def test_pairs_of_ranks_where_they_are_the_tree():
    def parts(num_leaves, size):
        n = num_leaves // size
        return [frontier(num_leaves, r * n, r * n + n) for r in range(size)]

    assert (
        meets_in_pairs(parts(8, 1)) and meets_in_pairs(parts(8, 4)) and meets_in_pairs(parts(8, 8))
    )
    assert not meets_in_pairs(parts(6, 2)) and not meets_in_pairs(parts(6, 3))
    assert not meets_in_pairs(parts(12, 4)) and not meets_in_pairs([((0, 0),), ()])


def test_incomplete_doubled_and_foreign_leaves_are_refused():
    tree = Tree(4, bracket)
    tree.put((0, 1), "1")
    with pytest.raises(ValueError, match=r"tree of 4 leaves is incomplete: it has \[\(0, 1\)\]"):
        _ = tree.total
    with pytest.raises(ValueError, match=r"node \(0, 1\) has been put twice"):
        tree.put((0, 1), "1")
    with pytest.raises(ValueError, match="outside of a tree of 4"):
        tree.put((0, 4), "4")


def test_microbatches_of_the_global_batch_are_dealt_whole():
    bounds, leaves = global_leaves([4, 0, 3], 4)
    assert bounds == ((0, 2), (2, 4), (4, 6), (6, 7))
    assert leaves == (range(0, 2), range(2, 2), range(2, 4))
    with pytest.raises(ValueError, match=r"of \[3, 4\] rows: replica 1 begins at row 3, within"):
        global_leaves([3, 4], 4)


def random_bits(seed, layer, call, step, samples, count):
    key = key_of(seed, layer, call, step)
    return np.array([random_words(key, sample, count) for sample in samples])


def test_random_bits_are_keyed_by_sample_and_not_by_its_company():
    together = random_bits(3, "block.drop", 0, 7, range(5), 9)
    apart = [random_bits(3, "block.drop", 0, 7, [sample], 9)[0] for sample in range(5)]
    np.testing.assert_array_equal(together, apart)
    others = [
        random_bits(4, "block.drop", 0, 7, range(5), 9),
        random_bits(3, "block.drip", 0, 7, range(5), 9),
        random_bits(3, "block.drop", 1, 7, range(5), 9),
        random_bits(3, "block.drop", 0, 8, range(5), 9),
        random_bits(3, "block.drop", 0, 7, range(5, 10), 9),
    ]
    assert all((other != together).mean() > 0.9 for other in others)
    # The stream is fixed: a checkpoint of today resumes alike tomorrow.
    assert random_bits(0, "a", 0, 0, [1], 3).tolist() == [[3732920469, 3274688368, 693539120]]


def test_dropout_drops_its_share_and_keeps_the_mean():
    layer = Dropout(0.25, seed=1)
    show_samples(layer, Samples(step=0, first=0, rows=64))
    out = layer(torch.ones(64, 1000))
    dropped = (out == 0).double().mean().item()
    assert dropped == pytest.approx(0.25, abs=0.01)
    assert set(out.unique().tolist()) == {0.0, torch.tensor(1 / 0.75).item()}
    assert not torch.equal(out, layer(torch.ones(64, 1000)))  # another call, another mask
    assert torch.equal(layer.eval()(out), out)


@pytest.mark.parametrize(("p", "value"), [(0.0, 1.0), (1.0, 0.0)])
def test_dropout_of_nothing_and_of_all(p, value):
    layer = Dropout(p)
    show_samples(layer, Samples(0, 0, 2))
    assert layer(torch.ones(2, 3)).tolist() == [[value] * 3] * 2


def test_dropout_that_does_not_know_its_samples():
    model = torch.nn.Sequential(torch.nn.Sequential(Dropout()))
    name_layers(model)
    with pytest.raises(RuntimeError, match=r"dropout '0\.0' does not know its samples"):
        model(torch.ones(2))
    show_samples(model, Samples(0, 0, 3))
    with pytest.raises(ValueError, match=r"first dimension of 3 samples, got shape \(2,\)"):
        model(torch.ones(2))
    with pytest.raises(ValueError, match=r"probability between 0 and 1, got 1\.5"):
        Dropout(1.5)
