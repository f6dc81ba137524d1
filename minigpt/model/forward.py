"""How a causal LM reads a packed batch: all samples at once, or each in a row of its own.

Shape legend:
    T  tokens of the batch, N targets, H hidden size, V vocabulary
    R  rows of a group of the plan, L its longest row
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minigpt.data.batch import PackedBatch


def hidden_states(hf: PreTrainedModel, batch: PackedBatch, packed: bool) -> Tensor:
    """Return the last hidden states of the tokens, [T, H].

    Args:
        hf: a model with a body of its own.
        batch: what to read; a last layer that ends early gives the targets' alone, [N, H].
        packed: give the samples as one row with the plan of their attention. Otherwise rows of
            like length are read together, filled up at their ends, where a causal model's real
            tokens do not see it.
    """
    body: Any = hf.base_model
    if packed:
        out: Tensor = body(**_packed_inputs(batch)).last_hidden_state
        return out.squeeze(0)
    return _by_rows(body, batch)


def logits(hf: PreTrainedModel, batch: PackedBatch, packed: bool) -> Tensor:
    """Return the logits [N, V] that predict the targets; arguments as for `hidden_states`."""
    if not packed:
        return _by_rows(hf, batch).index_select(0, batch.predict_at)
    options: dict[str, Any] = {}
    if "logits_to_keep" in inspect.signature(hf.forward).parameters:
        options["logits_to_keep"] = batch.predict_at
    out: Tensor = hf(**_packed_inputs(batch), **options)[0].squeeze(0)
    return out if options else out.index_select(0, batch.predict_at)


def _packed_inputs(batch: PackedBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.input_ids[None],
        "position_ids": batch.position_ids[None],
        "plan": batch.plan,
        "use_cache": False,  # a cache would be built in every step, and retain the graph
    }


def _by_rows(part: nn.Module, batch: PackedBatch) -> Tensor:
    """Return a part's first output for each token, [T, ·]."""
    outs = [plain(part, batch.input_ids[rows]).flatten(0, 1) for rows in batch.plan.gather]
    return torch.cat(outs).index_select(0, batch.plan.scatter)


def plain(part: nn.Module, ids: Tensor) -> Tensor:
    """Return the first output [R, L, ·] of a model or its body for rows of ids [R, L].

    Positions and masks are the model's own.
    """
    taken = inspect.signature(part.forward).parameters
    options = {"use_cache": False} if "use_cache" in taken or "kwargs" in taken else {}
    out: Tensor = part(input_ids=ids, **options)[0]
    return out
