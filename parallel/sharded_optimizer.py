"""Share the optimizer's state out over the replicas: each rank updates its part of the parameters.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models", SC 2020,
stage 1: reduce-scatter the gradients, step on this rank's part, allgather the parameters.
"""

from __future__ import annotations

import copy
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import (
    ASGD,
    SGD,
    Adadelta,
    Adagrad,
    Adam,
    Adamax,
    AdamW,
    NAdam,
    Optimizer,
    RAdam,
    RMSprop,
    Rprop,
)

from ..comm.arguments import require, whole
from .clip import clip_over_stages, refuse_one_stage
from .demands import require_comm
from .optimizer_dict import has_hooks, has_own_dict, hooked_load, hooked_state_dict
from .replicas import check_equal, check_sendable, describe
from .shard import Shard, shards_of
from .shard_state import gather_state, own_state

if TYPE_CHECKING:
    from ..comm.communicator import Communicator
    from ..comm.work import Work

__all__ = ["ShardedOptimizer"]

_ELEMENTWISE = (
    *(SGD, Adam, AdamW, Adagrad, RMSprop),
    *(Adadelta, Adamax, ASGD, NAdam, RAdam, Rprop),
)

Named = Iterable[tuple[str, nn.Parameter]]

# A gradient and its version, which goes up with every change in place. The reference is weak: a
# new gradient may have the identity and the address of one that is gone.
_Seen = tuple[weakref.ref[Tensor], int] | None


class ShardedOptimizer(Optimizer):
    """Run an optimizer on 1/size of every bucket of parameters, on each of `comm`'s ranks.

        optimizer = ShardedOptimizer(model.named_parameters(), mesh.data, AdamW, lr=1e-3)

    named: (name, parameter) pairs, or groups: dicts with such pairs under "params" and the group's
        own hyper-parameters, as in torch. Names are full names, unique over all groups.
    optimizer: SGD, Adam, AdamW, Adagrad, RMSprop, or another of torch's whose updates treat every
        element alike, so that a part can be updated without the rest; a subclass must keep to that.
    reduce: False if gradients have been averaged when `step` runs, as DataParallel and Pipeline do
        while backward goes on. True if each rank holds its own: `step` then averages them by
        reduce-scatter, which halves the gradients' traffic, after backward.
        With a scaled loss that takes a LossScaler: torch's GradScaler looks at this rank's alone.
    bucket_bytes: parameters that travel together, in bytes.
    hyper: of the optimizer, by keyword.

    A torch optimizer: learning-rate schedulers work on `param_groups`. Parameters must be equal on
    all ranks at each step, and their gradients too without `reduce`; they are equal afterwards. A
    parameter without a gradient, with `reduce` one without on every rank, is left alone. Sparse
    gradients count as dense ones. State per rank: 1/size of the whole, up to size - 1 elements per
    bucket. Collective over `comm`: the constructor, `add_param_group`, `step`,
    `state_dict` and `clip_grad_norm_`.

    TypeError for another optimizer, one with a state_dict or state_dict hooks of its own, or
    parameters without names; ValueError on every rank if names,
    shapes or dtypes differ between ranks.
    """

    def __init__(
        self,
        named: Named | Iterable[dict[str, Any]],
        comm: Communicator,
        optimizer: type[Optimizer] = AdamW,
        *,
        reduce: bool = False,
        bucket_bytes: int = 4 << 20,
        **hyper: Any,
    ) -> None:
        require_comm(comm)
        require("optimizer", optimizer, type, "torch.optim.AdamW")
        whole("bucket_bytes", bucket_bytes, 1)
        if not issubclass(optimizer, _ELEMENTWISE):
            known = ", ".join(kind.__name__ for kind in _ELEMENTWISE)
            raise TypeError(
                f"{optimizer.__name__} cannot be sharded, expected one of: {known}, whose updates "
                "treat every element alike"
            )
        groups = _groups(named)
        self._comm = comm
        self._reduce = reduce
        # Asks torch's GradScaler to call step in any case, so that every rank hears of it there.
        self._step_supports_amp_scaling = reduce
        # The gradients that the pieces were given theirs of, by clip_grad_norm_; None if it was not
        # called since the last step.
        self._brought: list[_Seen] | None = None
        self._names = [[name for name, _ in group["params"]] for group in groups]
        everything = [pair for group in groups for pair in group["params"]]
        if len(set(name for name, _ in everything)) != len(everything):
            raise ValueError("expected every parameter name once over all groups")
        lines = [*describe(everything), f"{optimizer.__name__}, reduce {reduce}, {bucket_bytes}"]
        check_equal(comm, lines, "parameters or settings of the sharded optimizer")
        check_sendable(everything)
        self._bucket_bytes = bucket_bytes
        self._shards: list[list[Shard]] = []
        self._inner = optimizer(self._shared_out(groups), **hyper)
        if has_own_dict(self._inner) or has_hooks(self._inner):
            raise TypeError(
                f"{optimizer.__name__} cannot be sharded: it has a state_dict, or hooks of one, of "
                "its own, and what is told here is the state of parts of parameters"
            )
        unsplit = list(map(_whole, self._inner.param_groups, groups))
        super().__init__(unsplit, dict(self._inner.defaults))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, on every rank to the same values; collective.

        TypeError with `reduce`, on every rank, where torch's GradScaler calls it.
        """
        self._refuse_grad_scaler()
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if not self._are_brought():
            self._bring_gradients()
        for inner, group in zip(self._inner.param_groups, self.param_groups, strict=True):
            inner.update(_hyper(group))
        for shard in self._all_shards():
            shard.load_parameters()
        self._inner.step()
        gathering = [(s, self._comm.allgather(s.flat, blocking=False)) for s in self._all_shards()]
        for shard, work in gathering:
            shard.store_parameters(work.wait())
        self._drop_gradients()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the gradients of the parameters."""
        super().zero_grad(set_to_none)
        self._drop_gradients()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the averaged gradients that `step` will use so that their norm is at most max_norm.

        Returns the norm before, the same on every rank. Call it between backward and `step`; the
        `.grad` of the parameters stay as they are. Where these change before `step`, as by another
        backward, `step` uses what they are then, not clipped: clip again. ValueError, before
        anything is changed, in a pipeline, whose own `clip_grad_norm_` counts all stages.
        """
        refuse_one_stage(p for group in self.param_groups for p in group["params"])
        if not self._are_brought():
            self._bring_gradients()
            self._brought = [_see(gradient) for gradient in self._gradients()]
        pieces = [p.parameter for shard in self._all_shards() for p in shard.pieces]
        return clip_over_stages(pieces, self._comm, max_norm, norm_type)

    def __reduce__(self) -> Any:
        raise TypeError(
            "a ShardedOptimizer holds a part of the state on each rank, and has no copy and no "
            "pickle: take its state_dict()"
        )

    @property
    def names(self) -> list[list[str]]:
        """Return the full names of every group's parameters, in the order of its "params"."""
        return self._names

    @property
    def state(self) -> Any:
        """Return the state of this rank's parts of parameters, by these parts.

        Clear it on every rank to begin anew; for the state of whole parameters see `state_dict`.
        """
        return self._inner.state

    @state.setter
    def state(self, given: Mapping[Tensor, Any]) -> None:
        if given:
            raise TypeError(
                "a ShardedOptimizer keeps the state of parts of parameters: load_state_dict takes "
                "that of whole ones"
            )
        if "param_groups" in vars(self):  # else it is torch's constructor, which knows of no state
            self._inner.state.clear()

    @property
    def kind(self) -> type[Optimizer]:
        """Return the class of the optimizer that is shared out."""
        return type(self._inner)

    def state_dict(self, root: int | None = None) -> dict[str, Any]:
        """Return the whole state by full parameter name; collective.

        {"state": {name: {key: value}}, "param_groups": [...]}: a value is a tensor of the
        parameter's shape, or a scalar, and a group lists the names of its parameters under
        "params". The same whatever the number of ranks.
        root: the only rank that is to get the state, on the others it is empty; all ranks if None.
        """

        def tell() -> dict[str, Any]:
            state = gather_state(self._all_shards(), self._inner.state, self._comm, root)
            groups = [
                {**_hyper(group), "params": list(names)}
                for group, names in zip(self.param_groups, self._names, strict=True)
            ]
            return {"state": state, "param_groups": groups}

        return hooked_state_dict(self, tell)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take this rank's part of a whole state, from any number of ranks; no communication.

        Give every rank the same state. ValueError unless groups, names and shapes fit.
        """
        hooked_load(self, state_dict, self._load)

    def _load(self, state_dict: Mapping[str, Any]) -> None:
        groups = state_dict["param_groups"]
        names = [list(group["params"]) for group in groups]
        if names != self._names:
            raise ValueError(
                f"the state is of groups with parameters {names}, expected {self._names}"
            )
        own = own_state(self._all_shards(), state_dict["state"])
        self._inner.state.clear()
        self._inner.state.update(own)
        for group, given in zip(self.param_groups, groups, strict=True):
            group.update(copy.deepcopy(_hyper(given)))  # schedulers write a tensor lr in place

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, (name, parameter) pairs under "params", to train from now on; collective.

        On every rank, before anything is changed: ValueError for what is in the optimizer already,
        or differs between ranks; TypeError as the constructor has it.
        """
        if len(self.param_groups) < len(self._names):  # the constructor, which has checked it
            super().add_param_group(param_group)
            return

        def lines() -> list[str]:
            (group,) = _groups([param_group])
            known = {p for group in self.param_groups for p in group["params"]}
            names = {name for names in self._names for name in names}
            for name, parameter in group["params"]:
                if name in names or parameter in known:
                    raise ValueError(f"{name} is in the optimizer already")
                names.add(name)
            return describe(group["params"])

        param_group = {**param_group, "params": list(param_group["params"])}
        check_equal(self._comm, lines, "parameters of the group")
        check_sendable(param_group["params"])
        (added,) = self._shared_out([param_group])
        self._inner.add_param_group(added)
        self._names.append([name for name, _ in param_group["params"]])
        self._brought = None
        super().add_param_group(_whole(self._inner.param_groups[-1], param_group))

    def _shared_out(self, groups: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Cut groups of pairs into buckets, and return them with this rank's pieces."""
        cut = [
            shards_of(group["params"], self._comm.rank, self._comm.size, self._bucket_bytes)
            for group in groups
        ]
        self._shards += cut
        return [
            {**group, "params": [piece.parameter for shard in shards for piece in shard.pieces]}
            for group, shards in zip(groups, cut, strict=True)
        ]

    def _refuse_grad_scaler(self) -> None:
        """Raise TypeError in a step of torch's GradScaler, which has set these two attributes."""
        given = [vars(self).pop(name, None) for name in ("found_inf", "grad_scale")]
        if any(value is not None for value in given):
            raise TypeError(
                "a ShardedOptimizer with reduce=True averages gradients in step, and torch's "
                "GradScaler skips a step by what this rank has before: ranks would skip, and set "
                "their scale, apart; use ringfold.LossScaler(comm)"
            )

    def _all_shards(self) -> list[Shard]:
        return [shard for shards in self._shards for shard in shards]

    def _gradients(self) -> list[Tensor | None]:
        return [p.grad for shard in self._all_shards() for _, p in shard.members]

    def _are_brought(self) -> bool:
        """Tell whether the pieces have the gradients that the parameters have now; collective.

        The ranks decide together: one whose gradients only a reduction has written sees no change.
        """
        if self._brought is None:
            return False
        pairs = zip(self._brought, self._gradients(), strict=True)
        same = all(_is_seen(seen, gradient) for seen, gradient in pairs)
        return bool(self._comm.allreduce(np.array([same], np.uint8), op="min")[0])

    def _bring_gradients(self) -> None:
        """Give every piece its part of the averaged gradients."""
        present = self._present()
        flights: list[tuple[Shard, Work | None]] = [(s, None) for s in self._all_shards()]
        if self._reduce:
            flights = [(s, self._reduce_scatter(s)) for s, _ in flights]
        for shard, work in flights:
            shard.hand_gradients(None if work is None else work.wait(), present)

    def _reduce_scatter(self, shard: Shard) -> Work:
        work: Work = self._comm.reduce_scatter(shard.gradients(), op="mean", blocking=False)
        return work

    def _present(self) -> set[str]:
        """Return the names of the parameters that have a gradient, with `reduce` on any rank."""
        pairs = [pair for shard in self._all_shards() for pair in shard.members]
        flags = np.array([parameter.grad is not None for _, parameter in pairs], dtype=np.uint8)
        if self._reduce:
            self._comm.allreduce(flags, op="max")
        return {name for (name, _), flag in zip(pairs, flags, strict=True) if flag}

    def _drop_gradients(self) -> None:
        self._brought = None
        for shard in self._all_shards():
            for piece in shard.pieces:
                piece.parameter.grad = None


def _see(gradient: Tensor | None) -> _Seen:
    return None if gradient is None else (weakref.ref(gradient), _version(gradient))


def _is_seen(seen: _Seen, gradient: Tensor | None) -> bool:
    if seen is None or gradient is None:
        return seen is None and gradient is None
    return seen[0]() is gradient and seen[1] == _version(gradient)


def _version(gradient: Tensor) -> int:
    return 0 if gradient.is_inference() else gradient._version


def _hyper(group: Mapping[str, Any]) -> dict[str, Any]:
    return {k: v for k, v in group.items() if k not in ("params", "param_names")}


def _whole(inner: Mapping[str, Any], group: Mapping[str, Any]) -> dict[str, Any]:
    """Return a group of whole parameters with the hyper-parameters of that of the pieces."""
    return {**_hyper(inner), "params": [parameter for _, parameter in group["params"]]}


def _groups(named: Named | Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return groups whose "params" are lists of (name, parameter)."""
    require("named", named, Iterable, "model.named_parameters()")
    given: Sequence[Any] = list(named)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    made = [{**group, "params": list(group["params"])} for group in groups]
    for group in made:
        for pair in group["params"]:
            if not (isinstance(pair, tuple) and len(pair) == 2 and isinstance(pair[0], str)):
                raise TypeError(
                    f"expected (name, parameter) pairs, as of named_parameters, got "
                    f"{type(pair).__name__}"
                )
    return made
