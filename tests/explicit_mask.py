"""Attention of a plan against SDPA with the mask written out."""

from __future__ import annotations

import tiny
import torch
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt.model.packed_lm import packed_attention


def assert_equals_a_mask(
    shapes: list[tuple[int, int, int]],
    kv_heads: int,
    width: int = 8,
    like: Tensor | None = None,
    bound: float = 1e-4,
) -> None:
    """Compare with plain SDPA in fp32, forward and backward, in the type and on the device of
    `like`.
    """
    like = torch.empty(0) if like is None else like
    plan = tiny.plan(shapes).to(like.device)
    generator = torch.Generator().manual_seed(len(shapes))
    total = sum(map(sum, shapes))
    q, k, v, weights = (
        torch.randn(1, heads, total, width, generator=generator).to(like)
        for heads in (4, kv_heads, kv_heads, 4)
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    mask = tiny.mask_of(shapes).to(like.device)
    expected = scaled_dot_product_attention(
        *wide, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    got, _ = packed_attention(torch.nn.Module(), *leaves, None, plan=plan, scaling=0.3)
    weights = weights.transpose(1, 2)
    results = [got, *torch.autograd.grad(got, leaves, weights)]
    truth = [expected, *torch.autograd.grad(expected, wide, weights.float())]
    for ours, theirs in zip(results, truth, strict=True):
        assert ours.dtype == like.dtype
        assert (
            float((ours - theirs).detach().norm()) <= bound * float(theirs.detach().norm()) + 1e-5
        )


ROWS = st.lists(
    st.one_of(
        st.tuples(st.just(0), st.integers(1, 30), st.just(0)),
        st.tuples(st.integers(1, 20), st.integers(1, 12), st.integers(1, 12)),
    ),
    min_size=1,
    max_size=5,
)
