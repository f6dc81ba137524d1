"""Packed attention: samples of one batch never see each other.

Registered with transformers under `PACKED`, so every model family that takes an attention
interface uses it. The attention plan arrives as a keyword argument of the model's forward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, PreTrainedModel

from minigpt.data.batch import AttentionPlan
from minigpt.errors import ModelError

PACKED = "minigpt_packed"


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Attend inside each row of the plan.

    Rows of like length are gathered into one causal SDPA call. A short row is filled up at
    its end, where causality hides the filling from every real token.

    Args:
        module: the attention layer (unused; part of the interface).
        query: [1, H, T, D].
        key, value: [1, K, T, D] with K dividing H (grouped-query attention).
        attention_mask: unused, the plan says who attends to whom.
        plan: the batch's attention plan.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits; None means 1/sqrt(D).
        sliding_window: refused when a row is longer.

    Returns:
        [1, T, H, D] and None.

    Raises:
        ModelError: for a row longer than the model's sliding window.
    """
    if sliding_window is not None and plan.longest > sliding_window:
        raise ModelError(
            f"A sample of {plan.longest} tokens is longer than the model's sliding window of "
            f"{sliding_window}. Lower max_length to {sliding_window}."
        )
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # [T, heads, D]
    grouped = q.shape[1] != k.shape[1]
    results = []
    for index in plan.gather:
        # index_select, because its backward is many times faster on a CPU than indexing's
        flat = (x.index_select(0, index.flatten()) for x in (q, k, v))
        # [R, heads, L, D]
        rows = [x.unflatten(0, list(index.shape)).transpose(1, 2) for x in flat]
        out = scaled_dot_product_attention(
            rows[0], rows[1], rows[2], None, dropout, True, scale=scaling, enable_gqa=grouped
        )
        results.append(out.transpose(1, 2).flatten(0, 1))
    return torch.cat(results).index_select(0, plan.scatter).unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)


@contextmanager
def attention_of(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model use another attention function for a while (`sdpa` to generate)."""
    before = model.config._attn_implementation
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before
