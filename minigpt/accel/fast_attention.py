"""Packed attention by the fastest kernel there is, and rows of like length computed together.

Shape legend:
    T  tokens of the batch, H query heads, K key heads, D width of a head
    R  rows of a group of the plan, L its longest row
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt.accel import cpu_attention
from minigpt.accel.block_causal import LONGEST, block_causal_attention
from minigpt.accel.gpu_attention import kernel_applies, kernel_attention
from minigpt.accel.row_groups import row_groups
from minigpt.data.batch import AttentionPlan


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend inside each row of a plan; arguments as for `accel.attention`."""
    if not window or plan.longest <= window:
        window = None  # it hides nothing
    if q.shape[-1] == v.shape[-1] and not dropout and window is None:
        if kernel_applies(q.device, q.dtype, q.shape[-1]):
            return kernel_attention(q, k, v, plan, scaling)
        if cpu_attention.applies(q):
            return cpu_attention.fused_attention(q, k, v, plan.spans, scaling)
    attend_rows = partial(_attend_rows, scaling=scaling, dropout=dropout, window=window)
    out: Tensor = map_groups(attend_rows, (q, k, v), plan)
    return out


@torch.compiler.disable  # type: ignore[untyped-decorator]  # no two batches have the same groups
def map_groups(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], plan: AttentionPlan
) -> Tensor:
    """Apply a causal function to groups of rows of like length; as `accel.map_rows`."""
    gather, scatter = row_groups(plan)
    index = torch.cat([group.flatten() for group in gather])
    sizes = [group.numel() for group in gather]
    # One index_select for all groups, so that its backward adds up gradients once. That of plain
    # indexing is many times slower on a CPU.
    gathered = [x.index_select(0, index).split(sizes) for x in tensors]
    results = []
    for group, *flat in zip(gather, *gathered, strict=True):
        rows = [x.unflatten(0, list(group.shape)) for x in flat]
        results.append(function(*rows).flatten(0, 1))
    return torch.cat(results).index_select(0, scatter)


def _attend_rows(
    q: Tensor, k: Tensor, v: Tensor, scaling: float, dropout: float, window: int | None
) -> Tensor:
    """Causal attention of rows [R, L, heads, D], by the fastest kernel of their device."""
    plain = not dropout and window is None and q.shape[-1] == v.shape[-1]
    visible = None
    if window is not None:
        position = torch.arange(q.shape[1], device=q.device)
        distance = position[:, None] - position
        visible = (distance >= 0) & (distance < window)  # [L, L]
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    with torch.autocast(q.device.type, enabled=False):
        if plain and q.device.type == "cpu" and q.shape[2] <= LONGEST:
            out = block_causal_attention(q * scaling, k, v)
        else:
            grouped = q.shape[1] != k.shape[1]
            out = scaled_dot_product_attention(
                q, k, v, visible, dropout, window is None, scale=scaling, enable_gqa=grouped
            )
    return out.transpose(1, 2)
