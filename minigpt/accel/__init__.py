"""Speed and nothing else: faster ways to compute what `model` computes plainly.

This file is the only entry point: no other package imports the rest of `accel`, which is imported
when it is needed. With the environment variable MINIGPT_ACCEL=off training takes the reference
path, which takes more time and memory. The numbers are equal up to rounding and what dropout draws,
except on a GPU under bf16 autocast, where `accel` holds the residual stream in bf16.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

from torch import Tensor, nn

from minigpt.data.batch import AttentionPlan, PackedBatch
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from lightning.pytorch import Trainer
    from transformers import PreTrainedModel

    from minigpt.accel.linear_loss import LinearHead

SWITCH = "MINIGPT_ACCEL"


class PackedModel(Protocol):
    """What is asked of a model that trains on packed batches, to compile its layers."""

    hf: PreTrainedModel
    linear_head: LinearHead | None

    def __call__(self, batch: PackedBatch, per_answer: bool = False) -> Tensor:
        """Return the summed loss [], or each answer's summed log-probability [A]."""


def read_switch() -> bool:
    """Whether the environment variable MINIGPT_ACCEL is on, which it is by default.

    Raises:
        ConfigError: when it is neither `on` nor `off`.
    """
    value = os.environ.get(SWITCH, "on")
    if value not in ("on", "off"):
        raise ConfigError(f"The environment variable {SWITCH} must be on or off, but is {value}.")
    return value == "on"


ENABLED = read_switch()


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    plan: AttentionPlan,
    scaling: float,
    dropout: float,
    window: int | None,
) -> Tensor:
    """Attend inside each row of a plan by the fastest kernel that computes it here.

    Args:
        query: [T, H, D]. key: [T, K, D] with K dividing H. value: [T, K, W].
        plan: who attends to whom.
        scaling: factor of the logits.
        dropout: probability of dropping an attention weight.
        window: of how many tokens, itself the last, a token sees; None means all before it.

    Returns:
        [T, H, W].
    """
    from minigpt.accel.fast_attention import attend

    return attend(query, key, value, plan, scaling, dropout, window)


def map_rows(
    function: Callable[..., Tensor], tensors: Sequence[Tensor], plan: AttentionPlan
) -> Tensor:
    """Do as `packed_lm.map_rows`, with rows of like length together.

    The function must be causal: short rows are filled up at their end.
    """
    from minigpt.accel.fast_attention import map_groups

    out: Tensor = map_groups(function, tensors, plan)
    return out


def linear_head(hf: PreTrainedModel, packed: bool) -> LinearHead | None:
    """Prepare a model for training, and return how to compute the loss of its head by chunks.

    On a GPU under autocast, its layers add to bf16. Where its last layer allows it, and batches
    are read `packed`, that layer computes what follows its attention only for the positions that
    predict targets.

    Returns:
        None for a model whose logits are not its head applied to the last hidden states.
    """
    from minigpt.accel.linear_loss import prepare

    return prepare(hf, packed)


def compiling_pays(trainer: Trainer, model: nn.Module, batches: int) -> bool:
    """Whether a run is long enough, and of a kind, that compiling its layers saves time.

    Args:
        trainer: with its data module.
        model: to be trained.
        batches: micro-batches of the run.
    """
    if not ENABLED:
        return False
    from minigpt.accel.compiled_layers import pays

    return pays(trainer, model, batches)


def compile_model(
    lm: PackedModel,
    tokens: int,
    positions: int,
    precision: Callable[[], AbstractContextManager[None]],
    pairs: bool = False,
) -> None:
    """Compile a model's layers in place; where that fails the model stays as it is.

    Args:
        lm: the model.
        tokens: of a micro-batch.
        positions: how many the model has.
        precision: gives what a step's forward pass runs in.
        pairs: batches hold preferences.
    """
    from minigpt.accel import compiled_layers

    if ENABLED:
        compiled_layers.compile_model(lm, tokens, positions, precision, pairs)
    else:
        compiled_layers.log.warning("Not compiled, as %s=off.", SWITCH)


def attention_name(bf16_on_cpu: bool) -> str:
    """Return what computes the attention of a run, as far as it changes a sum's last bits.

    Args:
        bf16_on_cpu: the run computes in bf16 on a CPU.
    """
    if not ENABLED:
        return "reference"
    from minigpt.accel import cpu_attention

    return "kernel" if bf16_on_cpu and cpu_attention.available() else "plain"
