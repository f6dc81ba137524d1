"""Packed attention on GPUs: torch's FlashAttention for rows of any length, and a faster kernel for
full rows.

Shape legend:
    T  tokens of the batch, H query heads, K key heads, D width of a head
    R  rows of a group of the plan, L its longest row
"""

from __future__ import annotations

from collections.abc import Sequence
from inspect import signature
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import varlen
from torch.nn.functional import scaled_dot_product_attention

from minigpt.data.batch import AttentionPlan

# FlashAttention has a backward pass for heads of 256 on these cards, of 192 on later and smaller.
WIDE_HEADS = ((8, 0), (9, 0), (10, 0), (10, 3))
_OPTIONS = signature(varlen.varlen_attn).parameters.keys()  # which differ between releases
_GROUPED_HEADS: dict[str, Any] = {"enable_gqa": True} if "enable_gqa" in _OPTIONS else {}


def kernel_applies(device: torch.device, dtype: torch.dtype, width: int = 8) -> bool:
    """Whether attention on a device and in a type has a kernel for rows of any length and heads of
    a width.
    """
    half = dtype in (torch.bfloat16, torch.float16)
    return device.type == "cuda" and half and width % 8 == 0 and width <= _widest_head()


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _widest_head() -> int:
    """Return the width up to which torch's FlashAttention computes heads on this machine's GPU; 0
    before Ampere, which it does not know, and on AMD's, where it is another kernel.
    """
    card = torch.cuda.get_device_capability()
    if torch.version.hip or card < (8, 0) or not {"window_size", "scale"} <= _OPTIONS:
        return 0
    return 256 if card in WIDE_HEADS else 192


def kernel_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: AttentionPlan, scaling: float
) -> Tensor:
    """Attend on a GPU, where full rows have a faster kernel than those of any length.

    Args:
        q: [T, H, D]. k, v: [T, K, D] with K dividing H.
        plan: who attends to whom.
        scaling: factor of the logits.

    Returns:
        [T, H, D].
    """
    if plan.keys is not None:
        k, v = (x.index_select(0, plan.keys) for x in (k, v))
    borders, longest = (plan.cu_queries, plan.cu_keys), (plan.longest_queries, plan.longest)
    if not plan.full:
        return _ragged((q, k, v), borders, longest, scaling)
    rows = len(plan.cu_queries) - 1
    if plan.full == rows:
        return _even((q, k, v), (rows, plan.longest), scaling)
    # Full rows, and then shorter ones. No prompt is shared, so keys have the queries' borders.
    tokens = plan.full * plan.longest
    full, shorter = zip(*(x.split([tokens, len(x) - tokens]) for x in (q, k, v)), strict=True)
    cu_shorter = plan.cu_queries[plan.full :] - tokens
    out_full = _even(full, (plan.full, plan.longest), scaling)
    out_shorter = _ragged(shorter, (cu_shorter, cu_shorter), longest, scaling)
    return torch.cat([out_full, out_shorter])


def _even(qkv: Sequence[Tensor], shape: tuple[int, int], scaling: float) -> Tensor:
    """Attend in rows of one length, of the shape (R, L), by the kernel that PyTorch takes for them:
    on some cards cuDNN's, which is faster.
    """
    q, k, v = (x.unflatten(0, shape).transpose(1, 2) for x in qkv)  # [R, heads, L, D]
    out = scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out.transpose(1, 2).flatten(0, 1)


def _ragged(
    qkv: Sequence[Tensor],
    borders: tuple[Tensor, Tensor],
    longest: tuple[int, int],
    scaling: float,
) -> Tensor:
    """Attend in rows of any length, by the borders and longest lengths of queries and of keys.

    The last query of a row sees its last key: with more keys than queries, the first have none.
    """
    q, k, v = (x.contiguous() for x in qkv)
    out = varlen.varlen_attn(
        q, k, v, *borders, *longest, scale=scaling, window_size=(-1, 0), **_GROUPED_HEADS
    )
    assert isinstance(out, Tensor)  # and no pair, which only return_aux asks for
    return out
