"""Growing a model: its first layers train alone for a while, at a fraction of the cost.

A layer that sleeps is left out of the training step. Its outputs are projected to 0, so that it
is the identity when it wakes, and so that validation, samples, checkpoints and exports can use
all layers at any time. Progressive stacking (Gong et al. 2019, "Efficient Training of BERT by
Progressively Stacking") with new layers that keep the function (Chen et al. 2016, "Net2Net",
arXiv:1511.05641).
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from lightning.pytorch.strategies import SingleDeviceStrategy, Strategy
from transformers import PreTrainedModel

from minigpt.errors import ConfigError

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Growth:
    """How many layers train at first, and for how long.

    Args:
        layers: decoder layers that train from the first step.
        steps: optimizer steps after which the others join them.
    """

    layers: int
    steps: int

    def __post_init__(self) -> None:
        for name in ("layers", "steps"):
            if (value := getattr(self, name)) < 1:
                raise ConfigError(f"grow.{name} must be at least 1, but is {value}.")


def put_to_sleep(model: PreTrainedModel, growth: Growth) -> None:
    """Make the layers that join later the identity."""
    layers: Any = model.base_model.layers
    with torch.no_grad():
        for layer in layers[growth.layers :]:
            layer.self_attn.o_proj.weight.zero_()
            layer.mlp.down_proj.weight.zero_()
    few, steps = growth.layers, growth.steps
    log.info("The first %d of %d layers train alone for %d steps.", few, len(layers), steps)


@contextmanager
def awake(model: PreTrainedModel, growth: Growth, step: int) -> Iterator[None]:
    """Compute with the layers that train in an optimizer step, counted from 0."""
    config: Any = model.config
    whole = config.num_hidden_layers
    config.num_hidden_layers = growth.layers if step < growth.steps else whole
    try:
        yield
    finally:
        config.num_hidden_layers = whole


def check_growth(growth: Growth, steps: int, strategy: Strategy) -> None:
    """Refuse what would not grow.

    Args:
        steps: of the run. strategy: which must let layers be left out of a step.

    Raises:
        ConfigError: when the run ends before it grows, or its processes would wait for gradients.
    """
    if growth.steps >= steps:
        raise ConfigError(
            f"grow.steps is {growth.steps}, but the run has {steps} steps: the model would keep "
            "layers that never train. Lower grow.steps, or raise trainer.max_steps."
        )
    patient = getattr(strategy, "_ddp_kwargs", {}).get("find_unused_parameters")
    if not (patient or isinstance(strategy, SingleDeviceStrategy)):
        raise ConfigError(
            "grow leaves layers out of a step, for whose gradients this strategy waits: set "
            "trainer.strategy to ddp_find_unused_parameters_true, or train on one device."
        )
