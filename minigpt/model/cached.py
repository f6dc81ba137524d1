"""The general way to decode: any causal LM's own forward with a transformers cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import DummyLayer, DynamicLayer, DynamicSlidingWindowLayer

from minigpt.model.rope import depends_on_length

KEYS = (DynamicLayer, DynamicSlidingWindowLayer, DummyLayer)  # of a cache, without other states
# How texts are continued together: prompts of any length padded in one cache; those of one length
# in a cache, with the model's own positions or with such as count from 0; or without a cache, the
# whole text computed for each token. The fastest comes first.
PADDED, ALIKE, NUMBERED, WHOLE = WAYS = "padded", "alike", "numbered", "whole"


@dataclass
class Cohort:
    """Requests that began together: padded on the left, in one cache.

    Attributes:
        rows: the requests' places among all.
        tokens: [n, L], all that was read and written; padding is 0.
        mask: [n, L], 0 where there is padding.
        cache: of the tokens read so far; None where the whole text is computed for each token.
    """

    rows: list[int]
    tokens: Tensor
    mask: Tensor
    cache: Any


class Cached:
    """Decodes requests with a model's own forward, each group that began together by itself.

    Args:
        model: any causal LM.
        way: one of `ways(model)`, which it is exact by.
    """

    joins = False

    def __init__(self, model: PreTrainedModel, way: str) -> None:
        self.model = model
        self.way = way
        self.cohorts: list[Cohort] = []
        self.count = 0
        taken = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._numbers = way in (PADDED, NUMBERED) and "position_ids" in taken
        self._cache_name = "" if way == WHOLE else _cache_name(model)

    def admit(self, prompts: Sequence[list[int]]) -> Tensor:
        """Read prompts into the next rows; return the logits [n, V] of their last tokens."""
        first, parts = len(self.cohorts), []
        groups: dict[int, list[int]] = {}
        for place, prompt in enumerate(prompts):
            groups.setdefault(0 if self.way == PADDED else len(prompt), []).append(place)
        for places in groups.values():
            cohort = self._cohort([prompts[place] for place in places], places)
            self.cohorts.append(cohort)
            parts.append(self._forward(cohort, cohort.tokens))
        self.count += len(prompts)
        return _in_order(parts, self.cohorts[first:])

    def _cohort(self, prompts: list[list[int]], places: list[int]) -> Cohort:
        longest, device = max(map(len, prompts)), self.model.device
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        return Cohort(
            [self.count + place for place in places],
            torch.tensor(tokens, device=device),
            torch.tensor(real, device=device),
            DynamicCache(config=self.model.config) if self.way != WHOLE else None,
        )

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each row; return the logits [n, V] that follow."""
        parts = []
        for cohort in self.cohorts:
            given = [[tokens[row]] for row in cohort.rows]
            new = torch.tensor(given, device=self.model.device)
            cohort.mask = torch.nn.functional.pad(cohort.mask, (0, 1), value=1)
            cohort.tokens = torch.cat([cohort.tokens, new], 1)
            parts.append(self._forward(cohort, new))
        return _in_order(parts, self.cohorts)

    def _forward(self, cohort: Cohort, new: Tensor) -> Tensor:
        """Return the logits [n, V] that follow the new tokens [n, L] of a cohort."""
        options: dict[str, Any] = dict(self._options)
        if self.way == WHOLE:
            new, options["use_cache"] = cohort.tokens, False
        else:
            options |= {self._cache_name: cohort.cache, "use_cache": True}
        if self.way == PADDED:  # else nothing is masked, and some take a mask for padding alone
            options["attention_mask"] = cohort.mask
        if self._numbers:
            places = (cohort.mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -new.shape[1] :]
        logits: Tensor = self.model(input_ids=new, **options).logits
        return logits[:, -1]

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        self.count -= 1
        cohort = next(c for c in self.cohorts if row in c.rows)
        kept = [place for place, own in enumerate(cohort.rows) if own != row]
        cohort.rows = [cohort.rows[place] for place in kept]
        if kept:
            index = torch.tensor(kept, device=cohort.mask.device)
            cohort.mask, cohort.tokens = cohort.mask[index], cohort.tokens[index]
            if cohort.cache is not None:
                cohort.cache.reorder_cache(index)  # which, unlike its selection, knows all states
        else:
            self.cohorts.remove(cohort)
        for other in self.cohorts:
            other.rows = [row if own == self.count else own for own in other.rows]


def _in_order(parts: list[Tensor], cohorts: list[Cohort]) -> Tensor:
    """Return logits [n, V] of cohorts in the order of their rows."""
    order = torch.tensor([row for cohort in cohorts for row in cohort.rows])
    return torch.cat(parts)[order.argsort()]


def ways(model: PreTrainedModel) -> list[str]:
    """Return the ways to decode that a model may be exact by, the fastest first.

    Layers with a state (convolutions, recurrences, linear attention) read padding as text, and
    angles that depend on a text's length are those of the longest row: neither is padded.
    """
    if not _cache_name(model):
        return [WHOLE]
    pads = _has_keys_alone(model) and not depends_on_length(model)
    return [way for way in WAYS if way != PADDED or pads]


def _cache_name(model: PreTrainedModel) -> str:
    """Return the argument that takes a transformers cache; empty where there is no such."""
    generates: Any = model
    if not generates._supports_default_dynamic_cache() or hasattr(model, "_setup_cache"):
        return ""  # one of its own, or in its layers, which is one for all rows
    taken = inspect.signature(model.forward).parameters
    return next((name for name in ("past_key_values", "cache_params") if name in taken), "")


def _has_keys_alone(model: PreTrainedModel) -> bool:
    """Whether a model's cache has keys and values and no other states."""
    return all(type(layer) in KEYS for layer in DynamicCache(config=model.config).layers)
