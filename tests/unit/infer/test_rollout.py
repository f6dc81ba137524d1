"""Rollouts: the same answers alone and in groups, with the log-probs of the training path."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tiny
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.batch import Sample, collate
from minigpt.errors import ConfigError, ModelError
from minigpt.infer import rollout
from minigpt.infer.engine import Engine
from minigpt.infer.native import NativeDecoder
from minigpt.infer.rollout import SampledAnswer, sample_groups
from minigpt.model.cached import UNCACHED, TransformersDecoder
from minigpt.model.lora import Lora, add_adapter
from minigpt.model.packed_lm import PackedLM, forward_batch, target_logits, token_logprobs

PROMPTS = [[5, 9, 7], [8] * 21, [6, 5], [11, 12, 13, 14, 15]]
SEEDS = [[1, 2, 3, 4], [5, 6], [7], [8, 9, 10]]
TEMPERATURE = 0.7
LONGEST = 12
GAP = 1e-4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerFast:
    return tokenizers.load(tiny.tokenizer(tmp_path_factory.mktemp("rollout") / "tokenizer"))


def in_training(
    kind: str, tokenizer: PreTrainedTokenizerFast, **changes: Any
) -> tuple[PackedLM, Engine]:
    """A model in training, and an engine over it whose answers end at one token in eight."""
    model = tiny.model("qwen3" if kind == "adapter" else kind.split()[0], **changes)
    if kind == "adapter":
        add_adapter(model, Lora(r=4, alpha=16, dropout=0.5), "base")
        for name, weight in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(weight, std=0.2)
    lm = PackedLM(model).train()
    engine = Engine(model, tokenizer)
    engine.ends = set(range(0, tiny.VOCABULARY, 8))
    if kind.endswith(UNCACHED):
        engine.mode = UNCACHED
    return lm, engine


@torch.no_grad()
def trained_logprobs(lm: PackedLM, prompt: list[int], group: Sequence[SampledAnswer]) -> Tensor:
    """Return the log-probs of a group's tokens by the training path, over the temperature."""
    ids = np.array(prompt + [token for answer in group for token in answer.ids], np.uint16)
    lengths = tuple(len(answer.ids) for answer in group)
    batch = collate([Sample(ids, len(prompt), lengths, None, ("made up", 0))])
    lm.eval()
    if lm.linear_head is None:
        logits = target_logits(lm.hf, batch, lm.packed) / TEMPERATURE
        logprobs = token_logprobs(logits, batch.labels)
    else:  # whose logits are linear in the hidden states
        hidden = forward_batch(lm.hf.base_model, batch, lm.packed) / TEMPERATURE
        head = lm.hf.get_output_embeddings()
        logprobs = lm.linear_head.logprobs(head, hidden, batch)
    lm.train()
    return logprobs


def sample(engine: Engine, prompts: Any = PROMPTS, seeds: Any = SEEDS) -> list[list[SampledAnswer]]:
    return sample_groups(engine, prompts, seeds, TEMPERATURE, LONGEST)


def modes(model: PreTrainedModel) -> list[bool]:
    return [module.training for module in model.modules()]


@pytest.mark.parametrize("kind", ["qwen3", "adapter", "gpt2", f"gpt2 {UNCACHED}"])
def test_answers_of_a_group_are_those_sampled_alone_with_the_logprobs_of_training(
    kind: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    lm, engine = in_training(kind, tokenizer)
    attention = lm.hf.config._attn_implementation
    decoder = NativeDecoder if kind == "qwen3" else TransformersDecoder
    assert isinstance(engine.decoder(), decoder)
    read: list[list[int]] = []
    admit = decoder.admit

    def counted(self: Any, prompts: Any, counts: Any = None) -> Tensor:
        read.extend(prompts)
        return admit(self, prompts, counts)

    monkeypatch.setattr(decoder, "admit", counted)
    groups = sample(engine)
    assert read == PROMPTS  # each once
    assert all(modes(lm.hf))
    assert lm.hf.config._attn_implementation == attention
    for prompt, seeds, group in zip(PROMPTS, SEEDS, groups, strict=True):
        alone = [sample(engine, [prompt], [[seed]])[0][0] for seed in seeds]
        assert [answer.ids for answer in alone] == [answer.ids for answer in group]
        logprobs = torch.tensor([logprob for answer in group for logprob in answer.logprobs])
        gap = (logprobs - trained_logprobs(lm, prompt, group)).abs().max()
        assert float(gap) <= GAP
    answers = [answer for group in groups for answer in group]
    assert len({tuple(answer.ids) for answer in answers}) == len(answers)
    for answer in answers:
        ends = [token in engine.ends for token in answer.ids]
        assert ends == [False] * (len(ends) - 1) + [answer.ended]
        assert answer.ended or len(answer.ids) == LONGEST
    assert {answer.ended for answer in answers} == {True, False}


@pytest.mark.parametrize("kind", ["qwen3", "gpt2"])
def test_groups_wait_for_slots_and_do_not_change(
    kind: str, tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, engine = in_training(kind, tokenizer)
    together = sample(engine)
    monkeypatch.setattr(rollout, "SLOTS", {"cpu": 2})  # fewer than the largest group has
    assert [[a.ids for a in g] for g in sample(engine)] == [[a.ids for a in g] for g in together]
    assert sample(engine, [], []) == []
    assert sample(engine, PROMPTS[:2], [[], [5]])[0] == []


def test_weights_that_moved_are_sampled_from_in_the_precision_of_training(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    lm, engine = in_training("qwen3", tokenizer)
    before = sample(engine)
    with torch.no_grad():
        for weight in lm.parameters():
            weight.mul_(1.1)
    with torch.autocast("cpu", torch.bfloat16):
        groups = sample(engine)
    assert [[a.ids for a in g] for g in groups] != [[a.ids for a in g] for g in before]
    for prompt, group in zip(PROMPTS, groups, strict=True):
        logprobs = torch.tensor([logprob for answer in group for logprob in answer.logprobs])
        gap = (logprobs - trained_logprobs(lm, prompt, group)).abs()
        assert GAP < float(gap.max()) < 0.3


def test_answers_are_cut_to_the_context_and_a_prompt_must_leave_room(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    lm, engine = in_training("qwen3", tokenizer, max_position_embeddings=32)
    engine.ends = set()
    ((answer,),) = sample(engine, [[5] * 28], [[1]])
    assert (len(answer.ids), answer.ended) == (4, False)
    with pytest.raises(ConfigError, match="Prompt 2: The prompt has 32 tokens"):
        sample(engine, [[5], [5] * 32], [[1], [2]])
    with pytest.raises(ConfigError, match="temperature must be at least 0"):
        sample_groups(engine, [[5]], [[1]], -1.0, LONGEST)
    with torch.no_grad():
        next(lm.parameters()).fill_(torch.nan)
    with pytest.raises(ModelError, match="not finite"):
        sample(engine)
    assert all(modes(lm.hf))
