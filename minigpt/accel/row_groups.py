"""Attention rows of like length, so that each group of them is one dense tensor.

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

WASTE = 1.25  # a group's longest row over its shortest; more would compute padding


class RowGroups(NamedTuple):
    """A plan's attention rows, sorted into groups of like length.

    Attributes:
        gather: per group [R, L] positions in the batch; a short row ends in copies of position 0,
            which causality keeps from mattering.
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
    order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
    groups: list[list[int]] = []
    for index in order:
        if groups and len(rows[groups[-1][0]]) <= WASTE * len(rows[index]) + 8:
            groups[-1].append(index)
        else:
            groups.append([index])
    scatter = np.full(1 + max(int(row[-1]) for row in rows), -1, np.int64)
    gather = []
    base = 0
    for group in groups:
        length = len(rows[group[0]])
        table = np.zeros((len(group), length), np.int64)
        for line, index in enumerate(group):
            row = rows[index]
            table[line, : len(row)] = row
            unclaimed = scatter[row] < 0
            scatter[row[unclaimed]] = base + line * length + np.flatnonzero(unclaimed)
        gather.append(torch.from_numpy(table))
        base += table.size
    return gather, torch.from_numpy(scatter)
