"""Pipeline plans as data: who computes what, in which order.

A plan function maps (rank, num_ranks, num_microbatches) to the actions of that rank. With one
stage a rank, that is the stage of the same number; with several, rank r of P has stages r, r + P,
r + 2 P, ... All plans here run a stage's backwards in the order of the micro-batches, so that it
adds its gradients in one order whichever plan is used, and the results agree to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

from ..comm.arguments import require_callable, whole
from .actions import Action, Kind
from .plan_check import PlanError, check_plan

__all__ = [
    "PLANS",
    "CheckedPlans",
    "PlanError",
    "PlanFunction",
    "gpipe",
    "interleaved",
    "naive",
    "one_f_one_b",
    "plan_function",
    "whole_plan",
    "zero_bubble",
]

PlanFunction = Callable[[int, int, int], tuple[Action, ...]]


def naive(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Take one micro-batch through all stages and back before the next: the plain layer split.

    Every stage keeps the activations of one micro-batch. Drawn for 2 stages, 2 micro-batches, a
    backward as long as a forward:

        stage 0 | F0 .  .  B0 F1 .  .  B1
        stage 1 | .  F0 B0 .  .  F1 B1 .
    """
    _check_place(stage, num_stages, num_microbatches)
    return tuple(
        Action(kind, m, stage)
        for m in range(num_microbatches)
        for kind in (Kind.FORWARD, Kind.BACKWARD)
    )


def gpipe(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Run all forwards, then all backwards (Huang et al. 2019, GPipe).

    Every stage keeps the activations of all micro-batches. Drawn for 2 stages, 3 micro-batches,
    a backward as long as a forward:

        stage 0 | F0 F1 F2 .  .  B0 B1 B2
        stage 1 | .  F0 F1 F2 B0 B1 B2 .
    """
    _check_place(stage, num_stages, num_microbatches)
    forwards = (Action(Kind.FORWARD, m, stage) for m in range(num_microbatches))
    backwards = (Action(Kind.BACKWARD, m, stage) for m in range(num_microbatches))
    return (*forwards, *backwards)


def one_f_one_b(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Alternate forwards and backwards after a short warmup (Narayanan et al. 2019, PipeDream,
    section 3.2, with one flush per step as in Narayanan et al. 2021, section 2.2).

    Stage s keeps the activations of at most num_stages - s micro-batches. Drawn for 2 stages,
    3 micro-batches, a backward as long as a forward:

        stage 0 | F0 F1 .  B0 F2 B1 .  B2
        stage 1 | .  F0 B0 F1 B1 F2 B2 .
    """
    _check_place(stage, num_stages, num_microbatches)
    warmup = min(num_stages - 1 - stage, num_microbatches)
    actions = [Action(Kind.FORWARD, m, stage) for m in range(warmup)]
    for steady in range(num_microbatches - warmup):
        actions.append(Action(Kind.FORWARD, warmup + steady, stage))
        actions.append(Action(Kind.BACKWARD, steady, stage))
    drained_from = num_microbatches - warmup
    actions += [Action(Kind.BACKWARD, m, stage) for m in range(drained_from, num_microbatches)]
    return tuple(actions)


def zero_bubble(stage: int, num_stages: int, num_microbatches: int) -> tuple[Action, ...]:
    """Split backwards, and fill the drain with gradients of weights (Qi et al. 2023, section 2.1,
    ZB-H1).

    The order of 1F1B, with the weights of stage s up to s micro-batches behind: every stage keeps
    the activations of at most num_stages micro-batches, as 1F1B does on its first. Drawn for 2
    stages, 3 micro-batches, all parts of one length:

        stage 0 | F0 F1 .  I0 W0 F2 I1 W1 I2 W2
        stage 1 | .  F0 I0 F1 I1 W0 F2 I2 W1 W2
    """
    actions: list[Action] = []
    behind = 0
    for action in one_f_one_b(stage, num_stages, num_microbatches):
        if action.kind is Kind.FORWARD:
            actions.append(action)
            continue
        actions.append(Action(Kind.INPUT, action.microbatch, stage))
        if action.microbatch >= stage:
            actions.append(Action(Kind.WEIGHT, behind, stage))
            behind += 1
    actions += [Action(Kind.WEIGHT, m, stage) for m in range(behind, num_microbatches)]
    return tuple(actions)


def interleaved(
    rank: int, num_ranks: int, num_microbatches: int, *, stages_per_rank: int = 2
) -> tuple[Action, ...]:
    """Give every rank several stages, and take the micro-batches through them in groups of
    num_ranks (Narayanan et al. 2021, Megatron-LM, section 2.2).

    1F1B of stages a stages_per_rank-th as long, and so is the bubble: (P - 1) / (v M + P - 1) for P
    ranks, v stages on each and M micro-batches, a multiple of P. For another M it is the plan of
    the next multiple, without the micro-batches that are not there. Drawn for 2 ranks, 2 stages a
    rank, 2 micro-batches, a backward as long as a forward:

        rank 0 | F0@0 F1@0 F0@2 F1@2 .    B0@2 .    B1@2 B0@0 B1@0
        rank 1 | .    F0@1 F1@1 F0@3 B0@3 F1@3 B1@3 B0@1 B1@1 .
    """
    _check_place(rank, num_ranks, num_microbatches)
    if stages_per_rank < 1:
        raise ValueError(f"expected stages_per_rank >= 1, got {stages_per_rank}")
    own = [rank + num_ranks * part for part in range(stages_per_rank)]
    groups = [range(m, m + num_ranks) for m in range(0, num_microbatches, num_ranks)]
    forwards = [Action(Kind.FORWARD, m, s) for group in groups for s in own for m in group]
    backwards = [Action(Kind.BACKWARD, m, s) for group in groups for s in own[::-1] for m in group]
    warmup = 2 * (num_ranks - 1 - rank) + (stages_per_rank - 1) * num_ranks
    warmup = min(warmup, len(forwards))
    actions = forwards[:warmup]
    for forward, backward in zip(forwards[warmup:], backwards, strict=False):
        actions += (forward, backward)
    actions += backwards[len(forwards) - warmup :]
    return tuple(action for action in actions if action.microbatch < num_microbatches)


PLANS: Mapping[str, PlanFunction] = {
    "naive": naive,
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
}


def plan_function(schedule: str | PlanFunction, stages_per_rank: int | None = None) -> PlanFunction:
    """Return a schedule that may be a name as a function; None stands for the name's own number.

    ValueError lists the names there are, for another one; ValueError too where a plan of one stage
    a rank is asked for several, and for a function together with stages_per_rank.
    """
    if stages_per_rank is not None:
        whole("stages_per_rank", stages_per_rank)
    if not isinstance(schedule, str):
        if stages_per_rank is not None:
            raise ValueError(
                "a plan function says itself which stages a rank has: no stages_per_rank"
            )
        require_callable("schedule", schedule)
        return schedule
    if schedule not in PLANS:
        known = ", ".join(sorted(PLANS))
        raise ValueError(f"unknown pipeline schedule {schedule!r}, expected one of: {known}")
    if stages_per_rank is None:
        return PLANS[schedule]
    if schedule == "interleaved":
        return partial(interleaved, stages_per_rank=stages_per_rank)
    if stages_per_rank != 1:
        raise ValueError(
            f"the schedule {schedule!r} has one stage a rank, not {stages_per_rank}: "
            "choose interleaved"
        )
    return PLANS[schedule]


def whole_plan(
    function: PlanFunction, num_ranks: int, num_microbatches: int
) -> tuple[tuple[Action, ...], ...]:
    """Evaluate a plan function at every rank."""
    return tuple(function(rank, num_ranks, num_microbatches) for rank in range(num_ranks))


class CheckedPlans:
    """The plans of a function for so many ranks, each checked before its first use."""

    def __init__(self, function: PlanFunction, num_ranks: int) -> None:
        self._function, self._num_ranks = function, num_ranks
        self._known: dict[int, tuple[tuple[Action, ...], ...]] = {}

    def __call__(self, num_microbatches: int) -> tuple[tuple[Action, ...], ...]:
        """Return the actions of every rank; PlanError for what cannot run."""
        plan = self._known.get(num_microbatches)
        if plan is None:
            plan = whole_plan(self._function, self._num_ranks, num_microbatches)
            check_plan(plan, num_microbatches)
            self._known[num_microbatches] = plan
        return plan


def _check_place(stage: int, num_stages: int, num_microbatches: int) -> None:
    if num_stages < 1 or not 0 <= stage < num_stages:
        raise ValueError(f"expected 0 <= stage < num_stages, got stage {stage} of {num_stages}")
    if num_microbatches < 0:
        raise ValueError(f"expected num_microbatches >= 0, got {num_microbatches}")
