"""Packed attention on GPUs: the same as with an explicit mask."""

from __future__ import annotations

import pytest
import torch
from explicit_mask import ROWS, assert_equals_a_mask
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from minigpt.accel import fast_attention, gpu_attention
from minigpt.accel.gpu_attention import kernel_applies

FEW = settings(max_examples=12)


def row_by_row(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_queries: Tensor,
    cu_keys: Tensor,
    max_q: int,
    max_k: int,
    *,
    scale: float,
    window_size: tuple[int, int],
    enable_gqa: bool = False,
) -> Tensor:
    """What torch's kernel for CUDA computes: causal, queries and keys aligned at their ends."""
    assert window_size == (-1, 0)
    query_counts, key_counts = (x.diff().tolist() for x in (cu_queries, cu_keys))
    assert max(query_counts) <= max_q
    assert max(key_counts) <= max_k
    rows = zip(q.split(query_counts), k.split(key_counts), v.split(key_counts), strict=True)
    out = []
    for row in rows:
        queries, keys, values = (x.transpose(0, 1)[None] for x in row)
        shape = queries.shape[2], keys.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
        result = scaled_dot_product_attention(
            queries, keys, values, mask, scale=scale, enable_gqa=True
        )
        out.append(result[0].transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def _kernel_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fast_attention, "kernel_applies", lambda *_: True)
    monkeypatch.setattr(gpu_attention.varlen, "varlen_attn", row_by_row)


@pytest.mark.usefixtures("_kernel_stands_in")
@given(shapes=ROWS, kv_heads=st.sampled_from([1, 2, 4]))
@example([(0, 9, 0), (0, 9, 0), (0, 4, 0)], 2)
@example([(0, 9, 0), (0, 9, 0)], 2)
@settings(FEW, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_the_gpu_kernel_gets_describes_the_same_attention(
    shapes: list[tuple[int, int, int]], kv_heads: int
) -> None:
    assert_equals_a_mask(shapes, kv_heads)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [64, 128])
@pytest.mark.parametrize(
    "shapes",
    [
        [(0, 300, 0), (0, 1, 0), (0, 900, 0)],
        [(0, 512, 0), (0, 512, 0), (0, 40, 0)],
        [(0, 512, 0), (0, 512, 0)],
        [(130, 200, 61), (1, 1, 1), (0, 5, 0), (500, 3, 77)],
    ],
)
def test_the_gpu_kernel_equals_an_explicit_mask(
    shapes: list[tuple[int, int, int]], width: int, dtype: torch.dtype
) -> None:
    like = torch.empty(0, dtype=dtype, device="cuda")
    assert kernel_applies(like.device, like.dtype)
    for kv_heads in (1, 2, 4):
        assert_equals_a_mask(shapes, kv_heads, width, like, bound=0.015)


@pytest.mark.parametrize(
    ("card", "amd", "widest"),
    [
        ((7, 5), None, 0),
        ((8, 0), None, 256),
        ((8, 6), None, 192),
        ((8, 9), None, 192),
        ((9, 0), None, 256),
        ((12, 0), None, 192),
        ((9, 4), "6.4", 0),
    ],
)
def test_the_kernel_is_used_where_pytorch_supports_it(
    card: tuple[int, int], amd: str | None, widest: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: card)
    monkeypatch.setattr(torch.version, "hip", amd)
    gpu, widths = torch.device("cuda"), (8, 60, 64, 192, 256, 264)
    fits = [width for width in widths if kernel_applies(gpu, torch.float16, width)]
    assert fits == [width for width in (8, 64, 192, 256) if width <= widest]
    assert not kernel_applies(gpu, torch.float32, 64)


@pytest.mark.gpu
def test_fp32_on_a_gpu_goes_row_by_row() -> None:
    like = torch.empty(0, device="cuda")
    assert not kernel_applies(like.device, like.dtype)
    assert_equals_a_mask([(130, 200, 61), (0, 5, 0)], 2, 64, like, bound=1e-3)
