"""Sums over micro-batches, steps and processes, from which every mean is taken."""

from __future__ import annotations

import torch
from torch import Tensor


class Totals:
    """Named sums, kept on the device until they are read.

    A mean of means weighs short batches too much; here sums are divided once, by the
    number of targets (or pairs) that they were summed over.
    """

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}

    def add(self, sums: dict[str, Tensor | float], device: torch.device) -> None:
        """Add one micro-batch's sums."""
        dtype = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        zero = torch.zeros((), dtype=dtype, device=device)
        for name, value in sums.items():  # adding a number, unlike copying it, waits for nothing
            value = value.detach() if isinstance(value, Tensor) else value
            self.sums[name] = self.sums.get(name, zero) + value

    def reduced(self) -> dict[str, Tensor]:
        """Return the sums over all processes (each must hold the same names)."""
        if not self.sums or not (
            torch.distributed.is_available() and torch.distributed.is_initialized()
        ):
            return self.sums
        packed = torch.stack(list(self.sums.values()))
        torch.distributed.all_reduce(packed)
        return dict(zip(self.sums, packed.unbind(), strict=True))

    def clear(self) -> None:
        """Start over."""
        self.sums = {}


def read(values: dict[str, Tensor]) -> dict[str, float]:
    """Return scalars as numbers; the host waits for the device once, not for each of them."""
    return dict(zip(values, torch.stack(list(values.values())).tolist(), strict=True))
