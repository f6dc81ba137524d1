"""Reward models: a causal LM's body with a head that gives a sequence one score at its last token.

They are transformers' `...ForSequenceClassification` with one label, saved and loaded as such.
"""

from __future__ import annotations

from dataclasses import replace
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from transformers import (
    MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from minigpt.data.batch import PackedBatch
from minigpt.data.chat import turn_end
from minigpt.errors import ModelError, TokenizerError
from minigpt.model.packed_lm import PackedLM, forward_batch

CLASS = "ForSequenceClassification"  # the end of these classes' names
TASK = "SEQ_CLS"  # the task type in peft's configs of their adapters


class PackedReward(PackedLM):
    """A reward model that takes packed batches, made with `collate(..., read_last=True)`."""

    predicts_tokens: ClassVar[bool] = False

    def forward(  # type: ignore[override]  # without the arguments about targets
        self, batch: PackedBatch, per_answer: bool = True
    ) -> Tensor:
        """Return each answer's score [A] in fp32, or their sum []."""
        ends = batch.answer_ends
        at_ends = replace(batch, plan=replace(batch.plan, predict_at=ends))
        hidden = forward_batch(self.hf.base_model, at_ends, self.packed)
        head = cast(nn.Module, self.hf.score)
        scores: Tensor = head(hidden.index_select(0, ends)).squeeze(-1).float()
        return scores if per_answer else scores.sum()


def is_reward_model(config: PreTrainedConfig) -> bool:
    """Whether a config is that of a model which gives sequences scores instead of text."""
    return any(name.endswith(CLASS) for name in config.architectures or ())


def reward_model_class(config: PreTrainedConfig) -> type[PreTrainedModel]:
    """Return the class of reward models of a causal LM's config.

    Raises:
        ModelError: when transformers has none.
    """
    config_class = type(config)
    if config_class not in MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING:
        raise _unsuitable(config, f"has no ...{CLASS} for it")
    return cast(type[PreTrainedModel], MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING[config_class])


def _unsuitable(config: PreTrainedConfig, problem: str) -> ModelError:
    name = f"The model at {config._name_or_path}" if config._name_or_path else "The model"
    return ModelError(
        f"{name} cannot become a reward model: transformers {problem} (family "
        f"{config.model_type}). Start from another family, such as Qwen3, Llama, Gemma or GPT-2; "
        "a reward model need not be of the family of the model that it judges, only of its "
        "tokenizer."
    )


def with_score_head(model: PreTrainedModel) -> PreTrainedModel:
    """Return a causal LM's body with a new score head; a model that has one stays as it is.

    The head is drawn from the default generator, with the config's standard deviation.

    Args:
        model: its body and config become those of the result.

    Raises:
        ModelError: when models of its family have no such class, or one that computes otherwise.
    """
    if has_score_head(model):
        return model
    config = model.config
    scorer_class = reward_model_class(config)
    config.num_labels = 1
    with torch.device("meta"):  # the body's weights come from the model
        scorer = scorer_class(config)
    head = getattr(scorer, "score", None)
    if type(scorer.base_model) is not type(model.base_model) or not isinstance(head, nn.Linear):
        raise _unsuitable(config, f"reads sequences otherwise in {scorer_class.__name__}")
    setattr(scorer, scorer.base_model_prefix, model.base_model)
    scorer.score = nn.Linear(head.in_features, 1, bias=head.bias is not None)
    std = float(getattr(config, "initializer_range", None) or 0.02)
    nn.init.normal_(scorer.score.weight, std=std)
    if scorer.score.bias is not None:
        nn.init.zeros_(scorer.score.bias)
    for name in ("resized", "rope_scaling"):  # by which an adapter is saved, see `save_adapter`
        if hasattr(model, name):
            setattr(scorer, name, getattr(model, name))
    scorer.train(model.training)
    return scorer


def has_score_head(model: PreTrainedModel) -> bool:
    """Whether a model gives sequences scores instead of text."""
    return type(model).__name__.endswith(CLASS)


def choose_padding(tokenizer: PreTrainedTokenizerFast) -> None:
    """Set a pad token that ends no answer.

    transformers reads a score at the last token that is not padding.

    Raises:
        TokenizerError: when there is none.
    """
    end = turn_end(tokenizer) or tokenizer.eos_token
    names = (tokenizer.pad_token, tokenizer.unk_token, tokenizer.bos_token)
    pads = [name for name in (*names, *tokenizer.all_special_tokens) if name and name != end]
    if not pads:
        raise TokenizerError(
            f"The tokenizer's only special token is {end}, which ends answers: transformers reads "
            "a score at the last token that is not padding, so a reward model needs another one "
            "for it. Give the tokenizer a pad_token of its own."
        )
    tokenizer.pad_token = pads[0]
