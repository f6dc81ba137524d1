"""Packed attention: every sample is computed as if it were alone."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.errors import ModelError
from minigpt.model import attention
from minigpt.model.attention import PACKED, attention_of, kernel_applies, packed_attention
from minigpt.model.packed_lm import PackedLM

MODELS = {family: tiny.model(family) for family in tiny.FAMILIES}
LAYOUTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)
FEW = settings(max_examples=12)


def packed_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    with attention_of(model, PACKED):
        out = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            plan=batch.plan,
            use_cache=False,
        )
    return out.logits[0]


def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [n, V] of one document by plain transformers."""
    with attention_of(model, "sdpa"):
        return model(input_ids=ids[None], use_cache=False).logits[0]


def documents(batch: PackedBatch) -> list[Tensor]:
    return [*batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())]


def gradients(model: PreTrainedModel, value: Tensor) -> dict[str, Tensor]:
    found = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
    names = (name for name, _ in model.named_parameters())
    return {name: g for name, g in zip(names, found, strict=True) if g is not None}


def assert_same(mine: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert mine.keys() == truth.keys()
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    for name, gradient in truth.items():
        # Of a gradient that is 0, as that of queries which see one key, fp32's rounding is left.
        bound = 1e-4 * float(gradient.abs().max()) + 2**-22 * largest
        assert float((mine[name] - gradient).abs().max()) <= bound, name


@pytest.mark.parametrize("family", tiny.FAMILIES)
@given(lengths=LAYOUTS, seed=st.integers(0, 100))
@FEW
def test_packed_logits_are_those_of_each_document_alone(
    family: str, lengths: list[int], seed: int
) -> None:
    batch = tiny.batch(lengths, seed)
    with torch.no_grad():
        expected = torch.cat([alone(MODELS[family], ids) for ids in documents(batch)])
        got = packed_logits(MODELS[family], batch)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("lengths", [(17, 3, 40, 1, 25), (1,), (33, 33)])
def test_packed_gradients_are_those_of_each_document_alone(
    family: str, lengths: Sequence[int]
) -> None:
    model, batch = MODELS[family], tiny.batch(lengths)
    apart = torch.cat([alone(model, ids) for ids in documents(batch)])
    weights = torch.randn(apart.shape, generator=torch.Generator().manual_seed(1))
    truth = gradients(model, (apart * weights).sum())
    assert_same(gradients(model, (packed_logits(model, batch) * weights).sum()), truth)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_document_does_not_see_its_neighbours(family: str) -> None:
    samples = tiny.texts([12, 9, 20])
    with torch.no_grad():
        before = packed_logits(MODELS[family], collate(samples))[11:19]
        samples[0].ids[:] = 5
        samples[2].ids[:] = 7
        after = packed_logits(MODELS[family], collate(samples))[11:19]
    assert torch.equal(before, after)


def answers(pair: Sample) -> list[tuple[Tensor, int]]:
    """Both answers as whole sequences, and the place of their first target."""
    ids = torch.from_numpy(pair.ids.astype(np.int64))
    prompt, first, second = ids.split([pair.prompt, pair.first, pair.second])
    return [(torch.cat([prompt, answer]), pair.prompt) for answer in (first, second)]


def answer_logprob(model: PreTrainedModel, ids: Tensor, start: int) -> Tensor:
    logp = alone(model, ids).log_softmax(-1)[start - 1 : -1]
    return logp.gather(1, ids[start:, None]).sum()


@pytest.mark.parametrize("family", tiny.FAMILIES)
@pytest.mark.parametrize("shapes", [[(9, 5, 30)], [(1, 1, 1), (40, 3, 4), (7, 20, 2)]])
def test_a_shared_prompt_equals_two_sequences(
    family: str, shapes: list[tuple[int, int, int]]
) -> None:
    model, pairs = MODELS[family], tiny.preferences(shapes)
    expected = torch.stack(
        [answer_logprob(model, *answer) for pair in pairs for answer in answers(pair)]
    )
    got = PackedLM(model)(collate(pairs), per_answer=True)
    assert torch.allclose(got, expected, rtol=1e-4, atol=1e-4)
    weights = torch.linspace(-1, 2, len(got))
    truth = gradients(model, (expected * weights).sum())
    assert_same(gradients(model, (got * weights).sum()), truth)


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
    given, of_row = (x.diff().tolist() for x in (cu_queries, cu_keys))
    assert max(given) <= max_q
    assert max(of_row) <= max_k
    rows = zip(q.split(given), k.split(of_row), v.split(of_row), strict=True)
    out = []
    for row in rows:
        mine, keys, values = (x.transpose(0, 1)[None] for x in row)
        shape = mine.shape[2], keys.shape[2]
        mask = torch.ones(shape, dtype=torch.bool, device=q.device).tril(shape[1] - shape[0])
        found = scaled_dot_product_attention(mine, keys, values, mask, scale=scale, enable_gqa=True)
        out.append(found[0].transpose(0, 1))
    return torch.cat(out)


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
    own = [x.clone().requires_grad_() for x in (q, k, v)]
    wide = [x.float().requires_grad_() for x in (q, k, v)]
    mask = tiny.mask_of(shapes).to(like.device)
    expected = scaled_dot_product_attention(
        *wide, attn_mask=mask, scale=0.3, enable_gqa=True
    ).transpose(1, 2)
    got, _ = packed_attention(torch.nn.Module(), *own, None, plan=plan, scaling=0.3)
    weights = weights.transpose(1, 2)
    mine = [got, *torch.autograd.grad(got, own, weights)]
    truth = [expected, *torch.autograd.grad(expected, wide, weights.float())]
    for ours, theirs in zip(mine, truth, strict=True):
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


@given(shapes=ROWS, kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=40)
def test_attention_equals_an_explicit_mask(
    shapes: list[tuple[int, int, int]], kv_heads: int
) -> None:
    assert_equals_a_mask(shapes, kv_heads)


@pytest.fixture
def _kernel_stands_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "kernel_applies", lambda *_: True)
    monkeypatch.setattr(attention.varlen, "varlen_attn", row_by_row)


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
    assert attention.kernel_applies(like)
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
    on_gpu: Any = SimpleNamespace(
        is_cuda=True, device=torch.device("cuda"), dtype=torch.float16, shape=(1,)
    )
    fits = [width for width in (8, 60, 64, 192, 256, 264) if kernel_applies(on_gpu, width)]
    assert fits == [width for width in (8, 64, 192, 256) if width <= widest]
    on_gpu.dtype = torch.float32
    assert not kernel_applies(on_gpu, 64)


@pytest.mark.gpu
def test_fp32_on_a_gpu_goes_row_by_row() -> None:
    like = torch.empty(0, device="cuda")
    assert not attention.kernel_applies(like)
    assert_equals_a_mask([(130, 200, 61), (0, 5, 0)], 2, 64, like, bound=1e-3)


def test_layers_that_do_not_hand_on_the_plan_are_refused() -> None:
    lm = PackedLM(tiny.model("qwen3"))
    with pytest.raises(ModelError, match=r"Qwen3Attention .* another family"):
        lm.hf(input_ids=torch.arange(5)[None])


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("mistral", {"sliding_window": 5}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 5}),
        ("gemma2", {"attn_logit_softcapping": 0.5, "sliding_window": 64}),
        ("gpt_oss", {"sliding_window": 5}),
    ],
)
def test_windows_soft_caps_and_sinks_are_those_of_eager_attention(
    family: str, changes: dict[str, Any]
) -> None:
    model, batch = tiny.model(family, **changes), tiny.batch([17, 9, 3])
    with attention_of(model, "eager"):
        expected = [
            model(input_ids=ids[None], use_cache=False).logits[0] for ids in documents(batch)
        ]
    truth = gradients(model, torch.cat(expected).square().sum())
    got = packed_logits(model, batch)
    assert torch.allclose(got, torch.cat(expected), rtol=1e-4, atol=1e-4)
    assert_same(gradients(model, got.square().sum()), truth)


def test_values_may_have_another_width() -> None:
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 2, 7, width, generator=generator) for width in (8, 8, 12))
    plan = tiny.plan([(0, 4, 0), (0, 3, 0)])
    out, _ = packed_attention(torch.nn.Module(), q, k, v, None, plan=plan)
    for rows in (slice(0, 4), slice(4, 7)):
        parts = (x[:, :, rows] for x in (q, k, v))
        alone = scaled_dot_product_attention(*parts, is_causal=True)
        assert torch.allclose(out[:, rows], alone.transpose(1, 2), atol=1e-6)


@pytest.mark.parametrize("name", ["attention_mask", "position_bias", "indices"])
def test_what_would_change_attention_is_refused(name: str) -> None:
    q, plan = torch.ones(1, 2, 4, 8), tiny.plan([(0, 4, 0)])
    options = {"attention_mask": None, name: torch.zeros(1)}
    with pytest.raises(ModelError, match=f"Module gives its attention {name}"):
        packed_attention(torch.nn.Module(), q, q, q, plan=plan, **options)


def test_positions_restart_in_each_sample_and_answer() -> None:
    batch = collate([*tiny.preferences([(3, 2, 4)]), *tiny.texts([2])])
    assert batch.position_ids.tolist() == [0, 1, 2, 3, 3, 4, 5, 0]
    assert batch.cu_seqlens.tolist() == [0, 7, 8]
    assert batch.predict_at.tolist() == [2, 3, 2, 4, 5, 6, 7]


def test_the_attention_of_a_model_is_put_back() -> None:
    model = tiny.model("llama")
    model.config._attn_implementation = PACKED
    with pytest.raises(TypeError), attention_of(model, "sdpa"):
        model(model.config._attn_implementation)  # a string, which no model takes
    assert model.config._attn_implementation == PACKED
