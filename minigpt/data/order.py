"""Order: which sample comes when. A pure function of (seed, epoch, position).

Nothing is remembered between calls, so a run resumes at any micro-batch, and the same
order is dealt out to any number of processes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice

import numpy as np
from numpy.typing import NDArray

from minigpt.data.packing import pack

ROUNDS = 4


def shuffle(index: NDArray[np.int64], size: int, seed: int) -> NDArray[np.int64]:
    """Map indices below `size` to their places in a pseudo-random permutation.

    A Feistel network on the next power of four with cycle walking (Black and Rogaway 2002):
    any part of the permutation is computed without holding the rest.
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = np.uint64((1 << half) - 1)
    keys = np.random.SeedSequence(seed).generate_state(ROUNDS, np.uint64)

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


@dataclass(frozen=True)
class Part:
    """One file's share in an epoch: `count` of its `size` samples (more than once if larger)."""

    size: int
    count: int


class PackedOrder:
    """The micro-batches of each epoch, as arrays of sample numbers.

    Samples are numbered through all parts. Each epoch draws its samples by a permutation,
    takes them window by window, and packs every window.

    Args:
        lengths: for each part, a function from sample numbers [K] to their lengths [K].
        parts: how much of each array an epoch takes.
        budget: tokens of a micro-batch.
        seed: decides the order; None keeps the files' own order (for validation).
        window: samples packed together.
        limit: micro-batches of an epoch, if not all.
        repeat: whether each epoch is like the first one.
    """

    def __init__(
        self,
        lengths: Sequence[Callable[[NDArray[np.int64]], NDArray[np.int64]]],
        parts: Sequence[Part],
        budget: int,
        seed: int | None,
        window: int = 8192,
        limit: int | None = None,
        repeat: bool = False,
    ) -> None:
        self.lengths, self.parts = lengths, parts
        self.budget, self.seed, self.window = budget, seed, window
        self.limit, self.repeat = limit, repeat
        self.starts = np.cumsum([0, *(part.count for part in parts)])

    def batches(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        """Yield an epoch's micro-batches as lists of (part, sample in that part)."""
        return islice(self._packed(0 if self.repeat else epoch), self.limit)

    def _packed(self, epoch: int) -> Iterator[list[tuple[int, int]]]:
        total = int(self.starts[-1])
        for start in range(0, total, self.window):
            drawn = np.arange(start, min(start + self.window, total), dtype=np.int64)
            if self.seed is not None:
                drawn = shuffle(drawn, total, self._seed(epoch, 0))
            part, sample = self._locate(drawn, epoch)
            lengths = np.empty(len(drawn), np.int64)
            for number, lengths_of in enumerate(self.lengths):
                lengths[part == number] = lengths_of(sample[part == number])
            rng = np.random.default_rng([self.seed or 0, epoch, start])
            for members in pack(lengths, self.budget, rng):
                yield [(int(part[i]), int(sample[i])) for i in members]

    def count(self, epoch: int = 0) -> int:
        """Return how many micro-batches an epoch has."""
        return sum(1 for _ in self.batches(epoch))

    def _seed(self, epoch: int, part: int) -> int:
        words = np.random.SeedSequence([self.seed or 0, epoch, part]).generate_state(1)
        return int(words[0])

    def _locate(
        self, drawn: NDArray[np.int64], epoch: int
    ) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        part = np.searchsorted(self.starts, drawn, side="right") - 1
        inside = drawn - self.starts[part]
        for number, share in enumerate(self.parts):
            mine = part == number
            if share.count == share.size or not mine.any():
                continue
            # A partial draw takes another stretch of one long permutation in each epoch.
            place = inside[mine] + epoch * share.count
            turn, place = place // share.size, place % share.size
            for t in np.unique(turn).tolist():
                place[turn == t] = shuffle(place[turn == t], share.size, self._seed(t, number + 1))
            inside[mine] = place
        return part, inside
