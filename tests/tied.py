"""Networks of layers that share weights, or stand within several others."""

import torch
from torch import nn

from ringfold import Dropout


class Embed(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(11, 6, generator=torch.Generator().manual_seed(3)))

    def forward(self, x):
        return self.weight[x]


class Project(nn.Module):
    """Use the embedding twice: as the output's weights, and once more as a bias."""

    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return x @ self.weight.t() + self.weight.sum(1)


def tied_network():
    generator = torch.Generator().manual_seed(5)
    embed = Embed()
    middle = [nn.Linear(6, 6) for _ in range(3)]
    for layer in middle:
        nn.init.normal_(layer.weight, generator=generator)
        nn.init.zeros_(layer.bias)
    middle[2].weight = middle[0].weight
    again = nn.LayerNorm(6)
    return [embed, middle[0], again, nn.Tanh(), middle[1], again, middle[2], Project(embed.weight)]


class Encode(nn.Module):
    def __init__(self, embed, act):
        super().__init__()
        self.embed, self.act = embed, act

    def forward(self, x):
        return self.act(self.embed(x))


class Decode(nn.Module):
    """Know the embedding by a plain list as well, as some do to save a name in the state."""

    def __init__(self, embed, act, linear=None):
        super().__init__()
        self.linear, self.embed, self.act = linear, embed, act
        self.listed = [embed]

    def forward(self, h):
        h = self.act(h if self.linear is None else self.linear(h))
        return h @ self.listed[0].weight.t()


def nested_network():
    """An embedding inside three layers: the usual way to tie."""
    generator = torch.Generator().manual_seed(5)
    embed, act = nn.Embedding(11, 6), nn.Sequential(nn.Tanh(), Dropout(0.25))
    layers = [
        Encode(embed, act),
        Decode(embed, act, nn.Linear(6, 6)),
        nn.Sequential(nn.Linear(11, 11), nn.Softmax(1)),
        Mix(embed),
        Decode(embed, act),
    ]
    for parameter in nn.ModuleList(layers).parameters():
        nn.init.normal_(parameter, generator=generator)
    return layers


class Mix(nn.Module):
    def __init__(self, embed):
        super().__init__()
        self.embed = embed

    def forward(self, h):
        return h @ self.embed.weight


def tokens():
    generator = torch.Generator().manual_seed(9)
    return tuple(torch.randint(0, 11, (16,), generator=generator) for _ in range(2))
