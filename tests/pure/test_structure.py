"""Nested values come out of their description as they went in, in their own classes."""

from collections import Counter, OrderedDict, UserDict, defaultdict, namedtuple
from dataclasses import dataclass, field, fields
from typing import NamedTuple

import pytest
import torch

from ringfold.parallel.instances import attributes_of
from ringfold.parallel.stage_error import shown
from ringfold.parallel.structure import Description, put_together, take_apart

X, Y = torch.tensor([1.0, 2.0]), torch.tensor([[3]])
Plain = namedtuple("Plain", "x y")


class Typed(NamedTuple):
    x: torch.Tensor
    more: dict
    flag: bool = False

    class Inner(NamedTuple):
        number: int


class Marked(Plain):
    """A named tuple with attributes beside."""


@dataclass
class Whole:
    x: torch.Tensor
    parts: list
    size: int = field(init=False)

    def __post_init__(self):
        self.size = len(self.parts) + 100  # is not to run again
        self.parts = [*self.parts, None]


@dataclass(frozen=True, slots=True)
class Fixed:
    x: torch.Tensor
    name: str = "n"


@dataclass
class Bare:
    x: torch.Tensor


class Output(OrderedDict):
    """As the outputs of Hugging Face's models: a field is an item, where it is not None."""

    def __post_init__(self):
        for f in fields(self):
            if getattr(self, f.name) is not None:
                self[f.name] = getattr(self, f.name)

    def __setitem__(self, key, value):
        super().__setitem__(key, value)
        super().__setattr__(key, value)

    def __getitem__(self, key):
        return super().__getitem__(key) if isinstance(key, str) else tuple(self.values())[key]


@dataclass
class Model(Output):
    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden: tuple | None = None


class Lenient(dict):
    __getattr__ = dict.__getitem__


class Open(dict):
    """Items are attributes, as many a program has it."""

    def __init__(self, **items):
        super().__init__(items)
        self.__dict__ = self


class Encoding(UserDict):
    """As what Hugging Face's tokenizers return: with attributes beside, and items as attributes."""

    def __init__(self, data, sequences):
        super().__init__(data)
        self._sequences = sequences

    def __getattr__(self, name):
        try:
            return self.data[name]
        except KeyError:
            raise AttributeError(name) from None


def marked():
    made = Marked(X, 1)
    made.note = {"y": Y}
    return made


def reordered():
    made = OrderedDict(a=X, b=2, c=Y)
    made.move_to_end("a")
    return made


VALUES = [
    Plain(X, Plain(None, Y)),
    Typed(X, {"y": [Y, True]}),
    Typed.Inner(3),
    marked(),
    (X.shape, X.max(0), torch.Size([])),
    reordered(),
    Counter(a=2),
    Lenient(x=X, y=Lenient()),
    Whole(X, [Y, Fixed(Y, "m")]),
    Model(logits=X, hidden=(Y, X)),
    [Fixed(X)],
    UserDict(x=X, y=[Y]),
    Encoding({"x": X}, 2),
]


def same(left, right):
    assert type(left) is type(right)
    if isinstance(left, torch.Tensor):
        assert torch.equal(left, right)
        return
    if isinstance(left, dict):
        assert list(left.keys()) == list(right.keys())
        for key in left:
            same(dict.get(left, key), dict.get(right, key))
    elif isinstance(left, tuple | list):
        assert len(left) == len(right)
        for a, b in zip(left, right, strict=True):
            same(a, b)
    elif not hasattr(left, "__dataclass_fields__"):
        assert left == right
        return
    left_own, right_own = attributes_of(left), attributes_of(right)
    assert list(left_own) == list(right_own)
    for name in left_own:
        same(left_own[name], right_own[name])


@pytest.mark.parametrize("value", VALUES, ids=lambda value: type(value).__name__)
def test_a_value_comes_out_as_it_went_in(value):
    description, tensors = take_apart(value, "x")
    read = Description.from_bytes(description.to_bytes())
    assert read == description and hash(read) == hash(description)
    same(put_together(read.skeleton, tensors), value)
    # An error tells of it without its tensors.
    assert "tensor(" not in shown(put_together(read.skeleton, read.tensors))


def test_items_that_are_attributes_stay_so():
    description, tensors = take_apart(Open(x=X, y=Open(n=1)), "x")
    found = put_together(Description.from_bytes(description.to_bytes()).skeleton, tensors)
    assert type(found) is type(found.y) is Open and found.x is X and found.y.n == 1
    found.y.n = 2
    assert found["y"] == {"n": 2} and list(found) == ["x", "y"]
    again = Bare(X)
    again.me = again
    description, tensors = take_apart(again, "x")
    made = put_together(description.skeleton, tensors)
    assert made.me is made and shown(made) == "Bare(x=float32 (2,), me=...)"


def test_a_field_that_is_an_item_stays_one_tensor():
    description, tensors = take_apart(Model(logits=X), "x")
    found = put_together(description.skeleton, tensors)
    assert len(tensors) == 1 and found.logits is found["logits"] is found[0]
    assert shown(found) == "Model{'logits': float32 (2,)}"
    assert shown(Fixed(X)) == "Fixed(x=float32 (2,), name='n')" and shown(Plain(1, X)).startswith(
        "Plain(1, float32"
    )


def test_a_tokenizers_batch_is_taken():
    """A UserDict was refused, and with it every batch that a tokenizer pads."""
    description, tensors = take_apart(Encoding({"x": X}, 2), "x")
    found = put_together(Description.from_bytes(description.to_bytes()).skeleton, tensors)
    assert found.x is X and found._sequences == 2 and list(found) == ["x"]
    assert shown(found) == "Encoding{'x': float32 (2,)}"
    with pytest.raises(TypeError, match=r"^x._sequences\[0\]: a object cannot be handed on"):
        take_apart(Encoding({"x": X}, [object()]), "x")


def test_what_cannot_be_made_again_is_refused_by_name():
    @dataclass
    class Local:
        x: torch.Tensor

    class Many(list):
        pass

    with pytest.raises(TypeError, match=r"^x\[0\]: a Local .* is not found by its name: define"):
        take_apart((Local(X),), "x")
    for value in (defaultdict(list), Many(), object(), {1, 2}, torch.float32):
        with pytest.raises(TypeError, match=f"^x.parts.*: a {type(value).__name__} cannot be"):
            take_apart(Whole(X, [value]), "x")
