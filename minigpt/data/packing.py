"""Packing: which samples share a micro-batch. Pure functions of lengths.

Micro-batches are filled evenly instead of one after the other: the longest sample left
goes to the emptiest bin (longest-processing-time-first, Graham 1969). Nothing is padded,
so a bin may stay a little under its budget; in return all micro-batches take the same time
and each sees the same mix of lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterable
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import DataError

GRAIN = 16  # lengths this close count as equal, so that chance decides which ones meet


def pack(lengths: NDArray[np.int64], budget: int, rng: np.random.Generator) -> list[list[int]]:
    """Group samples into bins of at most `budget` tokens.

    Args:
        lengths: [S] tokens of each sample, each in 1..budget.
        budget: tokens of a micro-batch.
        rng: decides among samples of about the same length and the order of the bins.

    Returns:
        Bins of indices into `lengths`; each index is in exactly one bin.

    Raises:
        DataError: when a sample is longer than the budget.
    """
    if len(lengths) and int(lengths.max()) > budget:
        raise DataError(
            f"a sample of {int(lengths.max())} tokens is longer than a micro-batch of {budget}",
            field="tokens_per_batch",
            remedy="Raise tokens_per_batch or lower max_length.",
            reason="oversize",
        )
    order = rng.permutation(len(lengths))
    order = order[np.argsort(-(lengths[order] // GRAIN), kind="stable")]
    bins: list[list[int]] = [[] for _ in range(-(-int(lengths.sum()) // budget))]
    emptiest = [(0, index) for index in range(len(bins))]
    for sample in order.tolist():
        size = int(lengths[sample])
        filled, index = emptiest[0] if emptiest else (budget, 0)
        if filled + size > budget:
            bins.append([])
            heapq.heappush(emptiest, (size, len(bins) - 1))
            bins[-1].append(sample)
        else:
            heapq.heapreplace(emptiest, (filled + size, index))
            bins[index].append(sample)
    return [bins[i] for i in rng.permutation(len(bins)).tolist() if bins[i]]


def utilisation(lengths: NDArray[np.int64], bins: list[list[int]], budget: int) -> float:
    """Return the share of the micro-batches' budget that tokens fill, 0..1."""
    return float(lengths.sum()) / (len(bins) * budget) if bins else 1.0


def histogram(lengths: Iterable[NDArray[np.int64]]) -> list[tuple[str, int]]:
    """Return how many samples have how many tokens: (range, count), ranges by half powers of 2.

    Args:
        lengths: of the samples, in as many arrays as it takes to hold only some of them.
    """
    edges = [0, *(step << power for power in range(3, 21) for step in (2, 3)), 1 << 40]
    counts = np.zeros(len(edges) - 1, np.int64)
    for some in lengths:
        counts += np.histogram(some, edges)[0]
    used = np.flatnonzero(counts)
    labels = [f"{a}–{b - 1}" for a, b in pairwise(edges)]
    bars = list(zip(labels, counts.tolist(), strict=True))
    return bars[used[0] : used[-1] + 1] if len(used) else []
