"""torch.compile for the layers of a model that trains on packed batches.

Each layer is compiled by itself, with lengths that may change, and only for packed batches:
generation and anything else goes through the layer as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Concatenate, ParamSpec, TypeVar

import numpy as np
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt.accel import PackedModel
from minigpt.accel.gpu_attention import kernel_applies
from minigpt.accel.linear_loss import softmax_
from minigpt.data.batch import TILE, AttentionPlan, PackedBatch, Sample, collate

log = logging.getLogger(__name__)

# Lengths in the batches that warm the compiler up: of a text, and of a preference's prompt and
# answers. Texts of whole tiles make full rows. The compiler takes sizes that are equal in its first
# batch to be equal always, so these equal no others.
TEXT = 3 * TILE
PREFERENCE = (31, 13, 17)
# Operations from which on compiling for half a minute pays: about five minutes of training.
WORTHWHILE = {"cpu": 1e14, "cuda": 1e17}

P = ParamSpec("P")
T = TypeVar("T")


def pays(trainer: Trainer, model: nn.Module, batches: int) -> bool:
    """Whether a run is long enough, and of a kind that gains from compiling.

    fp32 steps on a CPU gain 2% (docs/log.md); hooks that gather shards would break compiled layers
    apart. Arguments as for `accel.compiling_pays`.
    """
    sharded = isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    half = str(trainer.precision).startswith(("bf16", "16"))
    if sharded or not half:
        return False
    parameters = sum(p.numel() for p in model.parameters())
    tokens: int = trainer.datamodule.tokens_per_batch  # type: ignore[attr-defined]
    operations = 6 * parameters * tokens * batches
    return operations > WORTHWHILE.get(trainer.strategy.root_device.type, math.inf)


def compile_model(
    lm: PackedModel,
    tokens: int,
    positions: int,
    precision: Callable[[], AbstractContextManager[None]],
    pairs: bool = False,
) -> None:
    """Compile a model's layers and its softmax in place, and let batches through to warm up.

    The compiler fits its kernels to the first batch that it sees. It is always the same one, so
    that a resumed run has the kernels that it had before.

    Where compiling fails, in whatever way, the model stays as it is, with a warning.
    Arguments as for `accel.compile_model`.
    """
    # Else DDP splits layers that are not compiled yet where its buckets of gradients end.
    torch._dynamo.config.optimize_ddp = False
    fallback = _Fallback()
    for layer in lm.hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what all families build layers from
            layer.forward = _for_packed(layer.forward, fallback, tokens // 2)
    if lm.linear_head is not None:
        lm.linear_head.softmax = fallback.guarded(softmax_)
    with precision():
        on_gpu = kernel_applies(lm.hf.device, _autocast_dtype(lm.hf))
    try:
        batches = _first_batches(tokens, pairs, positions)
        for batch in batches if on_gpu else batches[:1]:
            _warm_up(lm, batch, precision, pairs)
    except TorchDynamoException as error:  # of the backward pass
        fallback.fail(error)


def _autocast_dtype(model: nn.Module) -> torch.dtype:
    """Return the type in which a model's matmuls are computed."""
    weight = next(model.parameters())
    device = weight.device.type
    autocast = torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if autocast else weight.dtype


def _first_batches(tokens: int, pairs: bool, positions: int) -> list[PackedBatch]:
    """Return a batch for each case of `gpu_attention.kernel_attention`: rows of several lengths,
    full rows before a shorter one, full rows alone.
    """
    longest = max(TILE, positions // TILE * TILE)
    prompt, *answers = PREFERENCE if pairs else (0, min(TEXT, longest))
    ids = np.zeros(prompt + sum(answers), np.int64)
    targets = None if pairs else np.arange(len(ids)) > 3
    sample = Sample(ids, prompt, tuple(answers), targets, ("", 0))
    short = replace(sample, ids=ids[1:], answers=(answers[0] - 1, *answers[1:]), targets=None)
    many = [sample] * max(2, tokens // len(ids))
    kinds = [[short, *many]] if pairs else [[short, *many], [*many, short], many]
    return [collate(samples) for samples in kinds]


def _warm_up(
    lm: PackedModel,
    batch: PackedBatch,
    precision: Callable[[], AbstractContextManager[None]],
    pairs: bool,
) -> None:
    weights = [p for p in lm.hf.parameters() if p.requires_grad]
    # Dropout draws afterwards as if this had not been.
    with torch.random.fork_rng(), torch.set_grad_enabled(bool(weights)):
        with precision():
            loss = lm(batch.to(next(lm.hf.parameters()).device), per_answer=pairs).sum()
        if weights:
            torch.autograd.grad(loss, weights, allow_unused=True)


class _Fallback:
    """Remembers that compiling has failed, so that nothing of the model tries it again."""

    def __init__(self) -> None:
        self.failed = False

    def fail(self, error: Exception) -> None:
        """Go on without compiling."""
        self.failed = True
        first = next((line for line in str(error).splitlines() if line.strip()), "")
        log.warning("Not compiled, which only costs speed: %s", first)

    def guarded(self, plain: Callable[P, T]) -> Callable[P, T]:
        """Return a function compiled, or as it is once compiling has failed."""
        compiled = torch.compile(plain, dynamic=True)

        def call(*args: P.args, **kwargs: P.kwargs) -> T:
            if not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:
                    self.fail(error)
            return plain(*args, **kwargs)

        return call


def _for_packed(
    plain: Callable[Concatenate[Tensor, P], T], fallback: _Fallback, shortest: int
) -> Callable[Concatenate[Tensor, P], T]:
    """Return a layer's forward, compiled for packed batches of at least so many tokens."""
    compiled = fallback.guarded(plain)

    def forward(hidden: Tensor, /, *args: P.args, **kwargs: P.kwargs) -> T:
        plan = kwargs.get("plan")
        if not isinstance(plan, AttentionPlan):
            return plain(hidden, *args, **kwargs)
        # The compiler would make kernels of their own for few tokens, for no target or one, and for
        # one token behind full rows. Such batches are rare, as the last of an epoch: not worth it.
        tokens = hidden.shape[1]
        behind_full_rows = tokens - plan.full * plan.longest
        if tokens < shortest or len(plan.predict_at) <= 1 or behind_full_rows == 1:
            return plain(hidden, *args, **kwargs)
        return compiled(hidden, *args, **kwargs)

    return forward
