"""Groups of attention rows of like length, each group one dense tensor.

Shape legend:
    T  tokens of the batch
    R  rows of a group, L its longest row
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple
from weakref import WeakKeyDictionary

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from minigpt.data.batch import AttentionPlan, positions

# A group's longest row is at most so many times its shortest, and so many tokens more: beyond, it
# would take too long to compute the padding.
MAX_RATIO, MAX_EXTRA = 1.25, 8


class RowGroups(NamedTuple):
    """A plan's attention rows, sorted into groups of like length.

    Attributes:
        gather: per group [R, L] positions in the batch. A short row is filled up at its end with
            position 0, which no token of the row attends to.
        scatter: [T] where each token's result lies in all groups' rows, flattened. A prompt that
            rows share takes its result from the longest of them.
    """

    gather: tuple[Tensor, ...]
    scatter: Tensor


_cache: WeakKeyDictionary[AttentionPlan, RowGroups] = WeakKeyDictionary()


def row_groups(plan: AttentionPlan) -> RowGroups:
    """Return the groups of a plan on its device; all layers of a model share them."""
    groups = _cache.get(plan)
    if groups is None:
        gather, scatter = _group([positions(row) for row in plan.rows])
        device = plan.cu_queries.device
        groups = RowGroups(tuple(group.to(device) for group in gather), scatter.to(device))
        _cache[plan] = groups
    return groups


def _group(rows: Sequence[NDArray[np.int64]]) -> tuple[list[Tensor], Tensor]:
    """Return `RowGroups.gather` and `RowGroups.scatter` of rows of positions, on the CPU."""
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    groups: list[list[int]] = []
    for index in order:
        limit = MAX_RATIO * len(rows[index]) + MAX_EXTRA
        if groups and len(rows[groups[-1][0]]) <= limit:
            groups[-1].append(index)
        else:
            groups.append([index])
    scatter = np.full(1 + max(int(row[-1]) for row in rows), -1, np.int64)
    gather = []
    start = 0  # of the group among all groups' rows, flattened
    for group in groups:
        length = len(rows[group[0]])
        table = np.zeros((len(group), length), np.int64)
        for number, index in enumerate(group):
            row = rows[index]
            table[number, : len(row)] = row
            unclaimed = scatter[row] < 0
            scatter[row[unclaimed]] = start + number * length + np.flatnonzero(unclaimed)
        gather.append(torch.from_numpy(table))
        start += table.size
    return gather, torch.from_numpy(scatter)
