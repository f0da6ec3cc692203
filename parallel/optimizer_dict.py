"""An optimizer's state as its state_dict tells it, and back into it.

An optimizer with torch's own state_dict and load_state_dict is read and written directly, between
torch's hooks: torch's load_state_dict would cast state to the dtype of its parameter, and make new
groups while others hold the old ones. An optimizer with methods of its own, such as one that wraps
another, is read and written by these.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

__all__ = [
    "beside_of",
    "has_hooks",
    "has_own_dict",
    "hooked_load",
    "hooked_state_dict",
    "ids_of",
    "load_into",
    "state_dict_of",
]

Dict = dict[str, Any]

_CALLS = ("state_dict", "load_state_dict")


def has_own_dict(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has a state_dict or load_state_dict other than torch's."""
    return any(
        getattr(getattr(optimizer, name), "__func__", None) is not getattr(Optimizer, name)
        for name in _CALLS
    )


def has_hooks(optimizer: Optimizer) -> bool:
    """Tell whether an optimizer has hooks around its state_dict or its load_state_dict."""
    places = (f"{call}_{when}" for call in _CALLS for when in ("pre", "post"))
    return any(True for place in places for _ in _hooks(optimizer, place))


def state_dict_of(optimizer: Optimizer) -> Dict:
    """Return the state_dict of an optimizer, whose entries and tensors are not copied."""
    if has_own_dict(optimizer):
        return optimizer.state_dict()
    return hooked_state_dict(optimizer, lambda: _packed(optimizer))


def load_into(optimizer: Optimizer, state_dict: Dict) -> None:
    """Load a state_dict into an optimizer, whose state then has the dtypes of the state_dict.

    If `ids_of` accepts the state_dict, only code of the user's can fail.
    """
    if has_own_dict(optimizer):
        optimizer.load_state_dict(state_dict)
        _undo_casts(optimizer.state_dict(), state_dict)
    else:
        hooked_load(optimizer, state_dict, lambda given: _unpack(optimizer, given))


def hooked_state_dict(optimizer: Optimizer, tell: Callable[[], Dict]) -> Dict:
    """Return what `tell` does, between the hooks of `register_state_dict_..._hook`."""
    for hook in _hooks(optimizer, "state_dict_pre"):
        hook(optimizer)
    found = tell()
    for hook in _hooks(optimizer, "state_dict_post"):
        changed = hook(optimizer, found)
        found = found if changed is None else changed
    return found


def hooked_load(
    optimizer: Optimizer, state_dict: Mapping[str, Any], load: Callable[[Dict], None]
) -> None:
    """Call `load` between the hooks of `register_load_state_dict_..._hook`."""
    given = dict(state_dict)
    for hook in _hooks(optimizer, "load_state_dict_pre"):
        changed = hook(optimizer, given)
        given = given if changed is None else changed
    load(given)
    for hook in _hooks(optimizer, "load_state_dict_post"):
        hook(optimizer)


def ids_of(optimizer: Optimizer, state_dict: Any) -> dict[Tensor, Any]:
    """Return the key of each parameter in a state_dict: a number, in torch's own.

    TypeError if they cannot be told. "param_groups" must list the keys under "params", in groups
    as those of the optimizer, and "state" be kept by them; other entries of "state" have text keys.
    """
    given = state_dict if isinstance(state_dict, Mapping) else {}
    if not isinstance(given.get("state"), Mapping) or "param_groups" not in given:
        keys = list(given) or type(state_dict).__name__
        raise _refusal(optimizer, f"gives {keys}, not 'state' and 'param_groups' as torch's does")
    own = [group["params"] for group in optimizer.param_groups]
    told = [list(group.get("params", ())) for group in given["param_groups"]]
    if list(map(len, own)) != list(map(len, told)):
        raise _refusal(
            optimizer,
            f"gives groups of {list(map(len, told))} parameters, expected {list(map(len, own))}",
        )
    found = {
        parameter: name
        for row, names in zip(own, told, strict=True)
        for parameter, name in zip(row, names, strict=True)
    }
    known = set(found.values())
    for key in given["state"]:
        if key not in known and isinstance(key, int | Tensor):
            shown = f"a tensor of shape {tuple(key.shape)}" if isinstance(key, Tensor) else key
            raise _refusal(optimizer, f"gives state of {shown}, which its groups do not list")
    return found


def beside_of(state_dict: Dict, ids: Mapping[Tensor, Any]) -> dict[str, Dict]:
    """Return what a state_dict has beside groups and parameters' state: other state, and more."""
    known = set(ids.values())
    return {
        "state": {key: value for key, value in state_dict["state"].items() if key not in known},
        "more": {k: v for k, v in state_dict.items() if k not in ("state", "param_groups")},
    }


def _refusal(optimizer: Optimizer, what: str) -> TypeError:
    return TypeError(
        f"the state_dict of {type(optimizer).__name__} {what}, so its state has no parameters' "
        "names: give the optimizer that it wraps instead, and what this adds by itself"
    )


def _hooks(optimizer: Optimizer, place: str) -> Iterator[Callable[..., Any]]:
    # One that wraps another may have been made without torch's constructor.
    yield from getattr(optimizer, f"_optimizer_{place}_hooks", {}).values()


def _packed(optimizer: Optimizer) -> Dict:
    ids: dict[Tensor, int] = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            ids.setdefault(parameter, len(ids))
    state = optimizer.state.items()
    return {
        # But for that of parameters which are in no group any more.
        "state": {ids.get(k, k): v for k, v in state if k in ids or not isinstance(k, Tensor)},
        "param_groups": [
            {**group, "params": [ids[p] for p in group["params"]]}
            for group in optimizer.param_groups
        ],
    }


def _unpack(optimizer: Optimizer, given: Dict) -> None:
    """Write a state_dict into an optimizer, in place: others may hold its state and its groups."""
    of = {name: parameter for parameter, name in ids_of(optimizer, given).items()}
    state = {of.get(key, key): value for key, value in given["state"].items()}
    for group, new in zip(optimizer.param_groups, given["param_groups"], strict=True):
        own = group["params"]
        group.clear()
        group.update({**new, "params": own})
    optimizer.state.clear()
    optimizer.state.update(state)


def _undo_casts(told: Dict, given: Dict) -> None:
    """Put given tensors back where an optimizer has cast them to another dtype."""
    for key, entry in given["state"].items():
        now = told["state"].get(key)
        if not isinstance(now, dict) or not isinstance(entry, Mapping):
            continue
        for name, value in entry.items():
            there = now.get(name)
            if isinstance(value, Tensor) and isinstance(there, Tensor):
                now[name] = there if there.dtype == value.dtype else value.to(there.device)
