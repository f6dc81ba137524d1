"""PackedLM: the same loss as the model's own, with and without a linear head."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch
from torch import nn
from transformers import PreTrainedModel

from minigpt.data.batch import PackedBatch, collate
from minigpt.model.attention import attention_of
from minigpt.model.packed_lm import PackedLM, end_early, head_is_linear

CHANGED = {
    "cohere": {"logit_scale": 0.5},
    "gemma2": {"final_logit_softcapping": 3.0, "attn_logit_softcapping": None},
}


def own_loss(model: PreTrainedModel, lengths: list[int]) -> torch.Tensor:
    """The sum of the losses that the model itself reports for each text."""
    total = torch.zeros(())
    with attention_of(model, "sdpa"):
        for sample in tiny.texts(lengths):
            ids = torch.tensor(sample.ids.astype("int64"))[None]
            total = total + model(input_ids=ids, labels=ids).loss * (len(sample.ids) - 1)
    return total


@pytest.mark.parametrize(
    ("device", "half", "dtype"),
    [
        ("cpu", True, torch.float32),
        pytest.param("cuda", True, torch.bfloat16, marks=pytest.mark.gpu),
        pytest.param("cuda", False, torch.float32, marks=pytest.mark.gpu),
    ],
)
def test_layers_add_to_bf16_on_a_gpu(device: str, half: bool, dtype: torch.dtype) -> None:
    lm = PackedLM(tiny.model("qwen3")).to(device)
    seen = []
    layer = lm.hf.base_model.layers[-1]
    layer.register_forward_hook(lambda module, inputs, out: seen.append(out.dtype))
    with torch.autocast(device, torch.bfloat16, enabled=half):
        lm(tiny.batch([5, 9]).to(device))
    assert seen == [dtype]


@pytest.mark.parametrize("nested", [False, True])
def test_a_model_in_bf16_turns_by_exact_angles(nested: bool) -> None:
    lm = PackedLM(tiny.model("llama"))
    exact = {name: buffer.clone() for name, buffer in lm.named_buffers()}
    (nn.Sequential(lm) if nested else lm).to(torch.bfloat16)
    assert {weight.dtype for weight in lm.parameters()} == {torch.bfloat16}
    assert any("inv_freq" in name for name in exact)
    assert all(torch.equal(buffer, exact[name]) for name, buffer in lm.named_buffers())


@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_known_families_have_a_linear_head(family: str) -> None:
    model = tiny.model(family).train()
    assert head_is_linear(model)
    assert model.training


@pytest.mark.parametrize(("family", "changes"), CHANGED.items())
def test_changed_logits_are_noticed(family: str, changes: dict[str, Any]) -> None:
    assert not head_is_linear(tiny.model(family, **changes))


def test_a_soft_cap_is_noticed_while_logits_are_small() -> None:
    model = tiny.model("gemma2", final_logit_softcapping=30.0, attn_logit_softcapping=None)
    with torch.no_grad():
        for weight in model.parameters():
            weight.mul_(0.01)
    assert not head_is_linear(model)


@pytest.mark.parametrize(
    ("family", "changes"), [*((f, {}) for f in tiny.FAMILIES), *CHANGED.items()]
)
def test_the_loss_and_its_gradients_are_the_models_own(
    family: str, changes: dict[str, Any]
) -> None:
    lengths = [20, 2, 11]
    model = tiny.model(family, **changes)
    lm = PackedLM(model)
    assert lm.plain_head == bool(changes)
    expected, got = own_loss(model, lengths), lm(tiny.batch(lengths))
    assert got.item() == pytest.approx(expected.item(), rel=1e-5)
    weights = [p for p in model.parameters() if p.requires_grad]
    truth = torch.autograd.grad(expected, weights)
    for mine, theirs in zip(torch.autograd.grad(got, weights), truth, strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-3, atol=1e-4)


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


WHOLE = [
    ("gpt2", {}),
    ("granite", {"residual_multiplier": 0.5}),
    ("gpt_oss", {}),
]  # other parts, sums, outputs


def lately(lm: PackedLM, batch: PackedBatch) -> tuple[torch.Tensor, int, int]:
    """Return answers' log-probs, and how many tokens pass the first and the last MLP."""
    seen: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, out: seen.append(out.shape[1]))
        for layer in lm.hf.base_model.layers
    ]
    scores = lm(batch, per_answer=True)
    for hook in hooks:
        hook.remove()
    return scores, seen[0], seen[-1]


@pytest.mark.parametrize("family", ["qwen3", "llama", "qwen2", "mistral"])
@pytest.mark.parametrize("shapes", [[(9, 3, 5)], [(4, 6, 2), (0, 7, 3), (12, 1, 1)]])
def test_the_last_layer_ends_with_what_predicts_targets(
    family: str, shapes: list[tuple[int, int, int]]
) -> None:
    lm, batch = PackedLM(tiny.model(family)), collate(tiny.preferences(shapes))
    scores, first, last = lately(lm, batch)
    assert (first, last) == (len(batch.input_ids), len(batch.labels))
    weights = list(lm.parameters())
    got = torch.autograd.grad(scores[0], weights)
    del lm.hf.base_model.layers[-1].forward
    lm.ends_early = False
    expected, _, whole = lately(lm, batch)
    assert whole == first
    assert torch.allclose(scores, expected, rtol=1e-5)
    for mine, theirs in zip(got, torch.autograd.grad(expected[0], weights), strict=True):
        assert torch.allclose(mine, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), WHOLE)
def test_a_layer_of_another_kind_is_left_whole(family: str, changes: dict[str, Any]) -> None:
    model = tiny.model(family, **changes)
    assert not end_early(model)
    assert all("forward" not in vars(module) for module in model.modules())
    lm, lengths = PackedLM(model), [20, 2, 11]
    expected = own_loss(model, lengths)
    assert lm(tiny.batch(lengths)).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_copy_ends_early_with_its_own_weights() -> None:
    lm, batch = PackedLM(tiny.model("llama")), tiny.batch([5, 9])
    before = lm(batch)
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for weight in lm.hf.base_model.layers[-1].parameters():
            weight.zero_()
    assert torch.equal(other(batch), before)
    assert not torch.equal(lm(batch), before)
