"""Order: which sample comes when, and which samples share a micro-batch.

The order is a pure function of (seed, epoch, position): nothing is remembered between calls, so
a run resumes at any micro-batch, and the same order is dealt out to any number of processes.

Packing is a pure function of lengths. Micro-batches are filled evenly instead of one after the
other: the longest sample left goes to the emptiest bin (longest-processing-time-first, Graham
1969). Nothing is padded, so a bin may stay a little under its budget; in return all micro-batches
take the same time and each sees the same mix of lengths.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, pairwise

import numpy as np
from numpy.typing import NDArray

from minigpt.errors import DataError

FEISTEL_ROUNDS = 4
LENGTH_STEP = 16  # lengths this close count as equal, so that the seed decides which ones meet


@dataclass(frozen=True)
class FileShare:
    """One file's share in an epoch: `count` of its `size` samples (more than once if larger)."""

    size: int
    count: int


class PackedOrder:
    """The micro-batches of each epoch, as arrays of sample numbers.

    Samples are numbered through all files. Each epoch draws its samples by a permutation, and
    packs them buffer by buffer.

    Args:
        lengths: for each file, a function from sample numbers [K] to their lengths [K].
        shares: how much of each file an epoch takes.
        budget: tokens of a micro-batch.
        seed: decides the order; None keeps the files' own order (for validation).
        buffer: samples that are drawn and packed together.
        limit: micro-batches of an epoch, if not all.
        repeat: whether each epoch is like the first one.
    """

    def __init__(
        self,
        lengths: Sequence[Callable[[NDArray[np.int64]], NDArray[np.int64]]],
        shares: Sequence[FileShare],
        budget: int,
        seed: int | None,
        buffer: int = 8192,
        limit: int | None = None,
        repeat: bool = False,
    ) -> None:
        self.lengths = lengths
        self.shares = shares
        self.budget = budget
        self.seed = seed
        self.buffer = buffer
        self.limit = limit
        self.repeat = repeat
        self.starts = np.cumsum([0, *(share.count for share in shares)])
        self._counts: dict[int, int] = {}

    def batches(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Yield an epoch's micro-batches as lists of (file, sample in that file)."""
        return islice(self._packed(0 if self.repeat else epoch), self.limit)

    def _packed(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        total = int(self.starts[-1])
        for start in range(0, total, self.buffer):
            drawn = np.arange(start, min(start + self.buffer, total), dtype=np.int64)
            if self.seed is not None:
                drawn = shuffle(drawn, total, self._seed(epoch, 0))
            file, sample = self._locate(drawn, epoch)
            lengths = np.empty(len(drawn), np.int64)
            for number, lengths_of in enumerate(self.lengths):
                lengths[file == number] = lengths_of(sample[file == number])
            rng = np.random.default_rng([self.seed or 0, epoch, start])
            for members in pack(lengths, self.budget, rng):
                yield [(int(file[i]), int(sample[i])) for i in members]

    def count(self, epoch: int = 0) -> int:
        """Return how many micro-batches an epoch has; it is packed for that once."""
        if epoch not in self._counts:
            self._counts[epoch] = sum(1 for _ in self.batches(epoch))
        return self._counts[epoch]

    @property
    def is_quick_to_count(self) -> bool:
        """Whether the first epoch is packed at once, or was packed already."""
        return 0 in self._counts or int(self.starts[-1]) <= self.buffer

    def _seed(self, epoch: int, stream: int) -> int:
        words = np.random.SeedSequence([self.seed or 0, epoch, stream]).generate_state(1)
        return int(words[0])

    def _locate(
        self, drawn: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the file of each drawn number, and the sample in that file."""
        file = np.searchsorted(self.starts, drawn, side="right") - 1
        sample = drawn - self.starts[file]
        for number, share in enumerate(self.shares):
            of_file = file == number
            if share.count == share.size or not of_file.any():
                continue
            # A partial draw takes another stretch of one long permutation in each epoch.
            index = sample[of_file] + epoch * share.count
            permutation = index // share.size
            index = index % share.size
            for n in np.unique(permutation).tolist():
                inside = permutation == n
                index[inside] = shuffle(index[inside], share.size, self._seed(n, number + 1))
            sample[of_file] = index
        return file, sample


def shuffle(index: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Map indices below `size` to their positions in a pseudo-random permutation.

    A Feistel network on the next power of four with cycle walking (Black and Rogaway 2002):
    any stretch of the permutation is computed without holding the rest.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed).generate_state(FEISTEL_ROUNDS, np.uint64)

    def network(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
        left, right = x >> np.uint64(half), x & mask
        for key in keys:
            mixed = (right ^ key) * np.uint64(0x9E3779B97F4A7C15)
            mixed = (mixed ^ (mixed >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)
            left, right = right, left ^ ((mixed >> np.uint64(32)) & mask)
        return (left << np.uint64(half)) | right

    out = network(index.astype(np.uint64))
    while (outside := out >= np.uint64(size)).any():
        out[outside] = network(out[outside])
    return out.astype(np.int64)


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
    order = order[np.argsort(-(lengths[order] // LENGTH_STEP), kind="stable")]
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


def spread_evenly(numbers: NDArray[np.int64], share: float) -> NDArray[np.bool_]:
    """Return which of some numbers [K], counted from 1, make up a share of all, evenly spread."""
    chosen: NDArray[np.bool_] = np.floor(numbers * share) > np.floor((numbers - 1) * share)
    return chosen


def utilisation(lengths: NDArray[np.int64], bins: list[list[int]], budget: int) -> float:
    """Return the share of the micro-batches' budget that tokens fill, 0..1."""
    return float(lengths.sum()) / (len(bins) * budget) if bins else 1.0


def histogram(lengths: Iterable[NDArray[np.int64]]) -> list[tuple[str, int]]:
    """Return how many samples have how many tokens: (range, count), ranges by half powers of 2.

    Args:
        lengths: tokens of the samples, in as many arrays as bound the memory.
    """
    edges = [0, *(step << power for power in range(3, 21) for step in (2, 3)), 1 << 40]
    counts = np.zeros(len(edges) - 1, np.int64)
    for block in lengths:
        counts += np.histogram(block, edges)[0]
    used = np.flatnonzero(counts)
    labels = [f"{a}–{b - 1}" for a, b in pairwise(edges)]
    bars = list(zip(labels, counts.tolist(), strict=True))
    return bars[used[0] : used[-1] + 1] if len(used) else []
