"""Train one module on every rank, with the mean of all ranks' gradients."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from types import NoneType
from typing import TYPE_CHECKING, Any, Literal, TypeVar

import torch
from torch import nn

from ..comm.arguments import require, whole
from .bucket_plan import START_BYTES
from .carried import Carried
from .demands import require_comm
from .drift import GradientReport, check_replicas, report_gradients
from .finite import FiniteCheck
from .gpu_threads import check_gpu_threads
from .gradient_sync import GradientSync
from .hooks import WireFormat, WireHook, wire_format
from .join import check_at_end, turns
from .kinship import Mode
from .loss_scale import LossScaler
from .reducer import Reducer
from .reduction import ReductionRecord
from .replicas import broadcast_tensors, check_equal, check_root, check_sendable, describe
from .spans import record_forward
from .sparse import sparse_parameters
from .transparent import Transparent
from .weights import begin_weighing, sum_of_weights

if TYPE_CHECKING:
    from ..comm.communicator import Communicator


__all__ = ["DataParallel"]

Batch = TypeVar("Batch")

_AVERAGES = ("active", "all")


class DataParallel(Transparent):
    """Wrap a module so that backward leaves the mean of all ranks' gradients in `.grad`.

    Buckets of gradients are reduced while backward still computes the others; when
    `loss.backward()` returns, all are in. What counts is the state when backward runs, never when
    forward ran: whether gradients are reduced (`no_sync`), which parameters require them, which got
    one. Forward does no communication at all, in whatever mode.

    - The mean is over the ranks, each counted alike; see `weighted` for unequal batches.
    - A parameter with a gradient on some ranks only counts as zeros on the others; with a gradient
      on no rank it keeps `.grad is None`.
    - What is reduced is `.grad` as it stands: whatever `no_sync` or an earlier backward has
      accumulated is part of it.
    - After backward `.grad` may be a view of the memory that is reduced, where the next backward
      reduces it without a copy. A gradient that is kept elsewhere stays what it is where the next
      backward finds every `.grad` None; where it accumulates to some, clone what is to outlive it.
    - Buffers, such as running statistics, are sent from `root` at the end of every synchronised
      backward, unless `broadcast_buffers` is off. ValueError on every rank, which names the buffer,
      where shapes differ by then, as of a table that grows with a rank's own sequences.
    - Gradients travel on a channel of the wrapper's own, so that several wrappers over one `comm`,
      as of a generator and its critic, may have parts in one backward; `close` gives it back.
    - Wrappers that share parameters, such as towers on one encoder or one wrapper within another,
      reduce together, each parameter once.
    - A copy (`copy.deepcopy`) or a pickle of the wrapper is independent of the ranks: it has the
      same parameters under the same names, and never communicates.

    bucket_bytes: gradients reduced at once, in bytes. "auto" to choose it after two steps, by when
        gradients arrived and what reductions cost; a run may then differ from its repetition in
        the last bits, as the order of additions in some algorithms follows the bucket's size.
    wire: how gradients travel. None for their own dtype; "fp32", "bf16", "fp16" (added in fp32
        inside), or a dtype as torch.bfloat16; "powersgd:RANK"; "topk:RATIO"; or a hook, a function
        from (bucket, comm) to work, see `hooks`. With one rank nothing travels,
        and nothing is compressed.
    wire_dtype: the same, under an older name.
    check_finite: look at every gradient before it leaves: backward raises NotFinite on every rank,
        with the first rank, parameter, step and micro-batch (backwards since the last synchronised
        one) where one is infinite or NaN; the other ranks have not added it.
    loss_scaler: the one that scales the losses. A wire that keeps what it has not sent needs it,
        as the factor changes from step to step; others do without.
    root: the rank of `comm` whose parameters and buffers all ranks start from.

    Collective over `comm`. ValueError on every rank, before anything is overwritten, if the modules
    differ between ranks in the names, shapes or dtypes of parameters or buffers, or in which
    are frozen.
    """

    def __init__(
        self,
        module: nn.Module,
        comm: Communicator,
        *,
        bucket_bytes: int | Literal["auto"] = START_BYTES,
        wire: WireFormat | WireHook | None = None,
        wire_dtype: WireFormat | None = None,
        root: int = 0,
        broadcast_buffers: bool = True,
        check_finite: bool = False,
        loss_scaler: LossScaler | None = None,
    ) -> None:
        super().__init__()
        require("module", module, nn.Module)
        require_comm(comm)
        self.module = module
        self.comm: Communicator | None = comm
        self._root = root
        self._mode = Mode(root, broadcast_buffers)
        named = list(module.named_parameters())
        buffers = list(module.named_buffers())
        chosen = wire_dtype if wire is None else wire

        def settings() -> list[str]:
            if wire is not None and wire_dtype is not None:
                raise ValueError(f"expected wire or wire_dtype, got both: {wire} and {wire_dtype}")
            check_root(comm, root)
            if bucket_bytes != "auto":
                whole("bucket_bytes", bucket_bytes, 1, "25 << 20, or 'auto'")
            require("loss_scaler", loss_scaler, (LossScaler, NoneType))
            one = f"bucket_bytes {bucket_bytes}", f"wire {wire_format(chosen)}", f"root {root}"
            scaled = f"loss_scaler {'none' if loss_scaler is None else 'given'}"
            sent = f"broadcast_buffers {broadcast_buffers}"
            return [*one, sent, f"check_finite {check_finite}", scaled]

        check_equal(comm, settings, "settings of DataParallel")
        lines = [*describe(named), *describe(buffers)]
        check_equal(comm, lines, "parameters or buffers of the module")
        check_sendable((*named, *buffers))
        # What a backward sends is ordered among what this wrapper sends, not among wrappers.
        channel = comm if comm.size == 1 else comm.split(0, key=comm.rank)
        self._channel: Communicator | None = channel
        self._finite = FiniteCheck(channel) if check_finite else None
        self._reducer: Reducer | None = Reducer(
            named,
            channel,
            bucket_bytes=None if bucket_bytes == "auto" else bucket_bytes,
            wire=chosen,
            sparse=sparse_parameters(module),
            finite=self._finite,
            loss_scaler=loss_scaler,
        )
        tensors = [tensor for _, tensor in (*named, *buffers)]
        check_gpu_threads(comm, tensors)
        broadcast_tensors(comm, tensors, root, START_BYTES)
        self._sync: GradientSync | None = GradientSync(
            module, named, channel, self._reducer, self._mode, self._finite
        )

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the module."""
        if torch.compiler.is_compiling():  # one graph; what is looked at here, backward looks at
            return self.module(*args, **kwargs)
        if self._sync is not None:
            self._sync.forward()
        timeline = None if self.comm is None else self.comm.timeline
        if timeline is None:
            return self.module(*args, **kwargs)
        return record_forward(timeline, self.module, *args, **kwargs)

    @property
    def synchronize(self) -> bool:
        """Tell whether backwards are reduced; read when they run, and to be set."""
        return self._mode.synchronize

    @synchronize.setter
    def synchronize(self, wanted: bool) -> None:
        self._mode.synchronize = wanted

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Let the backwards within accumulate into this rank's `.grad` without any communication.

        The first backward after it reduces the whole accumulated gradient. The same switch as a
        flag: `synchronize`, which is read when backward runs.
        """
        before = self.synchronize
        self.synchronize = False
        try:
            yield
        finally:
            self.synchronize = before

    @contextmanager
    def weighted(self, weight: float) -> Iterator[None]:
        """Let the backwards within reduce to sum(weight * gradient) / sum(weight) over the ranks.

        With the loss a mean over this rank's samples (or tokens) and `weight` their number, the
        result is the mean over all ranks' samples. All ranks use it in the same backwards. A rank
        of weight 0 adds nothing, even when its gradients are not finite; if all weights are 0, the
        gradients are zeros. The weight applies to the whole accumulated gradient. ValueError for
        what is no weight: on every rank, from backward; with one rank at once.
        """
        before = self._mode.weight
        weight = float(weight)  # a tensor would divide in its own, lesser precision
        if self._sync is not None:
            self._sync.expect(weight)
        self._mode.weight = weight
        try:
            yield
        finally:
            self._mode.weight = before

    def loss_factor(self, weight: float) -> float:
        """Return weight * size / sum(weights), to multiply this rank's loss by before backward.

        The plain mean over ranks is then what `weighted` computes. For models whose ranks meet in
        the backward itself, such as SyncBatchNorm, where weights come too late afterwards; with
        gradients accumulated over several batches it may differ from batch to batch. Collective;
        0 on every rank if all weights are 0. ValueError on every rank for a bad weight.
        """
        if self.comm is None:
            return 1.0
        weight = float(weight)
        total = sum_of_weights(begin_weighing(self.comm, weight))
        return weight * self.comm.size / total if total else 0.0

    def reduce_gradients(self) -> None:
        """Take part in the reduction of a backward that this rank does not run; collective.

        For a rank without a batch, or whose loss reaches no parameter, while other ranks run a
        synchronised backward: what it has in `.grad` counts, or zeros, and it gets the result.

        If several wrappers have parts in that backward, call it for each, in the order in which
        they were made. For wrappers that reduce together one call is enough, and more do no harm;
        nor does a call for a wrapper in which all is frozen, which no backward reduces.
        """
        if self._sync is not None:
            self._sync.reduce_without_backward()

    def join(
        self, batches: Iterable[Batch], *, at_end: str = "none", average: str = "active"
    ) -> Iterator[Batch | None]:
        """Yield batches so that ranks with unequal numbers of them take equal turns.

            for batch in model.join(loader):
                optimizer.zero_grad()
                if batch is None:
                    model.reduce_gradients()
                else:
                    loss(model(batch)).backward()
                optimizer.step()

        at_end: "none": a rank that has run out gets None until all have, so that every rank steps
            its optimizer equally often. "stop": all ranks end together when the first has run out.
        average: "active": the mean is over the ranks that have a batch; a `weighted` within a turn
            replaces that, and ranks that have run out weigh 0. "all": over all ranks, those that
            have run out counting as zeros; `weighted` must not be used then.

        With SyncBatchNorm layers ranks meet in forward, too: run a batch without rows in place of
        `reduce_gradients`, as model(x[:0]).sum().backward(), or stop together.

        Buffers are sent from `root`, or while it has no batch from the next rank that has one. One
        reduction per turn: accumulate within a turn under `no_sync`. Collective: every rank
        iterates to the end. ValueError for other words.
        """
        if average not in _AVERAGES:
            raise ValueError(
                f"unknown average {average!r}, expected one of: {', '.join(_AVERAGES)}"
            )
        if self.comm is None:
            return iter(batches)
        check_at_end(at_end)
        weigh = average == "active" and at_end == "none"
        return self._joined(turns(self.comm, batches, at_end), self.comm.size, weigh)

    def _joined(
        self, taken: Iterator[tuple[Batch | None, list[int]]], size: int, weigh: bool
    ) -> Iterator[Batch | None]:
        for batch, ranks in taken:
            # Buffers are those of root, or of the next rank that has seen a batch in this turn.
            self._mode.source = min(ranks, key=lambda rank: (rank - self._root) % size)
            try:
                weight = 0.0 if batch is None else 1.0
                with self.weighted(weight) if weigh else nullcontext():
                    yield batch
            finally:
                self._mode.source = self._root

    def check_replicas(self) -> str:
        """Compare the bits of all ranks' parameters and buffers; return their common hash.

        Collective. MismatchError on every rank, naming the first tensor that differs and the ranks.
        """
        named = [*self.module.named_parameters(), *self.module.named_buffers()]
        return check_replicas(self._world(), named)

    def gradient_report(self) -> GradientReport:
        """Tell which ranks had which gradients in the last synchronised backward; collective.

        `last_step.partial` names the parameters that had one on some ranks only, for no message.
        """
        last = self.last_step
        return report_gradients(self._world(), () if last is None else last.unused)

    def _world(self) -> Communicator:
        if self.comm is None:
            raise ValueError("a copy of the wrapper has no ranks to compare")
        return self.comm

    def carried(self) -> Carried | None:
        """Return what the next step depends on besides weights and batch; None for a copy.

        The order of the buckets, and what a compressing wire has not sent. Checkpoints hold it. Not
        collective, nothing is copied.
        """
        steps = 0 if self._finite is None else self._finite.step
        return None if self._reducer is None else self._reducer.carried(steps)

    def carry_on(self, carried: Carried) -> None:
        """Go on from what `carried` returned; on all ranks, between steps.

        As after a step that was given up in the middle: some of its buckets may have been sent.
        """
        if self._reducer is not None:
            self._reducer.carry_on(carried)
        if self._finite is not None:
            self._finite.step = carried.steps

    def detach(self) -> None:
        """Take the hooks off the module's parameters: from now on nothing is reduced.

        Not collective. Before the module is wrapped anew, as over the ranks that live.
        """
        if self._sync is not None:
            self._sync.detach()
        self.comm, self._channel, self._reducer, self._sync = None, None, None, None

    def close(self) -> None:
        """Detach, and give the wrapper's own channel back; collective. `comm` stays open."""
        comm, channel = self.comm, self._channel
        self.detach()
        if channel is not None and channel is not comm:
            channel.close()

    @property
    def last_step(self) -> ReductionRecord | None:
        """Return what the last synchronised backward did on this rank; None before the first."""
        return None if self._reducer is None else self._reducer.last

    def __getstate__(self) -> dict[str, Any]:
        # Communicators and hooks belong to this process.
        own = "comm", "_channel", "_reducer", "_sync", "_finite"
        return {**self.__dict__, **dict.fromkeys(own)}
