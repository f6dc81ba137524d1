"""Positions: how many a model has, and rotary angles scaled to read more (transformers' own)."""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from types import MethodType
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel

from minigpt.errors import ConfigError

log = logging.getLogger(__name__)

# Names under which configs say how many positions there are; most map theirs to the first.
LIMITS = ("max_position_embeddings", "max_seq_len", "max_target_positions")
BY_LENGTH = ("dynamic", "longrope")  # kinds whose angles depend on a text's length


@dataclass(frozen=True)
class RopeScaling:
    """Rotary angles for texts longer than those that a model was trained on.

    Args:
        type: linear (Chen et al. 2023, arXiv:2306.15595), dynamic (NTK-aware, changed only for
            texts beyond the original length) or yarn (Peng et al. 2023, arXiv:2309.00071).
        factor: how many times the original length the model reads.
        original_max_position_embeddings: the original length in tokens; by default the config's
            `max_position_embeddings`.
    """

    type: Literal["linear", "dynamic", "yarn"]
    factor: float
    original_max_position_embeddings: int | None = None

    def __post_init__(self) -> None:
        original = self.original_max_position_embeddings
        if self.factor <= 1 or (original is not None and original < 1):
            raise ConfigError(
                "rope_scaling.factor must be above 1 and original_max_position_embeddings at "
                f"least 1, but are {self.factor} and {original}."
            )


def max_positions(config: PreTrainedConfig) -> int:
    """Return the longest sequence in tokens that a config allows; without a limit sys.maxsize."""
    text = config.get_text_config(decoder=True)
    limits = (getattr(text, name, None) for name in LIMITS)
    limit = next((value for value in limits if value and value > 0), sys.maxsize)  # XLNet's is -1
    rope = rope_parameters(config)
    if rope.get("rope_type") == "dynamic":  # for which transformers keeps the original length
        limit = int(limit * rope["factor"])
    return int(limit)


def rope_parameters(config: PreTrainedConfig) -> dict[str, Any]:
    """Return a config's rotary parameters; empty without rotary positions."""
    return dict(getattr(config.get_text_config(decoder=True), "rope_parameters", None) or {})


def depends_on_length(model: PreTrainedModel) -> bool:
    """Whether a token's rotary angles depend on how long its text is."""
    return any(module.rope_type in BY_LENGTH for module in _rotary(model))


def shared_prompt_limit(config: PreTrainedConfig) -> int:
    """Return the tokens of prompt and answer up to which a prompt's angles are always the same."""
    text = config.get_text_config(decoder=True)
    rope = rope_parameters(config)
    if rope.get("rope_type") not in BY_LENGTH:
        return sys.maxsize
    return int(rope.get("original_max_position_embeddings") or text.max_position_embeddings)


def check_length(
    config: PreTrainedConfig,
    length: int,
    shares_prompts: bool = False,
    option: str = "data.init_args.max_length",
) -> None:
    """Refuse a `max_length` beyond what a model reads.

    Args:
        config: the model's.
        length: of a sample, in tokens.
        shares_prompts: whether samples hold several answers to a prompt.
        option: where the length was set.

    Raises:
        ConfigError: with the limit, and what to do.
    """
    rope = rope_parameters(config)
    limit = max_positions(config)
    if length > limit:
        remedy = f"Set it to {limit}"
        if "rope_type" in rope:
            factor = math.ceil(length / limit)
            remedy += ", or let it read longer texts with model.init_args.rope_scaling, such as "
            remedy += f"{{type: yarn, factor: {factor:.1f}}}"
        raise ConfigError(
            f"{option} is {length}, but {config.model_type} reads at most {limit} tokens, as its "
            f"config says. {remedy}."
        )
    if not shares_prompts:
        return
    shared_limit = shared_prompt_limit(config)
    if length > shared_limit:
        raise ConfigError(
            f"{option} is {length}, but rotary angles of this kind ({rope['rope_type']}) depend "
            f"on a text's length above {shared_limit} tokens, so that answers cannot share their "
            f"prompt. Set it to {shared_limit}, or take rope_scaling of type yarn or linear."
        )


def scale_rope(model: PreTrainedModel, scaling: RopeScaling) -> None:
    """Scale a model's rotary angles in place, and change its config to say so.

    Raises:
        ConfigError: as `scale_config` does.
    """
    if not list(_rotary(model)):
        raise _no_angles(model.config)
    if not scale_config(model.config, scaling):
        return
    for module in _rotary(model):
        module.__init__(config=module.config)  # type: ignore[misc]  # which computes the angles
        module.to(model.device)
    compute_by_text(model)
    model.rope_scaling = scaling  # type: ignore[assignment]
    log.info(
        "rope_scaling %s: the model reads %d tokens.", scaling.type, max_positions(model.config)
    )


def scale_config(config: PreTrainedConfig, scaling: RopeScaling) -> bool:
    """Write a scaling into a config; return whether that changed it.

    Raises:
        ConfigError: when it has no rotary positions to scale, or scales them otherwise already.
    """
    text = config.get_text_config(decoder=True)
    old = rope_parameters(config)
    length = getattr(text, "max_position_embeddings", None)
    if "rope_type" not in old or not length:
        raise _no_angles(config)
    new, positions = _scaled(old, length, scaling)
    if old["rope_type"] == "default":
        text.rope_parameters = {**old, **new}
        text.max_position_embeddings = positions
        return True
    if {**old, **new} != old:
        raise ConfigError(
            "model.init_args.rope_scaling: the model's positions are scaled already "
            f"({old['rope_type']}, factor {old.get('factor')}). Leave it out."
        )
    return False  # done already by the run that this one starts from


def _no_angles(config: PreTrainedConfig) -> ConfigError:
    return ConfigError(
        f"model.init_args.rope_scaling: {config.model_type} has no rotary positions, or other ones "
        "for each kind of layer: they cannot be scaled. Leave it out."
    )


def _scaled(old: dict[str, Any], length: int, scaling: RopeScaling) -> tuple[dict[str, Any], int]:
    """Return the rotary parameters that change, and the new maximum of positions, from the old."""
    saved = old.get("original_max_position_embeddings")
    if saved is None and old["rope_type"] == scaling.type:
        saved = length if scaling.type == "dynamic" else round(length / scaling.factor)
    original = scaling.original_max_position_embeddings or saved or length
    new: dict[str, Any] = {"rope_type": scaling.type, "factor": scaling.factor}
    if scaling.type == "yarn":  # the others take no such key
        new["original_max_position_embeddings"] = original
    return new, original if scaling.type == "dynamic" else int(original * scaling.factor)


def _rotary(model: PreTrainedModel) -> Iterator[nn.Module]:
    """Yield the modules that compute one kind of rotary angles, shared by all layers."""
    for module in model.modules():
        if isinstance(getattr(module, "rope_type", None), str) and hasattr(module, "inv_freq"):
            yield module


def compute_by_text(model: PreTrainedModel) -> None:
    """Let angles that depend on a text's length be those of each packed text, as if alone."""
    for module in _rotary(model):
        if module.rope_type in BY_LENGTH:
            # A method, which a copy of the module binds anew.
            module.forward = MethodType(_rotary_by_text, module)


def _rotary_by_text(module: nn.Module, x: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Return cosines and sines [B, T, D]; in a packed row, a text begins at each position 0."""
    starts = [0]
    if len(position_ids) == 1:
        zeros = (position_ids[0] == 0).nonzero().flatten().tolist()
        starts += [index for index in zeros if index > 0]
    ends = [*starts[1:], position_ids.shape[1]]
    tables = []
    for start, end in zip(starts, ends, strict=True):
        if module.rope_type == "dynamic":  # forget longer texts, which transformers remembers
            module.max_seq_len_cached = module.original_max_seq_len
            module.inv_freq = module.original_inv_freq
        tables.append(type(module).forward(module, x, position_ids[:, start:end]))
    cos, sin = (torch.cat(table, 1) for table in zip(*tables, strict=True))
    return cos, sin
