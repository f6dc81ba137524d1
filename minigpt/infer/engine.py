"""Complete prompts in batches with a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data import tokenizer as tokenizers
from minigpt.data.chat import ChatCodec
from minigpt.data.records import Message
from minigpt.errors import ConfigError, DataError
from minigpt.model.attention import attention_of
from minigpt.model.build import check_vocabulary
from minigpt.model.lora import load_adapter, merge
from minigpt.model.saved import ADAPTER, base_of, find_model, generation_config, load_model

BATCH = 128


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen.

    Args:
        max_new_tokens: length of the longest reply.
        temperature: 0 takes the likeliest token.
        top_k: choose among so many tokens; 0 for all.
        top_p: choose among the likeliest tokens that hold this share of the probability.
        seed: of the random choices.
    """

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1 or self.temperature < 0 or self.top_k < 0:
            raise ConfigError(
                "sampling: max_new_tokens must be at least 1, temperature and top_k at least 0."
            )
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"sampling: top_p must lie in (0, 1], but is {self.top_p}.")


@dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: what the model said.
        ids: the same as tokens.
        ended_by: the token that ended it; None when it was cut off at the longest length.
    """

    text: str
    ids: list[int]
    ended_by: int | None


class Engine:
    """A model with its tokenizer, ready to complete prompts.

    Args:
        model: any causal LM; only its attention function is changed, and put back.
        tokenizer: the model's own.

    Attributes:
        adapter: the handle of an adapter that is computed beside the weights.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.codec = ChatCodec(tokenizer) if tokenizer.chat_template else None
        self.adapter: PeftModel | None = None

    @classmethod
    def load(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        tokenizer: str | Path | None = None,
        merged: bool = True,
    ) -> Engine:
        """Load a model, or a base with an adapter.

        Args:
            model: run directory, HF directory or hub id; an adapter directory brings its base.
            adapter: LoRA directory to put on the model.
            tokenizer: by default the one saved with the model.
            merged: add the adapter to the weights, or compute it beside them.

        Raises:
            ModelError, TokenizerError: when something is missing or does not fit.
        """
        found = find_model(model)
        if adapter is None and isinstance(found, Path) and (found / ADAPTER).is_file():
            found, adapter = base_of(found), found
        base = load_model(found, "sdpa")
        adapted = load_adapter(base, Path(find_model(adapter))) if adapter is not None else None
        if adapted is not None and merged:
            base, adapted = merge(adapted), None
        engine = cls(base.eval(), tokenizers.load(tokenizer or find_model(adapter or model)))
        engine.adapter = adapted
        check_vocabulary(base, len(engine.tokenizer))
        return engine

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text to continue, or of a chat to answer.

        Raises:
            ConfigError: for a chat when the model has no chat template.
            DataError: for text that is not valid Unicode.
        """
        texts = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
        try:
            "".join(texts).encode()
        except UnicodeEncodeError:
            raise DataError(
                "the prompt holds a lone surrogate, half of a character",
                remedy="Give it as valid UTF-8.",
                reason="lone_surrogate",
            ) from None
        if isinstance(prompt, str):
            ids = self.tokenizer.backend_tokenizer.encode(prompt, add_special_tokens=False).ids
            return list(ids) or [tokenizers.document_end(self.tokenizer)]
        if self.codec is None:
            raise ConfigError("This model has no chat template: give a plain text prompt.")
        return self.codec.encode_prompt(prompt)

    @torch.no_grad()
    def complete(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling
    ) -> list[Reply]:
        """Complete prompts, in batches of like length; replies come in the order asked."""
        ids = [self.encode(prompt) for prompt in prompts]
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        replies: dict[int, Reply] = {}
        training = self.model.training
        self.model.eval()
        with attention_of(self.model, "sdpa"), torch.random.fork_rng(enabled=True):
            torch.manual_seed(sampling.seed)
            for start in range(0, len(order), BATCH):
                members = order[start : start + BATCH]
                out = self._generate([ids[i] for i in members], sampling)
                replies.update(zip(members, out, strict=True))
        self.model.train(training)
        return [replies[i] for i in range(len(ids))]

    def _generate(self, ids: list[list[int]], sampling: Sampling) -> list[Reply]:
        config = generation_config(self.tokenizer)
        config.max_new_tokens = sampling.max_new_tokens
        config.do_sample = sampling.temperature > 0
        if config.do_sample:
            config.temperature, config.top_p = sampling.temperature, sampling.top_p
            config.top_k = sampling.top_k
        longest = max(map(len, ids))
        shape = (len(ids), longest)
        tokens = torch.full(shape, int(config.pad_token_id))
        mask = torch.zeros(shape, dtype=torch.long)
        for row, prompt in enumerate(ids):  # padding on the left, so that all replies start level
            tokens[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        device = self.model.device
        out: Tensor = self.model.generate(  # type: ignore[operator]
            tokens.to(device), attention_mask=mask.to(device), generation_config=config
        )
        return [self._reply(row, config.eos_token_id) for row in out[:, longest:].tolist()]

    def _reply(self, ids: list[int], ends: list[int]) -> Reply:
        end = next((place for place, token in enumerate(ids) if token in ends), None)
        said = ids[:end]
        text = self.tokenizer.decode(said, skip_special_tokens=True)
        return Reply(str(text), said, None if end is None else ids[end])
