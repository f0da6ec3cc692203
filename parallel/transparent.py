"""Wrap a module so that its tensors and layers keep their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

__all__ = ["Transparent"]


class Transparent(nn.Module):
    """Name the tensors of `self.module` as the user does, without "module." in front.

    Also as a part of a parent, whose names go in front: what its state_dict returns, its
    load_state_dict takes. `named_modules` has the layers where they are, below "module".
    """

    module: nn.Module

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

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Return the module's state under the user's own names."""
        return self.module.state_dict(*args, **kwargs)

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load the module's own state, on every rank the same one; no communication."""
        _refuse_assignment(assign)
        return self.module.load_state_dict(state_dict, strict)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *rest: Any
    ) -> None:
        # A parent's load_state_dict goes on to look below "module." for what has no such prefix.
        # The dict is the parent's copy, made for that.
        _refuse_assignment(local_metadata.get("assign_to_params_buffers", False))
        for name in [name for name in state_dict if name.startswith(prefix)]:
            state_dict[f"{prefix}module.{name[len(prefix) :]}"] = state_dict.pop(name)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)


def _refuse_assignment(assign: bool) -> None:
    if assign:
        raise ValueError(
            "assign=True would replace the parameters that are synchronised: "
            "load into the module before wrapping it"
        )
