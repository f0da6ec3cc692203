"""Batch normalisation with the statistics of all ranks' batches together."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.lazy import LazyModuleMixin

from ..comm.arguments import require
from .demands import require_comm
from .replica_calls import Call, meet
from .replicas import check_equal

if TYPE_CHECKING:
    from ..comm.communicator import Communicator

__all__ = ["SyncBatchNorm", "convert_sync_batchnorm"]


class SyncBatchNorm(_BatchNorm):
    """Normalise each channel over the batches of all ranks of `comm`, as one process would.

    Input of (rows, channels, ...), with any number of rows on each rank, none included. In training
    mode forward is collective over `comm`, with gradients off as well, and so is its backward; in
    evaluation mode with running statistics nothing is sent. Running statistics are those of one
    process on all rows. The gradients of weight and bias are this rank's part, for DataParallel to
    average. Backward adds what all ranks' losses say about a statistic, so with unequal
    batches multiply the loss by `DataParallel.loss_factor` rather than use `weighted`.

    The layer sends on a channel of its own, so that its messages and those of a reduction that goes
    on beside backward do not depend on each other's order. Creating one is collective over `comm`,
    unless it is given the `channel` of another. A copy or pickle is independent of the ranks.
    torch.compile leaves it out where ranks meet. Its backward cannot be differentiated again.

    ValueError, on every rank, if all ranks together have no more than one value per channel.
    """

    def __init__(
        self,
        num_features: int,
        comm: Communicator,
        *,
        eps: float = 1e-5,
        momentum: float | None = 0.1,
        affine: bool = True,
        track_running_stats: bool = True,
        channel: Communicator | None = None,
    ) -> None:
        super().__init__(num_features, eps, momentum, affine, track_running_stats)
        require_comm(comm if channel is None else channel)
        self.channel = comm.split(0, key=comm.rank) if channel is None else channel

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; the statistics are computed in float64, the output has the input's dtype."""
        if x.dim() < 2 or x.shape[1] != self.num_features:
            raise ValueError(
                f"expected input of (rows, {self.num_features}, ...), got {tuple(x.shape)}"
            )
        if not self.training and self.running_mean is not None and self.running_var is not None:
            return nn.functional.batch_norm(
                x, self.running_mean, self.running_var, self.weight, self.bias, False, 0.0, self.eps
            )
        normal: Tensor = self._over_all_ranks(x)
        return normal

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _over_all_ranks(self, x: Tensor) -> Tensor:
        count, mean, var = _statistics(x.detach(), self.channel)
        if count <= 1:
            raise ValueError(
                f"expected more than 1 value per channel when training, got {count} on all ranks"
            )
        if self.training:
            self._follow(mean, var * (count / (count - 1)))
        normal: Tensor = _Normalise.apply(  # type: ignore[no-untyped-call]
            x, mean, (var + self.eps).rsqrt(), count, self.channel
        )
        if self.weight is not None:
            normal = normal * _along(self.weight, x)
        if self.bias is not None:
            normal = normal + _along(self.bias, x)
        return normal.to(x.dtype)

    @property
    def meets_replicas(self) -> bool:
        """Tell whether forward, as it is set now, is collective."""
        if self.channel is None or self.channel.size == 1:
            return False
        return self.training or self.running_mean is None

    def calls(self, device: torch.device) -> tuple[Call, Call]:
        """Return what forward calls of the other ranks, and its backward."""
        assert self.channel is not None
        return (
            Call(_gathered, self.channel, (3, self.num_features), torch.float64, device),
            Call(_added, self.channel, (2, self.num_features), torch.float64, device),
        )

    def _follow(self, mean: Tensor, unbiased: Tensor) -> None:
        if self.running_mean is None or self.running_var is None:
            return
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        factor = self.momentum
        if factor is None:
            factor = 1.0 / int(self.num_batches_tracked)
        self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
        self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)

    def _check_input_dim(self, input: Tensor) -> None:
        """Accept any number of dimensions; forward has its own check."""

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "channel": None}


def convert_sync_batchnorm(module: nn.Module, comm: Communicator) -> nn.Module:
    """Replace every BatchNorm, torch's SyncBatchNorm too, by a SyncBatchNorm with the same tensors.

    Returns the module, or the replacement of the module itself. Parameters and buffers stay the
    same objects under the same names, so an optimizer made before goes on; so do hooks and
    attributes. Collective over `comm`.

    On every rank, before anything is replaced: TypeError by name for a layer with a forward of its
    own, which would be lost; ValueError for a lazy one, or if the layers differ between ranks.
    """
    require("module", module, nn.Module)
    require_comm(comm)
    check_equal(comm, lambda: _replaceable(module), "BatchNorm layers")
    return _convert(module, comm.split(0, key=comm.rank), {})


def _replaceable(module: nn.Module) -> list[str]:
    """Return the names of the layers to replace."""
    found = []
    for name, layer in module.named_modules():
        if not _is_other_batchnorm(layer):
            continue
        kind = f"{name or 'the module'}, a {type(layer).__name__},"
        if isinstance(layer, LazyModuleMixin):
            raise ValueError(f"{kind} has no shape yet: run a forward of its lazy module first")
        plain = type(layer).forward in (_BatchNorm.forward, nn.SyncBatchNorm.forward)
        if not plain or "forward" in layer.__dict__:
            raise TypeError(
                f"{kind} has a forward of its own, which a SyncBatchNorm has not: make it of a "
                "BatchNorm and a layer for the rest, or convert the parts beside it one by one"
            )
        found.append(f"{name} of {layer.num_features}")
    return found


def _is_other_batchnorm(layer: nn.Module) -> TypeGuard[_BatchNorm]:
    return isinstance(layer, _BatchNorm) and not isinstance(layer, SyncBatchNorm)


def _convert(
    module: nn.Module, channel: Communicator | None, done: dict[int, nn.Module]
) -> nn.Module:
    if id(module) in done:  # a layer that is used in two places stays one
        return done[id(module)]
    made = module
    if _is_other_batchnorm(module):
        # All that makes it up, hooks and what users have set included.
        made = SyncBatchNorm.__new__(SyncBatchNorm)
        made.__dict__.update(module.__dict__, channel=channel)
        for name in ("process_group", "_compiled_call_impl"):
            made.__dict__.pop(name, None)
    done[id(module)] = made
    for place, child in list(module._modules.items()):
        if child is not None:
            made._modules[place] = _convert(child, channel, done)
    return made


class _Normalise(torch.autograd.Function):
    """(x - mean) / deviation, where mean and deviation are functions of all ranks' x.

    Ioffe and Szegedy, "Batch Normalization", 2015, section 3, with the sums over all ranks.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, mean: Tensor, inverse: Tensor, count: float, channel: Any
    ) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        normal = (x.to(wide) - _along(mean.to(wide), x)) * _along(inverse.to(wide), x)
        ctx.save_for_backward(normal, inverse)
        ctx.count, ctx.channel, ctx.dtype = count, channel, x.dtype
        return normal

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        normal, inverse = ctx.saved_tensors
        axes = [axis for axis in range(normal.dim()) if axis != 1]
        sums = torch.stack(
            [
                gradient.sum(axes, dtype=torch.float64),
                (gradient * normal).sum(axes, dtype=torch.float64),
            ]
        )
        if ctx.channel is not None:
            sums = meet(sums, ctx.channel, _added)
        sums = (sums / ctx.count).to(gradient.dtype)
        centred = gradient - _along(sums[0], normal) - normal * _along(sums[1], normal)
        result = centred * _along(inverse.to(gradient.dtype), normal)
        return result.to(ctx.dtype), None, None, None, None


def _statistics(x: Tensor, channel: Communicator | None) -> tuple[float, Tensor, Tensor]:
    """Return the values per channel on all ranks, their mean and their biased variance.

    The ranks' means and sums of squared deviations are joined as in Chan, Golub, LeVeque, "Updating
    Formulae and a Pairwise Algorithm for Computing Sample Variances", 1979, in rank order.
    """
    rows = x.transpose(0, 1).reshape(x.shape[1], -1).to(torch.float64)
    own = rows.new_zeros(3, x.shape[1])
    if rows.shape[1]:
        own[0] = rows.shape[1]
        own[1] = rows.mean(1)
        own[2] = (rows - own[1][:, None]).square().sum(1)
    count, mean, squares = 0.0, torch.zeros_like(own[1]), torch.zeros_like(own[2])
    parts = own[None] if channel is None else meet(own, channel, _gathered)
    counts = parts[:, 0, :1].flatten().tolist()  # none without channels
    for part, added in zip(parts, counts, strict=False):
        if added:
            distance = part[1] - mean
            squares = squares + part[2] + distance.square() * (count * added / (count + added))
            mean = mean + distance * (added / (count + added))
            count += added
    return count, mean, squares / max(count, 1.0)


def _gathered(x: Tensor, channel: Communicator) -> Tensor:
    rows: Tensor = channel.allgather(x)
    return rows


def _added(x: Tensor, channel: Communicator) -> Tensor:
    channel.allreduce(x, op="sum")
    return x


def _along(channels: Tensor, x: Tensor) -> Tensor:
    """Return the values per channel in a shape that broadcasts over x."""
    return channels.view(1, -1, *[1] * (x.dim() - 2))
