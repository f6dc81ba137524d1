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
from typing import Any

import numpy as np
import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt.data.batch import TILE, PackedBatch, Sample, collate
from minigpt.model import losses
from minigpt.model.architecture import count_parameters
from minigpt.model.attention import kernel_applies
from minigpt.model.packed_lm import PackedLM
from minigpt.model.rope import max_positions

log = logging.getLogger(__name__)

# Tokens of a text, where the model has so many positions, and of a pair that warm up. A text of
# whole tiles fills a row to its end, so that with a shorter one, or none, all kinds of batches come
# about, whatever a batch's tokens. The compiler takes numbers that are equal in its first batch for
# equal ones in all: these equal nothing else.
TEXT, PAIR = 3 * TILE, (31, 13, 17)
# Operations from which on compiling for half a minute pays: about five minutes of training.
WORTHWHILE = {"cpu": 1e14, "cuda": 1e17}


def compiling_pays(module: Any) -> bool:
    """Whether a module's run is long enough, and of a kind that gains from compiling.

    fp32 steps on a CPU gain 2% (docs/log.md); hooks that gather shards, or compute activations
    again, would break compiled layers apart.
    """
    trainer = module.trainer
    whole = not isinstance(trainer.strategy, FSDPStrategy | ModelParallelStrategy)
    half = str(trainer.precision).startswith(("bf16", "16"))
    if not (whole and half) or module.activation_checkpointing:
        return False
    batches = module.total_steps() * trainer.accumulate_grad_batches
    parameters, _ = count_parameters(module.model)
    operations = 6 * parameters * trainer.datamodule.tokens_per_batch * batches
    return bool(operations > WORTHWHILE.get(trainer.strategy.root_device.type, math.inf))


def compile_model(
    lm: PackedLM,
    tokens: int,
    precision: Callable[[], AbstractContextManager[None]],
    pairs: bool = False,
) -> None:
    """Compile a model's layers and its softmax in place, and let batches through to warm up.

    The compiler fits its kernels to the first batch that it sees. It is always the same one, so
    that a run that goes on has the kernels that it had before.

    Where compiling fails, in whatever way, the model goes on as it is, which is told in a line.

    Args:
        lm: the model.
        tokens: of a micro-batch.
        precision: gives what a step's forward pass runs in.
        pairs: batches hold preferences.
    """
    # Else DDP cuts a layer that it finds not compiled yet at the borders of its buckets.
    torch._dynamo.config.optimize_ddp = False
    state = _Fallback()
    for layer in lm.hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what all families build layers from
            layer.forward = _for_packed(layer.forward, state, tokens // 2)
    lm.softmax = state.guarded(losses.softmax_)
    with precision():
        on_gpu = kernel_applies(next(lm.parameters()))
    try:
        limit = max_positions(lm.hf.config)
        for batch in _first_batches(tokens, pairs, limit)[: None if on_gpu else 1]:
            _warm_up(lm, batch, precision, pairs)
    except TorchDynamoException as error:  # of the backward pass
        state.fail(error)


def _first_batches(tokens: int, pairs: bool, limit: int) -> list[PackedBatch]:
    """Return a batch of each kind that kernels on a GPU have ways of their own for: of rows of
    several lengths, of full ones before a shorter one, of full ones alone.
    """
    prompt, first, second = PAIR if pairs else (0, min(TEXT, max(TILE, limit // TILE * TILE)), 0)
    ids = np.zeros(prompt + first + second, np.int64)
    targets = None if pairs else np.arange(first) > 3
    sample = Sample(ids, prompt, first, second, targets, ("", 0))
    short = replace(sample, ids=ids[1:], first=first - 1, targets=None)
    many = [sample] * max(2, tokens // len(ids))
    kinds = [[short, *many]] if pairs else [[short, *many], [*many, short], many]
    return [collate(samples) for samples in kinds]


def _warm_up(
    lm: PackedLM,
    batch: PackedBatch,
    precision: Callable[[], AbstractContextManager[None]],
    pairs: bool,
) -> None:
    weights = [p for p in lm.parameters() if p.requires_grad]
    fork, grads = torch.random.fork_rng(), torch.set_grad_enabled(bool(weights))
    with fork, grads:  # dropout draws as if this had not been
        with precision():
            loss = lm(batch.to(next(lm.parameters()).device), per_answer=pairs).sum()
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

    def guarded(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function compiled, or as it is once compiling has failed."""
        compiled = torch.compile(plain, dynamic=True)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:
                    self.fail(error)
            return plain(*args, **kwargs)

        return call


def _for_packed(
    plain: Callable[..., Tensor], state: _Fallback, least: int
) -> Callable[..., Tensor]:
    compiled = state.guarded(plain)

    def forward(hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        plan = kwargs.get("plan")
        # The compiler sums up to 4,096 numbers by other kernels than more, and makes some for no
        # target and for one: an epoch's last batch, which may be short, is not worth the wait.
        # A single token behind full rows would be taken for a kind of its own, too.
        usual = (
            plan is not None
            and len(plan.predict_at) > 1
            and hidden.shape[1] >= least
            and hidden.shape[1] - plan.full * plan.longest != 1
        )
        return (compiled if usual else plain)(hidden, *args, **kwargs)

    return forward
