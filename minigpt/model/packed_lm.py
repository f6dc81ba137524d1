"""PackedLM: a causal LM that takes packed batches and returns losses or log-probs.

All samples of a batch lie in one row, and no sample sees another: its attention plan says who
attends to whom, and comes to the attention layers as a keyword argument of the model's forward.
A model that is not exact that way reads each sample in a row of its own.

What is written here is the reference. Where `accel` is on, it computes the same faster.

Shape legend:
    T  tokens of the batch, N targets, V vocabulary, H query heads, K key heads, D width of a head
    R  rows, L their length
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, PreTrainedModel

from minigpt import accel
from minigpt.data.batch import AttentionPlan, PackedBatch, positions
from minigpt.errors import ModelError
from minigpt.model.losses import sum_by

log = logging.getLogger(__name__)

PACKED = "minigpt_packed"  # the name under which transformers finds `packed_attention`
# Arguments of attention that repeat what the plan says, or ask for more results.
IGNORED = {"is_causal", "position_ids", "output_attentions", "output_hidden_states", "use_cache"}
IGNORED |= {"output_router_logits", "return_dict", "logits_to_keep", "deterministic"}
MAX_FP32_LOGITS = 2**24  # at a time


class PackedLM(nn.Module):
    """Wraps a transformers causal LM for training on packed batches.

    It is one module so that everything a step computes happens inside its forward, where DDP
    and FSDP2 have the parameters at hand.

    Args:
        hf: the model; its attention is set to one that passed the proof of conformance.py.

    Attributes:
        packed: all samples are read as one row; a kind that is not exact that way has a row each.
        linear_head: computes its loss without all logits at once, where `accel` can.
        predicts_tokens: whether its head gives logits of the vocabulary.

    Raises:
        ModelError: when models of its kind cannot be computed exactly.
    """

    predicts_tokens: ClassVar[bool] = True

    def __init__(self, hf: PreTrainedModel) -> None:
        # Late, because the proof of conformance reads batches by the functions below.
        from minigpt.model.conformance import require_conformance

        super().__init__()
        self.hf = hf
        conformance = require_conformance(hf, training=True)
        self.packed = conformance.packed
        self.linear_head = None
        if accel.ENABLED and self.predicts_tokens:
            with use_attention(hf, conformance.decoding):
                self.linear_head = accel.linear_head(hf, self.packed)
        hf.config._attn_implementation = conformance.training
        if not self.packed:
            log.warning(
                "%s is not exact with packed samples (%s): each has a row of its own, which "
                "takes more time.",
                type(hf).__name__,
                conformance.problem,
            )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedLM:
        """Let `to` move buffers but keep their type, which bf16-true would change: see
        `cast_weights`.
        """
        buffers = [(m, n, b) for m in self.modules() for n, b in m.named_buffers(recurse=False)]
        super()._apply(fn, recurse)
        for module, name, before in buffers:
            after = module.get_buffer(name)
            if after.dtype != before.dtype:
                module._buffers[name] = before.to(after.device)
        return self

    def forward(
        self,
        batch: PackedBatch,
        per_answer: bool = False,
        per_target: bool = False,
        temperature: Tensor | None = None,
    ) -> Tensor:
        """Return the summed cross-entropy [], or log-probs, in nats.

        Args:
            batch: what to read.
            per_answer: return each answer's summed log-prob [A].
            per_target: return each target's log-prob [N].
            temperature: [N] by which the logits of each target are divided; none for 1.
        """
        head = self.hf.get_output_embeddings()
        # The linear head divides hidden states by the temperature, which leaves a bias as it is.
        scales_bias = temperature is not None and getattr(head, "bias", None) is not None
        if self.linear_head is None or scales_bias:
            logits = target_logits(self.hf, batch, self.packed)
            if temperature is not None:
                logits = logits / temperature[:, None]
            logp = token_logprobs(logits, batch.labels)
        else:
            hidden = forward_batch(self.hf.base_model, batch, self.packed)
            if not (per_answer or per_target):
                return self.linear_head.loss(head, hidden, batch)
            logp = self.linear_head.logprobs(head, hidden, batch, temperature)
        if per_target:
            return logp
        return sum_by(logp, batch.answers, batch.n_answers) if per_answer else -logp.sum()


def token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the labels' log-probabilities [N] under logits [N, V], in nats and fp32.

    Logits are widened to fp32 in chunks, and again in the backward pass, to save memory.
    """
    rows = max(1, MAX_FP32_LOGITS // logits.shape[1])
    chunks = zip(logits.split(rows), labels.split(rows), strict=True)
    return torch.cat(
        [
            checkpoint(_token_logprobs, *chunk, use_reentrant=False, preserve_rng_state=False)
            for chunk in chunks
        ]
    )


def _token_logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    logp = logits.float().log_softmax(-1)
    return logp.gather(1, labels[:, None]).squeeze(1)


def target_logits(hf: PreTrainedModel, batch: PackedBatch, packed: bool) -> Tensor:
    """Return the logits [N, V] that predict the targets; arguments as for `forward_batch`."""
    if packed and "logits_to_keep" in inspect.signature(hf.forward).parameters:
        return forward_batch(hf, batch, packed, logits_to_keep=batch.predict_at)
    return forward_batch(hf, batch, packed).index_select(0, batch.predict_at)


def forward_batch(model: nn.Module, batch: PackedBatch, packed: bool, **options: Tensor) -> Tensor:
    """Return a model's first output for the tokens of a batch, [T, ·].

    Args:
        model: a causal LM, or the body of one.
        batch: what to read.
        packed: give the samples as one row, with the plan of their attention; otherwise each in a
            row by itself.
        options: of the model, when samples are packed.
    """
    if not packed:
        return map_rows(partial(forward_rows, model), [batch.input_ids], batch.plan)
    out: Tensor = model(
        input_ids=batch.input_ids[None],
        position_ids=batch.position_ids[None],
        plan=batch.plan,
        use_cache=False,  # a cache would be built in every step, and retain the graph
        **options,
    )[0]
    return out.squeeze(0)


def forward_rows(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the first output [R, L, ·] of a model or its body for rows of ids [R, L].

    Positions and masks are those that the model makes.
    """
    parameters = inspect.signature(model.forward).parameters
    takes_cache = "use_cache" in parameters or "kwargs" in parameters
    options = {"use_cache": False} if takes_cache else {}
    out: Tensor = model(input_ids=ids, **options)[0]
    return out


def map_rows(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], plan: AttentionPlan
) -> Tensor:
    """Apply a function to each row of a plan, and put the results in the order of the batch.

    Args:
        function: from tensors [R, L, ...] to one tensor [R, L, ...].
        tensors: [T, ...] each.
        plan: of the rows. A prompt that two rows share takes its result from the first.

    Returns:
        [T, ...].
    """
    if accel.ENABLED:
        return accel.map_rows(function, tensors, plan)
    results = []
    for span, count in zip(plan.rows, plan.cu_queries.diff().tolist(), strict=True):
        row = torch.from_numpy(positions(span)).to(tensors[0].device)
        out = function(*(x.index_select(0, row)[None] for x in tensors)).squeeze(0)
        results.append(out[-count:])
    return torch.cat(results)


def attend_rows(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    scaling: float,
    dropout: float = 0.0,
    window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """Causal attention of rows, by the definition.

    The order of cap, mask and softmax, which is in fp32, is that of transformers' Gemma 2 and
    GPT-OSS.

    Args:
        q: [R, L, H, D].
        k, v: [R, L, K, D] with K dividing H (grouped-query attention).
        scaling, dropout, window, softcap, sinks: as in `packed_attention`.

    Returns:
        [R, L, H, D].
    """
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))  # [R, heads, L, D]
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
    position = torch.arange(q.shape[2], device=q.device)
    distance = position[:, None] - position
    visible = (distance >= 0) & (distance < (window or len(position)))
    with torch.autocast(q.device.type, enabled=False):
        scores = (q @ k.mT).float() * scaling  # [R, H, L, L]
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        scores = scores.masked_fill(~visible, -torch.inf)
        if sinks is not None:
            column = sinks.float().view(1, -1, 1, 1).expand(*scores.shape[:3], 1)
            scores = torch.cat([scores, column], -1)
        weights = F.dropout(scores.softmax(-1)[..., : len(position)], dropout)
        return (weights.to(v.dtype) @ v).transpose(1, 2)


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    plan: AttentionPlan | None = None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **others: object,
) -> tuple[Tensor, None]:
    """Attend inside each row of the plan: the attention function that transformers calls.

    Args:
        module: the attention layer.
        query: [1, H, T, D].
        key, value: [1, K, T, D] with K dividing H (grouped-query attention); a value may have
            another width, and so has the result.
        attention_mask: refused, the plan says who attends to whom.
        plan: the batch's attention plan.
        dropout: probability of dropping an attention weight.
        scaling: factor of the logits; None means 1/sqrt(D).
        sliding_window: of how many tokens, itself the last, a token sees.
        softcap: c of the logits' soft cap, c · tanh(logits / c).
        s_aux: [H] logits of attention sinks, which take part in the softmax and give nothing.
        others: ignored if in `IGNORED`, and refused if not.

    Returns:
        [1, T, H, D] and None.

    Raises:
        ModelError: without a plan, and for other arguments, which may change the result.
    """
    if plan is None:
        raise ModelError(
            f"{type(module).__name__} comes without the plan of the batch: layers of this family "
            "do not hand on what attention needs, so it cannot be trained. Take another family."
        )
    _refuse_arguments(module, {"attention_mask": attention_mask, **others})
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    dtype = _matmul_dtype(query)
    # [T, heads, D]; the gradient of squeeze is a view, that of [0] is a copy into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(dtype) for x in (query, key, value))
    if accel.ENABLED and softcap is None and s_aux is None:
        out = accel.attention(q, k, v, plan, scaling, dropout, sliding_window)
    else:
        attend = partial(
            attend_rows,
            scaling=scaling,
            dropout=dropout,
            window=sliding_window,
            softcap=softcap,
            sinks=s_aux,
        )
        out = map_rows(attend, [q, k, v], plan)
    return out.unsqueeze(0), None


AttentionInterface.register(PACKED, packed_attention)


def _refuse_arguments(module: nn.Module, arguments: dict[str, object]) -> None:
    refused = [name for name, x in arguments.items() if x is not None and name not in IGNORED]
    if refused:
        raise ModelError(
            f"{type(module).__name__} gives its attention {', '.join(sorted(refused))}, which is "
            "not computed for packed samples."
        )


def _matmul_dtype(x: Tensor) -> torch.dtype:
    """Return the type in which autocast would compute; norms and rotations give wider numbers."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


@contextmanager
def use_attention(model: PreTrainedModel, name: str) -> Iterator[None]:
    """Let a model use another attention function for a while.

    Args:
        model: has its own function again in the end.
        name: of the function; `sdpa` becomes `eager` for models that do not support it, and would
            compute it without a mask.
    """
    before = model.config._attn_implementation
    eager = name == "sdpa" and not model._supports_sdpa
    model.config._attn_implementation = "eager" if eager else name
    try:
        yield
    finally:
        model.config._attn_implementation = before
