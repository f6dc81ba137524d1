"""Decoding for any causal LM: its own forward with a transformers cache.

Shape legend: n requests of a cohort, L tokens, V vocabulary.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from minigpt.model.rope import depends_on_length

# Layers of a cache that hold keys and values, and no other states.
KEY_VALUE_LAYERS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)
# How texts are continued together: prompts of any length padded in one cache; those of one length
# in a cache, with the model's own positions or with explicit ones that count from 0; or without a
# cache, all of the text computed for each token. The fastest comes first.
PADDED = "padded"
SAME_LENGTH = "same_length"
EXPLICIT_POSITIONS = "explicit_positions"
UNCACHED = "uncached"
MODES = (PADDED, SAME_LENGTH, EXPLICIT_POSITIONS, UNCACHED)


@dataclass
class Cohort:
    """Requests that began together: padded on the left, in one cache.

    Attributes:
        rows: the requests' numbers among all.
        tokens: [n, L], all that was read and written; padding is 0.
        mask: [n, L], 0 where there is padding.
        cache: of the tokens read so far; None where all of the text is computed for each token.
    """

    rows: list[int]
    tokens: Tensor
    mask: Tensor
    cache: DynamicCache | None

    def select(self, indices: list[int], rows: list[int]) -> None:
        """Keep the requests at some indices, which may repeat, under new numbers among all."""
        if indices != list(range(len(self.rows))):
            index = torch.tensor(indices, device=self.mask.device)
            self.mask, self.tokens = self.mask[index], self.tokens[index]
            if self.cache is not None:
                # Unlike its selection of rows, this covers all kinds of states.
                self.cache.reorder_cache(index)  # type: ignore[arg-type]
        self.rows = rows


class TransformersDecoder:
    """Decodes requests with a model's own forward, each group that began together by itself.

    Args:
        model: any causal LM.
        mode: one of `decoding_modes(model)`, in which it is exact.
    """

    joins = False  # a new request is decoded apart from the active ones

    def __init__(self, model: PreTrainedModel, mode: str) -> None:
        self.model = model
        self.mode = mode
        self.cohorts: list[Cohort] = []
        self.count = 0  # of rows
        parameters = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in parameters else {}
        explicit = mode in (PADDED, EXPLICIT_POSITIONS)
        self._passes_positions = explicit and "position_ids" in parameters
        self._cache_name = "" if mode == UNCACHED else _cache_name(model)

    def admit(self, prompts: Sequence[list[int]], counts: Sequence[int] | None = None) -> Tensor:
        """Read prompts into the next rows; return the logits [n, V] of their last tokens.

        Args:
            prompts: each is computed once.
            counts: how many rows each gets, one after the other; by default one.
        """
        counts = [1] * len(prompts) if counts is None else counts
        borders = list(accumulate(counts, initial=self.count))
        rows = [range(start, end) for start, end in pairwise(borders)]  # of each prompt
        cohorts = []
        logits = []
        groups: dict[int, list[int]] = {}  # indices of the prompts of each cohort
        for index, prompt in enumerate(prompts):
            groups.setdefault(0 if self.mode == PADDED else len(prompt), []).append(index)
        for members in groups.values():
            cohort = self._new_cohort([prompts[i] for i in members])
            prompt_logits = self._forward(cohort, cohort.tokens)
            repeated = [index for index, i in enumerate(members) for _ in rows[i]]
            cohort.select(repeated, [row for i in members for row in rows[i]])
            cohorts.append(cohort)
            logits.append(prompt_logits[repeated])
        self.cohorts += cohorts
        self.count = borders[-1]
        return _in_order(logits, cohorts)

    def _new_cohort(self, prompts: list[list[int]]) -> Cohort:
        longest, device = max(map(len, prompts)), self.model.device
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return Cohort(
            list(range(len(prompts))),
            torch.tensor(tokens, device=device),
            torch.tensor(mask, device=device),
            DynamicCache(config=self.model.config) if self.mode != UNCACHED else None,
        )

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each row; return the logits [n, V] that follow."""
        logits = []
        for cohort in self.cohorts:
            new = torch.tensor([[tokens[row]] for row in cohort.rows], device=self.model.device)
            cohort.mask = torch.nn.functional.pad(cohort.mask, (0, 1), value=1)
            cohort.tokens = torch.cat([cohort.tokens, new], 1)
            logits.append(self._forward(cohort, new))
        return _in_order(logits, self.cohorts)

    def _forward(self, cohort: Cohort, new: Tensor) -> Tensor:
        """Return the logits [n, V] that follow the new tokens [n, L] of a cohort."""
        options: dict[str, Any] = dict(self._options)
        if self.mode == UNCACHED:
            new, options["use_cache"] = cohort.tokens, False
        else:
            options |= {self._cache_name: cohort.cache, "use_cache": True}
        if self.mode == PADDED:  # some models take any mask, also of ones, for padding
            options["attention_mask"] = cohort.mask
        if self._passes_positions:
            positions = (cohort.mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = positions[:, -new.shape[1] :]
        logits: Tensor = self.model(input_ids=new, **options).logits
        return logits[:, -1]

    def drop(self, row: int) -> None:
        """Remove a row; the last one takes its number."""
        self.count -= 1
        cohort = next(c for c in self.cohorts if row in c.rows)
        remaining = [index for index, number in enumerate(cohort.rows) if number != row]
        if remaining:
            cohort.select(remaining, [cohort.rows[index] for index in remaining])
        else:
            self.cohorts.remove(cohort)
        last = self.count
        for cohort in self.cohorts:
            cohort.rows = [row if number == last else number for number in cohort.rows]


def _in_order(logits: list[Tensor], cohorts: list[Cohort]) -> Tensor:
    """Return logits [n, V] of cohorts in the order of their rows."""
    order = torch.tensor([row for cohort in cohorts for row in cohort.rows])
    return torch.cat(logits)[order.argsort()]


def decoding_modes(model: PreTrainedModel) -> list[str]:
    """Return the modes of decoding in which a model may be exact, the fastest first.

    Layers with a state (convolutions, recurrences, linear attention) read padding as text, and
    angles that depend on a text's length are those of the longest row: neither is padded.
    """
    if not _cache_name(model):
        return [UNCACHED]
    pads = _has_keys_alone(model) and not depends_on_length(model)
    return [mode for mode in MODES if mode != PADDED or pads]


def _cache_name(model: PreTrainedModel) -> str:
    """Return the argument that takes a transformers cache; empty where there is none."""
    has_cache: bool = model._supports_default_dynamic_cache()  # type: ignore[operator]
    if not has_cache or hasattr(model, "_setup_cache"):
        return ""  # a cache of another class, or one in the layers, which all cohorts would share
    parameters = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in parameters), "")


def _has_keys_alone(model: PreTrainedModel) -> bool:
    """Whether a model's cache has keys and values and no other states."""
    return all(
        type(layer) in KEY_VALUE_LAYERS for layer in DynamicCache(config=model.config).layers
    )
