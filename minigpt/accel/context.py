"""What autograd hands from a function's forward to its backward pass."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The `ctx` of a `torch.autograd.Function`, which has no type of its own in torch.

    Attributes:
        needs_input_grad: of each argument of the forward pass, whether it gets a gradient.
    """

    needs_input_grad: tuple[bool, ...]

    @property
    def saved_tensors(self) -> tuple[Tensor, ...]:
        """What the forward pass saved, in the same order."""

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Save tensors for the backward pass."""
