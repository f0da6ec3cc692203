"""The states of torch's generators: the host's, and those of the GPUs that a computation is on."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

__all__ = ["GeneratorStates"]


class GeneratorStates:
    """What random layers would draw next, on the host and on some GPUs."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        """Keep the states of now.

        tensors: on whose GPUs something may be drawn. A GPU's generator has a state once torch has
        opened the GPU.
        """
        opened = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
        places = {tensor.device for tensor in tensors if tensor.is_cuda} if opened else set()
        self._host = torch.get_rng_state()
        self._gpus = {place: torch.cuda.get_rng_state(place) for place in places}

    def restore(self) -> None:
        """Let generators go on from here."""
        torch.set_rng_state(self._host)
        for place, state in self._gpus.items():
            torch.cuda.set_rng_state(state, place)
