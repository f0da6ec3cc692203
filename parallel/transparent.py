"""Wrap a module so that its tensors and layers keep their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

from torch import Tensor, nn

__all__ = ["Transparent"]


class Transparent(nn.Module):
    """Name the tensors of `self.module` as the user does, without "module." in front.

    This holds within a parent, too, whose names go in front: its load_state_dict takes what its
    state_dict returns. Only `named_modules` has the layers where they are, below "module". Tensors
    of the wrapper's own, and layers with any, would be in none of that: they are refused.
    """

    module: nn.Module

    def __init__(self) -> None:
        super().__init__()
        self.register_load_state_dict_post_hook(_load_ends)  # type: ignore[no-untyped-call]

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, nn.Module) and name != "module" and _has_tensors(value):
            _refuse_own(name)
        super().__setattr__(name, value)

    def add_module(self, name: str, module: nn.Module | None) -> None:
        """Add a part without tensors, such as a loss."""
        if module is not None and _has_tensors(module):
            _refuse_own(name)
        super().add_module(name, module)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse it."""
        _refuse_own(name)

    def register_buffer(self, name: str, tensor: Tensor | None, persistent: bool = True) -> None:
        """Refuse it."""
        _refuse_own(name)

    def named_parameters(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield the parameters under the user's own names."""
        return self.module.named_parameters(*args, **kwargs)

    def named_buffers(self, *args: Any, **kwargs: Any) -> Iterator[tuple[str, Tensor]]:
        """Yield the buffers under the user's own names."""
        return self.module.named_buffers(*args, **kwargs)

    def get_parameter(self, target: str) -> nn.Parameter:
        """Return a parameter by the user's own name, or by its place in the wrapper."""
        try:
            return self.module.get_parameter(target)
        except AttributeError:
            return super().get_parameter(target)

    def get_buffer(self, target: str) -> Tensor:
        """Return a buffer by the user's own name, or by its place in the wrapper."""
        try:
            return self.module.get_buffer(target)
        except AttributeError:
            return super().get_buffer(target)

    def get_submodule(self, target: str) -> nn.Module:
        """Return a layer by the user's own name, or by its place in the wrapper; itself for ""."""
        try:
            return self.module.get_submodule(target) if target else self
        except AttributeError:
            return super().get_submodule(target)

    def state_dict(
        self,
        *args: Any,
        destination: Any = None,
        prefix: str = "",
        keep_vars: bool = False,
    ) -> Any:
        """Return the module's state under the user's own names."""
        # torch still takes them by position.
        named: tuple[Any, ...] = destination, prefix, keep_vars
        destination, prefix, keep_vars = args + named[len(args) :]
        for begin in self._state_dict_pre_hooks.values():
            begin(self, prefix, keep_vars)
        found = self.module.state_dict(destination=destination, prefix=prefix, keep_vars=keep_vars)
        of_module = getattr(found, "_metadata", {}).get(prefix[:-1], {})
        for end in self._state_dict_hooks.values():
            given = end(self, found, prefix, of_module)
            found = found if given is None else given
        return found

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the module's own state, on every rank the same one; no communication."""
        _refuse_assignment(assign)

        def begin(_: nn.Module, *given: Any) -> None:
            self._before_load(*given)

        def end(_: nn.Module, keys: Any) -> None:
            for hook in self._load_state_dict_post_hooks.values():
                if hook is not _load_ends:
                    hook(self, keys)

        module: Any = self.module  # torch leaves the two without annotations
        before = module.register_load_state_dict_pre_hook(begin)
        after = module.register_load_state_dict_post_hook(end)
        try:
            return module.load_state_dict(state_dict, strict)
        finally:
            before.remove()
            after.remove()

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # A parent's load_state_dict loads a module, then its parts by their places. For a while
        # this one is what it wraps, so that names and versions are found where that has them.
        _refuse_assignment(local_metadata.get("assign_to_params_buffers", False))
        self._before_load(state_dict, prefix, local_metadata, *rest)
        self.module._load_from_state_dict(state_dict, prefix, local_metadata, *rest)
        if not isinstance(self._modules, _Within):
            self._modules = _Within(self._modules)

    def _before_load(self, *given: Any) -> None:
        for hook in self._load_state_dict_pre_hooks.values():
            hook(*given)


class _Within(dict[str, nn.Module | None]):
    """The parts of a wrapper, whose items are the parts of its module instead."""

    def __init__(self, plain: dict[str, nn.Module | None]) -> None:
        super().__init__(plain)
        self.plain = plain

    def items(self) -> Any:
        module = self["module"]
        assert module is not None
        return module._modules.items()


def _load_ends(wrapper: Transparent, keys: Any) -> None:
    """Let a wrapper have its own parts again, once a parent has loaded those of its module."""
    if isinstance(wrapper._modules, _Within):
        wrapper._modules = wrapper._modules.plain
    for hook in wrapper.module._load_state_dict_post_hooks.values():
        hook(wrapper.module, keys)


def _has_tensors(module: nn.Module) -> bool:
    return any(True for _ in chain(module.parameters(), module.buffers()))


def _refuse_own(name: str) -> None:
    raise TypeError(
        f"{name} would be no part of the wrapped module, and in no parameters() and no "
        f"state_dict(): set module.{name} before the module is wrapped"
    )


def _refuse_assignment(assign: bool) -> None:
    if assign:
        raise ValueError(
            "assign=True would replace the parameters that are synchronised: "
            "load into the module before wrapping it"
        )
