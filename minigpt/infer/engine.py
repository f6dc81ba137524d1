"""Complete prompts in batches with a trained model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Literal

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt import progress
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import Message
from minigpt.data.prompts import PromptCodec
from minigpt.errors import ConfigError, ModelError
from minigpt.infer.continuous_batch import ContinuousBatch, Delta, Finish, TokenLogprob
from minigpt.infer.native import FusedWeights, NativeDecoder, is_native
from minigpt.infer.sampling import Sampling
from minigpt.model.architecture import cast_weights, check_vocabulary, embedding_rows
from minigpt.model.cached import UNCACHED, TransformersDecoder
from minigpt.model.conformance import require_conformance
from minigpt.model.generation import reply_ends
from minigpt.model.lora import ADAPTER, load_adapter, merge
from minigpt.model.packed_lm import use_attention
from minigpt.model.pretrained import base_of, find_model, load_model, tokenizer_source
from minigpt.model.rope import max_positions
from minigpt.reading import refusing

log = logging.getLogger(__name__)

__all__ = ["Delta", "Engine", "Reply", "Sampling", "TokenLogprob"]

SLOTS = {"cpu": 32, "cuda": 128}  # requests that `complete` decodes at once

Precision = Literal["fp32", "bf16", "int8"]


@dataclass(frozen=True)
class Reply:
    """A completion.

    Attributes:
        text: the text, without a stop text.
        ids: the tokens, with those of a stop text.
        ended_by: the token that ended it; None when a stop text did, or it was cut off.
        finish: "stop", or "length" when it was cut off.
        logprobs: log-probabilities of the tokens of the text, if they were asked for.
    """

    text: str
    ids: list[int]
    ended_by: int | None
    finish: Finish = "length"
    logprobs: list[TokenLogprob] | None = None


class Engine:
    """A model with its tokenizer, ready to complete prompts.

    Args:
        model: any causal LM; only its attention function is changed, and restored.
        tokenizer: the one that belongs to the model.
        int8: decode with int8 weights.

    Attributes:
        adapter: the adapter, if it is computed beside the weights.
        attention: attention function with which a model of this kind is exact.
        mode: decoding mode with which it is exact, one of `cached.MODES`.
        ends: the tokens that end a reply.
        start: the tokens that the tokenizer writes before a text, such as BOS; often none.
        rows: of the embedding: token ids are below it.
        context: the longest sequence in tokens: what the model takes, unless it is set lower.

    Raises:
        ConfigError: when int8 weights are asked for and the model cannot have them.
        ModelError: when models of its kind cannot be computed exactly.
    """

    def __init__(
        self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, int8: bool = False
    ) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.int8 = int8
        self._prompts = PromptCodec(tokenizer)
        self.codec = self._prompts.chats
        self.adapter: PeftModel | None = None
        conformance = require_conformance(model, training=False)
        self.attention = conformance.decoding
        self.mode = conformance.decoding_mode
        if self.mode == UNCACHED and not is_native(model):
            log.warning(
                "%s is not exact with a cache: all of the text is computed for each new token, "
                "which takes more time.",
                type(model).__name__,
            )
        self.ends = set(reply_ends(model, tokenizer))
        self.start = self._prompts.start
        self.context = max_positions(model.config)
        self.rows = embedding_rows(model)
        self._fused: tuple[object, FusedWeights] | None = None  # with the state they were made of
        if int8 and (model.device.type != "cpu" or not is_native(model)):
            raise ConfigError(
                "int8 weights are for Qwen3 and Llama models on a CPU, without an adapter beside "
                "them. Leave --weights out."
            )

    @classmethod
    def load(
        cls,
        model: str | Path,
        adapter: str | Path | None = None,
        tokenizer: str | Path | None = None,
        merged: bool = True,
        weights: Precision = "fp32",
        device: str | None = None,
    ) -> Engine:
        """Load a model, or a base with an adapter.

        Args:
            model: run directory, HF directory or hub id; an adapter directory brings its base.
            adapter: LoRA directory to put on the model.
            tokenizer: by default the one saved with the model.
            merged: add the adapter to the weights, or compute it beside them.
            weights: precision of the weights.
            device: by default the GPU where there is one, or else the CPU.

        Raises:
            ModelError, TokenizerError: when something is missing or does not fit.
            ConfigError: when the model cannot have such weights.
        """
        with refusing(f"The model at {model}", ModelError, seconds=inf, verb="cannot be used"):
            source = find_model(model)
            if adapter is None and isinstance(source, Path) and (source / ADAPTER).is_file():
                adapter = source
                source = base_of(source)
            base = load_model(source, "sdpa")
            adapted = None
            if adapter is not None:
                adapted = load_adapter(base, Path(find_model(adapter)), source)
            if adapted is not None and merged:
                base, adapted = merge(adapted), None
            cast_weights(base, torch.bfloat16 if weights == "bf16" else torch.float32)
            device = device or ("cuda" if torch.cuda.is_available() else "cpu")
            base.to(device)  # type: ignore[arg-type]
            loaded = tokenizers.load(tokenizer or tokenizer_source(adapter or model, source))
            check_vocabulary(embedding_rows(base), loaded)
            engine = cls(base.eval(), loaded, weights == "int8")
            engine.adapter = adapted
            return engine

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text to continue, or of a chat to answer.

        Raises:
            ConfigError: for a chat when the model has no chat template.
            DataError: for text that is not valid Unicode, or holds a token that the model cannot
                embed, and for a chat that the template refuses or makes nothing of.
        """
        ids = self._prompts.encode(prompt)
        tokenizers.check_ids(self.tokenizer, ids, self.rows)
        return ids

    def decoder(self) -> NativeDecoder | TransformersDecoder:
        """Return the decoder of a batch, over the current weights."""
        if not is_native(self.model):
            return TransformersDecoder(self.model, self.mode)
        device = self.model.device.type
        dtype = self.model.dtype
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
        state = (dtype, *((p.data_ptr(), p._version) for p in self.model.parameters()))
        if self._fused is None or self._fused[0] != state:
            self._fused = (state, FusedWeights(self.model, dtype, self.int8))
        return NativeDecoder(self._fused[1])

    def complete(
        self, prompts: Sequence[str | Sequence[Message]], sampling: Sampling | Sequence[Sampling]
    ) -> list[Reply]:
        """Complete prompts together; replies come in the order asked.

        Args:
            prompts: texts to continue, or chats to answer.
            sampling: for all of them, or one for each. Each prompt has its own random generator,
                so its reply does not depend on the others.

        Raises:
            ConfigError: for a prompt that fills the model's context.
            ModelError: when the model's logits are not finite.
        """
        return list(self.replies(prompts, sampling, len(prompts)))

    def replies(
        self,
        prompts: Sequence[str | Sequence[Message]],
        sampling: Sampling | Sequence[Sampling],
        sort_within: int = 0,
    ) -> Iterator[Reply]:
        """Complete prompts as `complete` does; yield each reply after those before it.

        Args:
            prompts, sampling: as of `complete`.
            sort_within: prompts are taken in blocks of so many, the shortest of a block first; by
                default as many as are decoded at once.
        """
        ids = [self.encode(prompt) for prompt in prompts]
        samplings = [sampling] * len(ids) if isinstance(sampling, Sampling) else list(sampling)
        with self.generating():
            yield from self._replies(ids, samplings, sort_within)

    @contextmanager
    def generating(self) -> Iterator[None]:
        """Set the model to eval mode and to attention for decoding, and back in the end."""
        training = self.model.training
        self.model.eval()
        try:
            with use_attention(self.model, self.attention):
                yield
        finally:
            self.model.train(training)

    def _replies(
        self, ids: list[list[int]], samplings: list[Sampling], sort_within: int
    ) -> Iterator[Reply]:
        slots = SLOTS.get(self.model.device.type, SLOTS["cpu"])
        sort_within = sort_within or slots
        batch = ContinuousBatch(self, slots)
        order = sorted(range(len(ids)), key=lambda i: (i // sort_within, len(ids[i])))
        prompt_of: dict[int, int] = {}  # request number -> index of its prompt
        for i in order:
            name = f"Prompt {i + 1}: " if len(ids) > 1 else ""
            number = batch.add(ids[i], samplings[i], name)
            prompt_of[number] = i
        deltas: list[list[Delta]] = [[] for _ in ids]
        finished = yielded = 0
        while not batch.idle:
            for delta in checked(batch.step()):
                deltas[prompt_of[delta.request]].append(delta)
                finished += delta.finish is not None
            progress.report(finished, len(ids))
            while yielded < len(ids) and deltas[yielded] and deltas[yielded][-1].finish is not None:
                yield _reply(deltas[yielded], samplings[yielded])
                deltas[yielded] = []
                yielded += 1

    def stream(self, prompt: str | Sequence[Message], sampling: Sampling) -> Iterator[Delta]:
        """Complete one prompt and yield the reply token by token."""
        batch = ContinuousBatch(self, 1)
        batch.add(self.encode(prompt), sampling)
        while not batch.idle:
            yield from checked(batch.step())


def checked(deltas: list[Delta]) -> list[Delta]:
    """Return deltas; raise a ModelError where one of the replies cannot go on."""
    if errors := [delta.error for delta in deltas if delta.error]:
        raise ModelError(errors[0])
    return deltas


def _reply(deltas: list[Delta], sampling: Sampling) -> Reply:
    last = deltas[-1]
    assert last.finish is not None
    logprobs = [logprob for delta in deltas for logprob in delta.logprobs]
    return Reply(
        "".join(delta.text for delta in deltas),
        [token for delta in deltas for token in delta.ids],
        last.ended_by,
        last.finish,
        None if sampling.logprobs is None else logprobs,
    )
