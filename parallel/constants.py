"""Buffers that layers of several ranks share, such as a mask or a table of angles.

Each of the ranks has one of its own, which is made equal at the start and must stay as it is: a
forward that writes to it fails.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .layers import Named
from .replicas import broadcast_tensors

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["Constants"]


@dataclass(frozen=True)
class _Place:
    """Where in a model a buffer is; not the buffer, which a move to a device replaces."""

    module: nn.Module
    attribute: str
    path: str
    stage: int

    def __str__(self) -> str:
        return f"{self.path} of stage {self.stage}"

    @property
    def persistent(self) -> bool:
        return self.attribute not in self.module._non_persistent_buffers_set

    @property
    def buffer(self) -> Tensor:
        found = self.module._buffers[self.attribute]
        assert found is not None
        return found


class Constants:
    """Keep buffers that ranks share equal; stage s is on rank s modulo num_ranks.

    ValueError for one in the state of a model, as running statistics are: such are made to change.
    """

    def __init__(self, named: Named, stages: Sequence[range], num_ranks: int) -> None:
        self._num_ranks = num_ranks
        self._shared: list[tuple[_Place, _Place]] = []
        for first, *others in _places(named, stages).values():
            far = next((p for p in others if (p.stage - first.stage) % num_ranks), None)
            if far is None:
                continue
            if any(place.persistent for place in (first, *others)):
                raise ValueError(
                    f"{first} and {far} are one and the same buffer: choose boundaries that put "
                    "both on one rank, or register it with persistent=False if nothing changes it"
                )
            self._shared.append((first, far))

    def equalize(self, pipe: Communicator, device: torch.device, limit_bytes: int) -> None:
        """Let the first layer's value count; collective over `pipe`."""
        for root in range(self._num_ranks):
            buffers = [p.buffer for p, _ in self._shared if p.stage % self._num_ranks == root]
            values = [b.detach().to(device, copy=True).contiguous() for b in buffers]
            broadcast_tensors(pipe, values, root, limit_bytes)
            for buffer, value in zip(buffers, values, strict=True):
                # A buffer may be a view that repeats its elements, and cannot be written to.
                if root != pipe.rank and not torch.equal(buffer, value.to(buffer.device)):
                    with torch.inference_mode(buffer.is_inference()):
                        buffer.copy_(value)

    def watch(self, stage: nn.Module) -> None:
        """Let every forward of a stage raise RuntimeError if it has written to one."""
        versions: list[int] = []
        # One that was made in inference mode has no version, nor can a step write to it. Of places
        # the words alone, since these know the layers of other ranks.
        shared = [pair for pair in self._shared if not pair[0].buffer.is_inference()]
        watched = [(first.buffer, str(first), str(far)) for first, far in shared]
        buffers = [buffer for buffer, _, _ in watched]

        def note(module: nn.Module, given: Any) -> None:
            versions[:] = [buffer._version for buffer in buffers]

        def check(module: nn.Module, given: Any, output: Any) -> None:
            for (buffer, first, far), version in zip(watched, versions, strict=True):
                if buffer._version != version:
                    raise RuntimeError(
                        f"a layer has written to {first}, which is {far} as well: they are on two "
                        "ranks, so that nothing may change it"
                    )

        if buffers:
            stage.register_forward_pre_hook(note)
            stage.register_forward_hook(check)


def _places(named: Named, stages: Sequence[range]) -> dict[Tensor, list[_Place]]:
    found: dict[Tensor, list[_Place]] = {}
    for stage, members in enumerate(stages):
        for name, layer in (named[i] for i in members):
            for prefix, module in layer.named_modules():
                for attribute, buffer in module._buffers.items():
                    if buffer is not None:
                        path = ".".join(filter(None, (name, prefix, attribute)))
                        place = _Place(module, attribute, path, stage)
                        found.setdefault(buffer, []).append(place)
    return found
