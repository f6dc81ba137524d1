"""PackedLM: every sample is computed as if it were alone, with the model's own loss."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from explicit_mask import ROWS, assert_equals_a_mask
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedModel

from minigpt.data.batch import PackedBatch, Sample, collate
from minigpt.errors import ModelError
from minigpt.model.packed_lm import (
    PACKED,
    PackedLM,
    packed_attention,
    use_attention,
)

MODELS = {family: tiny.model(family) for family in tiny.FAMILIES}


LAYOUTS = st.lists(st.integers(1, 40), min_size=1, max_size=6)


FEW = settings(max_examples=12)


def packed_logits(model: PreTrainedModel, batch: PackedBatch) -> Tensor:
    with use_attention(model, PACKED):
        out = model(
            input_ids=batch.input_ids[None],
            position_ids=batch.position_ids[None],
            plan=batch.plan,
            use_cache=False,
        )
    return out.logits[0]


def alone(model: PreTrainedModel, ids: Tensor) -> Tensor:
    """Logits [n, V] of one document by plain transformers."""
    with use_attention(model, "sdpa"):
        return model(input_ids=ids[None], use_cache=False).logits[0]


def documents(batch: PackedBatch) -> list[Tensor]:
    return [*batch.input_ids.tensor_split(batch.cu_seqlens[1:-1].long())]


def gradients(model: PreTrainedModel, value: Tensor) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, [*model.parameters()], allow_unused=True)
    names = (name for name, _ in model.named_parameters())
    return {name: g for name, g in zip(names, grads, strict=True) if g is not None}


def assert_same(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> None:
    assert ours.keys() == truth.keys()
    largest = max(float(gradient.abs().max()) for gradient in truth.values())
    for name, gradient in truth.items():
        # Of a gradient that is 0, as that of queries which see one key, fp32's rounding is left.
        bound = 1e-4 * float(gradient.abs().max()) + 2**-22 * largest
        assert float((ours[name] - gradient).abs().max()) <= bound, name


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
    prompt, *both = ids.split([pair.prompt, *pair.answers])
    return [(torch.cat([prompt, answer]), pair.prompt) for answer in both]


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


@given(shapes=ROWS, kv_heads=st.sampled_from([1, 2, 4]))
@settings(max_examples=40)
def test_attention_equals_an_explicit_mask(
    shapes: list[tuple[int, int, int]], kv_heads: int
) -> None:
    assert_equals_a_mask(shapes, kv_heads)


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
    with use_attention(model, "eager"):
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
        qkv = (x[:, :, rows] for x in (q, k, v))
        alone = scaled_dot_product_attention(*qkv, is_causal=True)
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
    with pytest.raises(TypeError), use_attention(model, "sdpa"):
        model(model.config._attn_implementation)  # a string, which no model takes
    assert model.config._attn_implementation == PACKED


CHANGED = {
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None},
}


def reported_loss(model: PreTrainedModel, lengths: list[int]) -> torch.Tensor:
    """The sum of the losses that the model itself reports for each text."""
    total = torch.zeros(())
    with use_attention(model, "sdpa"):
        for sample in tiny.texts(lengths):
            ids = torch.tensor(sample.ids.astype("int64"))[None]
            total = total + model(input_ids=ids, labels=ids).loss * (len(sample.ids) - 1)
    return total


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_in_bf16_turns_by_exact_angles(nested: bool) -> None:
    lm = PackedLM(tiny.model("llama"))
    exact = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    (nn.Sequential(lm) if nested else lm).to(torch.bfloat16)
    assert {weight.dtype for weight in lm.parameters()} == {torch.bfloat16}
    assert any("inv_freq" in name for name in exact)
    assert all(torch.equal(buffer, exact[name]) for name, buffer in lm.named_buffers())


@pytest.mark.parametrize(
    ("family", "changes"), [*((f, {}) for f in tiny.FAMILIES), *CHANGED.items()]
)
def test_the_loss_and_its_gradients_are_the_models_own(
    family: str, changes: dict[str, Any]
) -> None:
    lengths = [20, 2, 11]
    model = tiny.model(family, **changes)
    lm = PackedLM(model)
    expected, got = reported_loss(model, lengths), lm(tiny.batch(lengths))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(expected, weights)
    for ours, theirs in zip(torch.autograd.grad(got, weights), truth, strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(("family", "changes"), [("qwen3", {}), ("gemma2", CHANGED["gemma2"])])
def test_log_probs_sum_to_the_loss(family: str, changes: dict[str, Any]) -> None:
    lm, batch = PackedLM(tiny.model(family, **changes)), tiny.batch([20, 2, 11])
    with torch.no_grad():
        scores = lm(batch, per_answer=True)
        assert scores.shape == (3,)
        assert scores.sum().item() == pytest.approx(-lm(batch).item(), rel=1e-5)


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_a_batch_without_targets_gives_zero_and_zero_gradients(family: str) -> None:
    lm = PackedLM(tiny.model(family))
    loss = lm(tiny.batch([5, 7]).without_targets())
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in lm.parameters())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_no_cache_is_built_in_training(family: str) -> None:
    caches: list[Any] = []

    def note(_: nn.Module, __: Any, out: Any) -> None:
        caches.append(out.past_key_values)

    lm = PackedLM(tiny.model(family, use_cache=True).train())
    lm.hf.base_model.register_forward_hook(note)
    lm(tiny.batch([5, 7]))
    assert caches == [None]
