"""torch.compile for the layers of a model that trains on packed batches.

Each layer is compiled by itself, with lengths that may change, and only for packed batches:
generation and anything else goes through the layer as it is.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable
from typing import Any

import torch
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers.modeling_layers import GradientCheckpointingLayer

from minigpt.model import losses
from minigpt.model.build import count_parameters
from minigpt.model.lm import PackedLM

log = logging.getLogger(__name__)

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


def compile_model(lm: PackedLM) -> None:
    """Compile a model's layers and its softmax in place.

    Where compiling fails, in whatever way, the model goes on as it is, which is told in a line.
    """
    state = _Fallback()
    for layer in lm.hf.modules():
        if isinstance(layer, GradientCheckpointingLayer):  # what all families build layers from
            layer.forward = _for_packed(layer.forward, state)
    lm.softmax = state.guarded(losses.softmax)


class _Fallback:
    """Remembers that compiling has failed, so that nothing of the model tries it again."""

    def __init__(self) -> None:
        self.failed = False

    def guarded(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Return a function compiled, or as it is once compiling has failed."""
        compiled = torch.compile(plain, dynamic=True)

        def call(*args: Any, **kwargs: Any) -> Any:
            if not self.failed:
                try:
                    return compiled(*args, **kwargs)
                except TorchDynamoException as error:
                    self.failed = True
                    first = next((ln for ln in str(error).splitlines() if ln.strip()), "")
                    log.warning("Not compiled, which only costs speed: %s", first)
            return plain(*args, **kwargs)

        return call


def _for_packed(plain: Callable[..., Tensor], state: _Fallback) -> Callable[..., Tensor]:
    compiled = state.guarded(plain)

    def forward(*args: Any, **kwargs: Any) -> Tensor:
        return (compiled if kwargs.get("plan") is not None else plain)(*args, **kwargs)

    return forward
