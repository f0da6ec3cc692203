"""A model cut into stages: what one rank holds of it, and what it shares with other ranks."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..comm.texts import first_text
from .buffer_layout import BufferLayout
from .clip import clip_over_stages, note_stage
from .constants import Constants
from .layers import Named, RankLayers
from .random_keys import name_layers
from .replicas import broadcast_tensors
from .roster import Roster
from .shared_weights import names_of, refuse_two_values
from .stage import Stage
from .swaps import Swaps
from .tensors import device_of
from .ties import TiedGradients, move, untie

if TYPE_CHECKING:
    from .mesh import Mesh

__all__ = ["SplitModel"]


class SplitModel:
    """Hold this rank's stages, with the values that replica 0 has.

    What layers of several ranks share is made one: weights by `ties`, buffers by `constants`.

    named: all layers, by their names in the unsplit model.  parts: the layers of every stage; stage
    s is on rank s of mesh.pipe, modulo its size.  again: the stages that recompute.

    Attributes:
        module: all layers of this rank.  stages: what runs them, a stage after the other.
        stage_of: the stage of each parameter of `module`.  device: where inputs are to be.
        shared_names: all names of every weight that several layers share.

    Collective over mesh.comm.
    """

    def __init__(
        self,
        named: Named,
        parts: Sequence[range],
        mesh: Mesh,
        *,
        again: Collection[int],
        device: torch.device | str | None,
        bucket_bytes: int,
    ) -> None:
        self._mesh, self._bucket_bytes = mesh, bucket_bytes
        pipe = mesh.pipe
        ranks = [stage % pipe.size for stage, members in enumerate(parts) for _ in members]
        constants = Constants(named, parts, pipe.size)
        whole = nn.Sequential(OrderedDict(named))
        self.device = device_of(whole) if device is None else torch.device(device)
        if device is not None:
            held = [layer for layer, rank in enumerate(ranks) if rank == pipe.rank]
            move(named, held, self.device)
        named, ties = untie(named)
        self.shared_names = names_of(ties, named)
        name_layers(nn.Sequential(OrderedDict(named)))
        self._layers = RankLayers(named, parts, pipe.rank, pipe.size)
        self.module = self._layers.module
        elsewhere = self._layers.elsewhere(named)
        self.stages = [
            Stage(layers, s, s in again, self.device, ties, elsewhere)
            for s, layers in self._layers.stages.items()
        ]
        self.stage_of = [s for s, members in self.parameters_by_stage.items() for _ in members]
        of_rank = self.module.modules()
        self._meeting: list[Any] = [m for m in of_rank if hasattr(m, "meets_replicas")]
        broadcast_tensors(mesh.data, self._layers.tensors(), 0, bucket_bytes)
        constants.equalize(pipe, self.device, bucket_bytes)
        for layers in self._layers.stages.values():
            constants.watch(layers)
        self._swaps = Swaps(self.module.parameters() if pipe.size > 1 else ())
        note_stage(self._swaps.tensors)
        self._roster = Roster(self.module)
        self._layout = BufferLayout(self._roster)
        self.ties = TiedGradients(ties, ranks, pipe)
        self.ties.equalize()

    def begin(self) -> None:
        """Take notice of what was done to the parameters since the step before."""
        self._roster.check()
        if self._swaps.found():
            note_stage(self._swaps.tensors)
        self.ties.begin()

    @property
    def parameters_by_stage(self) -> dict[int, list[nn.Parameter]]:
        """Return the parameters of each stage, the uses of a shared one each."""
        return {s: list(layers.parameters()) for s, layers in self._layers.stages.items()}

    @property
    def meets_replicas(self) -> bool:
        """Tell whether a layer, such as SyncBatchNorm, meets other replicas in its forward now."""
        return any(layer.meets_replicas for layer in self._meeting)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the parameters, or one that stands for none; see Pipeline."""
        return self._layers.or_placeholder([p for _, p in self.named_parameters()])

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield them by name, a shared one once; see Pipeline."""
        for name, parameter in self.module.named_parameters():
            if parameter not in self.ties.others:
                yield self.ties.names.get(parameter, name), parameter

    def state_dict(self) -> dict[str, Any]:
        """Return parameters and buffers; see Pipeline."""
        self.ties.follow()
        return dict(self.module.state_dict())

    def load(self, state: Mapping[str, Any]) -> None:
        """Load this rank's part of a state; errors as in Pipeline.load_state_dict."""
        refuse_two_values(self.shared_names, state)
        self._layers.load(state)

    def clip(self, max_norm: float, norm_type: float) -> Tensor:
        """Clip the gradients over all stages; see Pipeline.clip_grad_norm_."""
        parameters = [p for _, p in self.named_parameters()]
        elsewhere = self.ties.counted_elsewhere
        return clip_over_stages(parameters, self._mesh.pipe, max_norm, norm_type, elsewhere)

    @property
    def buffers_changed(self) -> bool:
        """Tell whether buffers have other shapes here than the replicas have agreed on."""
        return self._mesh.data.size > 1 and self._layout.changed

    def agree_on_buffers(self) -> None:
        """Let replicas agree on the shapes of their buffers; collective over mesh.comm.

        ValueError on every rank if those of any stage differ; it names ranks of mesh.data.
        """
        refused = ""
        stages = ", ".join(str(stage.index) for stage in self.stages)
        try:
            self._layout.agree(self._mesh.data, f"replicas' buffers of stage {stages}")
        except ValueError as error:
            refused = str(error)
        if first := first_text(self._mesh.comm, refused):
            raise ValueError(first)

    def even_buffers(self, rows: Sequence[int]) -> None:
        """Give all replicas the buffers of the first one that has rows, and so has changed them.

        Collective over mesh.data. rows: of every replica's batch.
        """
        if self._mesh.data.size > 1:
            source = next(replica for replica, count in enumerate(rows) if count)
            buffers = self._roster.buffers()
            broadcast_tensors(self._mesh.data, buffers, source, self._bucket_bytes)
