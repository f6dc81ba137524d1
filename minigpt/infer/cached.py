"""The general way to decode: any causal LM's own forward with a transformers cache."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


@dataclass
class Cohort:
    """Requests that began together: padded on the left, in one cache.

    Attributes:
        rows: the requests' places among all.
        mask: [n, L], 0 where there is padding.
    """

    rows: list[int]
    mask: Tensor
    cache: Any


class Cached:
    """Decodes requests with a model's own forward, each group that began together by itself.

    Args:
        model: any causal LM.
    """

    joins = False

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model
        self.cohorts: list[Cohort] = []
        self.count = 0
        taken = inspect.signature(model.forward).parameters
        self._options = {"logits_to_keep": 1} if "logits_to_keep" in taken else {}
        self._places = "position_ids" in taken

    def admit(self, prompts: Sequence[list[int]]) -> Tensor:
        """Read prompts into the next rows; return the logits [n, V] of their last tokens."""
        longest = max(map(len, prompts))
        tokens = [[0] * (longest - len(prompt)) + prompt for prompt in prompts]
        real = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
        mask = torch.tensor(real, device=self.model.device)
        rows = list(range(self.count, self.count + len(prompts)))
        cohort = Cohort(rows, mask, DynamicCache(config=self.model.config))
        self.cohorts.append(cohort)
        self.count += len(prompts)
        return self._forward(cohort, tokens)

    def step(self, tokens: Sequence[int]) -> Tensor:
        """Add a token to each row; return the logits [n, V] that follow."""
        parts = []
        for cohort in self.cohorts:
            cohort.mask = torch.nn.functional.pad(cohort.mask, (0, 1), value=1)
            parts.append(self._forward(cohort, [[tokens[row]] for row in cohort.rows]))
        order = torch.tensor([row for cohort in self.cohorts for row in cohort.rows])
        return torch.cat(parts)[order.argsort()]

    def _forward(self, cohort: Cohort, tokens: list[list[int]]) -> Tensor:
        options: dict[str, Any] = dict(self._options)
        if self._places:
            places = (cohort.mask.cumsum(-1) - 1).clamp(min=0)
            options["position_ids"] = places[:, -len(tokens[0]) :]
        out = self.model(
            input_ids=torch.tensor(tokens, device=self.model.device),
            attention_mask=cohort.mask,
            past_key_values=cohort.cache,
            use_cache=True,
            **options,
        )
        logits: Tensor = out.logits[:, -1]
        return logits

    def drop(self, row: int) -> None:
        """Forget a row; the last one takes its place."""
        self.count -= 1
        cohort = next(c for c in self.cohorts if row in c.rows)
        kept = [place for place, own in enumerate(cohort.rows) if own != row]
        cohort.rows = [cohort.rows[place] for place in kept]
        if kept:
            cohort.mask = cohort.mask[kept]
            cohort.cache.batch_select_indices(torch.tensor(kept, device=cohort.mask.device))
        else:
            self.cohorts.remove(cohort)
        for other in self.cohorts:
            other.rows = [row if own == self.count else own for own in other.rows]
