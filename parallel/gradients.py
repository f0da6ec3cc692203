"""The gradients of named parameters, as a reducer finds them and leaves them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .gradient_dtype import gradient_dtype
from .tensors import dtype_name, member_of

if TYPE_CHECKING:
    from .buckets import Member
    from .flight import Load

__all__ = ["Gradients"]


class Gradients:
    """Know parameters by their indices, and which of them get sparse gradients.

    sparse: parameters whose gradient becomes a sparse one where only other ranks had any; those
        that have had a sparse one on this rank are added.
    elsewhere: the indices of those that another reducer has in its pass.
    """

    def __init__(
        self, named: Sequence[tuple[str, nn.Parameter]], sparse: Iterable[nn.Parameter]
    ) -> None:
        self.names = tuple(name for name, _ in named)
        self.parameters = tuple(parameter for _, parameter in named)
        self.elsewhere: frozenset[int] = frozenset()
        self._sparse = set(sparse)
        self._dtypes = [gradient_dtype(parameter) for parameter in self.parameters]

    def describe(self, index: int) -> Member:
        """Return what a bucket needs to know of a parameter's gradient."""
        member = member_of(self.names[index], self.parameters[index])
        dtype = self._dtypes[index].to_real()
        return replace(member, dtype=dtype_name(dtype), itemsize=dtype.itemsize)

    def trainable(self) -> tuple[bool, ...]:
        """Tell of every parameter whether it is to be reduced here, as things are now."""
        flags = [parameter.requires_grad for parameter in self.parameters]
        for index in self.elsewhere:
            flags[index] = False
        return tuple(flags)

    def conditions(self) -> list[str]:
        """Return a line on each parameter that says why it is reduced or not."""
        words = {index: "in another wrapper, too" for index in self.elsewhere}
        return [
            f"{name} {'trainable' if flag else words.get(index, 'frozen')}"
            for index, (name, flag) in enumerate(zip(self.names, self.trainable(), strict=True))
        ]

    def of(self, index: int) -> Tensor | None:
        """Return the gradient that is to be reduced; TypeError if it has got another dtype."""
        if index in self.elsewhere:
            return None
        parameter = self.parameters[index]
        gradient = parameter.grad
        if gradient is not None and gradient.layout == torch.sparse_coo:
            self._sparse.add(parameter)
        if gradient is not None and gradient.dtype != self._dtypes[index]:
            raise TypeError(
                f"gradient of {self.names[index]}: "
                f"expected {dtype_name(self._dtypes[index])}, got "
                f"{dtype_name(gradient.dtype)}: change the dtype of a module, or its parameters' "
                "grad_dtype, before wrapping it"
            )
        return gradient

    def clear(self, elsewhere: frozenset[int]) -> None:
        """Put zeros in place of the gradients there are, but for those of indices elsewhere."""
        for index, parameter in enumerate(self.parameters):
            gradient = parameter.grad
            if gradient is not None and parameter.requires_grad and index not in elsewhere:
                parameter.grad = torch.zeros_like(gradient)

    def make_sparse(self, load: Load) -> None:
        """Make gradients sparse that came from other ranks alone, where they are sparse."""
        if not self._sparse:
            return
        for parameter, gradient in zip(load.parameters, load.gradients, strict=True):
            if gradient is None and parameter in self._sparse and parameter.grad is not None:
                parameter.grad = parameter.grad.to_sparse(1)

    @property
    def sparse(self) -> tuple[str, ...]:
        """Return the names of the parameters that get sparse gradients."""
        pairs = zip(self.names, self.parameters, strict=True)
        return tuple(name for name, parameter in pairs if parameter in self._sparse)

    def expect_sparse(self, names: Iterable[str]) -> None:
        """Expect the parameters of these names to have sparse gradients, too."""
        chosen = set(names)
        pairs = zip(self.names, self.parameters, strict=True)
        self._sparse |= {parameter for name, parameter in pairs if name in chosen}
