"""PackedLM: a causal LM that takes packed batches and returns losses or log-probs.

It is one module so that everything a step computes happens inside its forward, where DDP
and FSDP2 have the parameters at hand.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from minigpt.data.batch import PackedBatch
from minigpt.model.attention import PACKED, dtype_of
from minigpt.model.losses import (
    Softmax,
    linear_cross_entropy,
    linear_logprobs,
    softmax,
    sum_by,
)

log = logging.getLogger(__name__)

TOLERANCE = 1e-3  # of logits in fp32, relative to their size


class PackedLM(nn.Module):
    """Wraps a transformers causal LM for training on packed batches.

    Args:
        hf: the model; its attention becomes the packed one.

    Attributes:
        softmax: of the head's logits; compiled with the layers.
        plain_head: True when the model's logits are not hidden @ weight + bias (soft caps,
            scaling), so that its own forward computes them.
    """

    def __init__(self, hf: PreTrainedModel) -> None:
        super().__init__()
        self.hf = hf
        hf.config._attn_implementation = PACKED
        self.softmax: Softmax = softmax
        hf.get_input_embeddings().register_forward_hook(_narrow_on_gpu)
        self.plain_head = not head_is_linear(hf)
        if self.plain_head:
            log.warning(
                "%s changes its logits after the head: they are computed whole, which takes "
                "more memory.",
                type(hf).__name__,
            )

    def forward(self, batch: PackedBatch, per_answer: bool = False) -> Tensor:
        """Return the summed cross-entropy [] or each answer's summed log-prob [A], in nats."""
        if self.plain_head:
            logp = self._plain_logprobs(batch)
            return sum_by(logp, batch.answers, batch.n_answers) if per_answer else -logp.sum()
        hidden = self.hf.base_model(**self._inputs(batch)).last_hidden_state.squeeze(0)
        head: Any = self.hf.get_output_embeddings()
        targets = hidden.index_select(0, batch.predict_at)
        if not per_answer:
            return linear_cross_entropy(targets, head.weight, head.bias, batch.labels, self.softmax)
        logp = linear_logprobs(targets, head.weight, head.bias, batch.labels, self.softmax)
        return sum_by(logp, batch.answers, batch.n_answers)

    def _plain_logprobs(self, batch: PackedBatch) -> Tensor:
        out = self.hf(**self._inputs(batch), logits_to_keep=batch.predict_at)
        logp: Tensor = out.logits[0].float().log_softmax(-1)
        return logp.gather(1, batch.labels[:, None]).squeeze(1)

    def _inputs(self, batch: PackedBatch) -> dict[str, object]:
        return {
            "input_ids": batch.input_ids[None],
            "position_ids": batch.position_ids[None],
            "plan": batch.plan,
            "use_cache": False,  # a cache would be built in every step, and retain the graph
        }


def _narrow_on_gpu(module: nn.Module, inputs: Any, out: Tensor) -> Tensor:
    """Let what layers add to be bf16 where products are: autocast leaves embeddings wide, which
    takes a GPU time to move. A CPU gains nothing.
    """
    return out.to(torch.bfloat16) if out.is_cuda and dtype_of(out) == torch.bfloat16 else out


@torch.no_grad()
def head_is_linear(hf: PreTrainedModel) -> bool:
    """Whether the model's logits are exactly its head applied to the last hidden states."""
    head = hf.get_output_embeddings()
    if not isinstance(head, nn.Linear):
        return False
    if getattr(hf.config, "final_logit_softcapping", None):  # hardly seen while logits are small
        return False
    training, before = hf.training, hf.config._attn_implementation
    hf.config._attn_implementation = "sdpa"
    hf.eval()
    try:
        ids = torch.arange(min(8, hf.config.vocab_size), device=head.weight.device)[None]
        out = hf(input_ids=ids, use_cache=False)
        ours = head(hf.base_model(input_ids=ids, use_cache=False).last_hidden_state)
        bound = TOLERANCE * max(1.0, float(out.logits.abs().max()))
        return bool((ours - out.logits).abs().max() <= bound)
    finally:
        hf.train(training)
        hf.config._attn_implementation = before
