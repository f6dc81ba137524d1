"""Where a run's model and tokenizer come from, and how they are prepared for training."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import cached_property
from math import inf
from pathlib import Path

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import install_template
from minigpt.errors import ConfigError, ModelError, TokenizerError
from minigpt.model.architecture import (
    Architecture,
    build_native,
    check_same_tokens,
    check_sizes,
    check_vocabulary,
    embedding_rows,
    fit_vocabulary,
    native_config,
)
from minigpt.model.conformance import check_kind
from minigpt.model.lora import ADAPTER
from minigpt.model.pretrained import find_model, load_config, load_model, tokenizer_source
from minigpt.model.rope import RopeScaling, check_length, max_positions, scale_config, scale_rope
from minigpt.model.score_head import choose_padding, reward_model_class, with_score_head
from minigpt.reading import refusing

log = logging.getLogger(__name__)


def _refusing_sizes() -> AbstractContextManager[None]:
    """Turn an error while a model is built, such as of memory, into a ConfigError."""
    return refusing(
        "A model of this architecture", ConfigError, "Give other sizes.", inf, "cannot be built"
    )


@dataclass
class ModelSource:
    """A model to start from, with its tokenizer.

    Args:
        init_from: run directory, HF directory or hub id; None for random weights.
        tokenizer_path: directory or hub id of the tokenizer; by default the model's own.
        chat_template: file of a Jinja template, or the name of one of the tokenizer's templates;
            by default the tokenizer's own, or MiniGPT's.
        rope_scaling: lets rotary positions reach beyond the length that the model was trained on.
        architecture: sizes of a native model with random weights, for stages that may begin with
            one.
        chat: whether the tokenizer needs a chat template.
        scores: whether the model is to be a reward model: a causal LM gets a new score head.

    Raises:
        ConfigError: when neither a model nor sizes and a tokenizer are given.
    """

    init_from: str | None = None
    tokenizer_path: str | None = None
    chat_template: str | None = None
    rope_scaling: RopeScaling | None = None
    architecture: Architecture | None = None
    chat: bool = True
    scores: bool = False

    def __post_init__(self) -> None:
        if self.init_from is not None:
            return
        if self.architecture is None:
            raise ConfigError(
                "Set model.init_args.init_from to the model to start from, such as "
                "outputs/pretrain."
            )
        if self.tokenizer_path is None:
            raise ConfigError(
                "Set model.init_args.tokenizer to a tokenizer directory, or init_from to a model."
            )

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that travels with the model, with a chat template where needed.

        Raises:
            ModelError: when it is missing, or not the one that the model was trained with.
        """
        location = self.tokenizer_path
        if location is None:
            assert self.init_from is not None
            location = str(tokenizer_source(self.init_from))
        tokenizer = tokenizers.load(location, self.chat_template)
        if self.tokenizer_path and self.init_from:
            check_same_tokens(tokenizer, find_model(self.init_from))
        self._ids_before_template = tokenizers.id_count(tokenizer)
        if self.chat:
            with refusing(f"The tokenizer at {location}", TokenizerError, verb="cannot be used"):
                install_template(tokenizer)
        if self.scores:
            choose_padding(tokenizer)
        return tokenizer

    def _template_adds_tokens(self) -> bool:
        return tokenizers.id_count(self.tokenizer) > self._ids_before_template

    def config(self) -> PreTrainedConfig:
        """Return the config of the model, before its rotary positions are scaled.

        Raises:
            ConfigError: when sizes are given that the model of `init_from` does not have.
            ModelError: when its kind cannot be computed exactly, or be made a reward model.
        """
        if self.init_from is None:
            assert self.architecture is not None
            with _refusing_sizes():
                return native_config(self.architecture, self.tokenizer)
        config = load_config(self.init_from)
        check_kind(config, training=True)
        if self.architecture is not None:
            check_sizes(self.architecture, config)
        if self.scores:
            reward_model_class(config)  # raises where there is none
        return config

    def build(self) -> PreTrainedModel:
        """Return the model, on the CPU in fp32.

        Raises:
            ModelError: when it cannot be loaded, or its vocabulary is not the tokenizer's.
        """
        if self.init_from is None:
            assert self.architecture is not None
            with _refusing_sizes():
                model = build_native(self.architecture, self.tokenizer)
        else:
            model = load_model(self.init_from, scores=self.scores)
            with refusing(f"The model at {self.init_from}", ModelError, verb="cannot be used"):
                check_vocabulary(embedding_rows(model), self.tokenizer)
                if self._template_adds_tokens():
                    fit_vocabulary(model, self.tokenizer)
        if self.rope_scaling is not None:
            scale_rope(model, self.rope_scaling)
            self.tokenizer.model_max_length = max_positions(model.config)
        if self.scores:
            model = with_score_head(model)
            model.config.get_text_config().pad_token_id = self.tokenizer.pad_token_id
        return model

    def embedding_rows(self) -> int:
        """Return how many token ids the model embeds when training begins.

        Raises:
            ModelError: when the tokenizer is another model's.
        """
        rows = int(self.config().get_text_config(decoder=True).vocab_size)
        check_vocabulary(rows, self.tokenizer)
        # An adapter brings rows for tokens that its run added; the config is that of its base.
        grows = self._template_adds_tokens() or self._is_adapter()
        return max(rows, tokenizers.id_count(self.tokenizer)) if grows else rows

    def _is_adapter(self) -> bool:
        if self.init_from is None:
            return False
        model = find_model(self.init_from)
        return isinstance(model, Path) and (model / ADAPTER).is_file()

    def check_length(self, length: int, shares_prompts: bool) -> None:
        """Refuse a `max_length` beyond what the model reads; see `rope.check_length`.

        Raises:
            ConfigError: with the limit.
        """
        config = self.config()
        if self.rope_scaling is not None:
            scale_config(config, self.rope_scaling)
        check_length(config, length, shares_prompts)

    @property
    def name(self) -> str:
        """The model as an adapter's config names its base: an absolute path, or a hub id."""
        assert self.init_from is not None
        model = find_model(self.init_from)
        return str(model.resolve()) if isinstance(model, Path) else model
