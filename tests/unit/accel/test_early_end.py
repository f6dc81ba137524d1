"""The last layer that ends early gives the same numbers."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import tiny
import torch

from minigpt.accel.early_end import end_early
from minigpt.data.batch import PackedBatch, collate
from minigpt.model.packed_lm import PackedLM, target_logits, token_logprobs

OTHER_LAYERS = [
    ("gpt2", {}),
    ("granite", {"residual_multiplier": 0.5}),
    ("gpt_oss", {}),
]  # other parts, sums, outputs


def lately(lm: PackedLM, batch: PackedBatch) -> tuple[torch.Tensor, int, int]:
    """Return answers' log-probs, and how many tokens pass the first and the last MLP."""
    token_counts: list[int] = []
    hooks = [
        layer.mlp.register_forward_hook(lambda _, inputs, out: token_counts.append(out.shape[1]))
        for layer in lm.hf.base_model.layers
    ]
    scores = lm(batch, per_answer=True)
    for hook in hooks:
        hook.remove()
    return scores, token_counts[0], token_counts[-1]


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
    lm.linear_head.ends_early = False
    expected, _, last_full = lately(lm, batch)
    assert last_full == first
    assert torch.allclose(scores, expected, rtol=1e-5)
    for ours, theirs in zip(got, torch.autograd.grad(expected[0], weights), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("family", "changes"), OTHER_LAYERS)
def test_a_layer_of_another_kind_is_left_whole(family: str, changes: dict[str, Any]) -> None:
    model = tiny.model(family, **changes)
    assert not end_early(model, torch.arange(8)[None])
    assert all("forward" not in vars(module) for module in model.modules())
    lm, batch = PackedLM(model), tiny.batch([20, 2, 11])
    expected = -token_logprobs(target_logits(model, batch, packed=True), batch.labels).sum()
    assert lm(batch).item() == pytest.approx(expected.item(), rel=1e-5)


def test_a_copy_ends_early_with_its_own_weights() -> None:
    lm, batch = PackedLM(tiny.model("llama")), tiny.batch([5, 9])
    before = lm(batch)
    other = copy.deepcopy(lm)
    with torch.no_grad():
        for weight in lm.hf.base_model.layers[-1].parameters():
            weight.zero_()
    assert torch.equal(other(batch), before)
    assert not torch.equal(lm(batch), before)
