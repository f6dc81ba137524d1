"""Reading checkpoints: plain values and tensors, never code, and only into a model they fit."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import ModelError

SHARDED = "meta.pt"  # what a checkpoint of FSDP2 holds beside its shards


def load_plain(
    file: Path, map_location: str | torch.device = "cpu", mmap: bool = False
) -> dict[str, Any]:
    """Read a file that `torch.save` wrote; no code in it is ever run.

    Args:
        file: in the checkpoint's directory.
        map_location: where its tensors go.
        mmap: read a tensor only when it is used.

    Raises:
        ModelError: when it holds more than plain values and tensors.
    """
    try:
        state: dict[str, Any] = torch.load(
            file, map_location=map_location, weights_only=True, mmap=mmap
        )
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise refused(file.parent) from error
    return state


def refused(path: Path) -> ModelError:
    """Return the error for a checkpoint that is not ours, or holds code."""
    return ModelError(
        f"The checkpoint {path} is refused: it holds more than numbers and plain values, "
        "or is no checkpoint of MiniGPT."
    )


def check_kind(path: Path, sharded: bool) -> None:
    """Refuse a checkpoint that another kind of strategy has saved.

    Args:
        path: the checkpoint.
        sharded: whether the strategy in use is FSDP2.

    Raises:
        ModelError: when it is of the other kind.
    """
    if (path / SHARDED).exists() == sharded:
        return
    kinds = ["of one file (one process, or DDP)", "in shards (FSDP2)"]
    saved, wanted = kinds if sharded else kinds[::-1]
    raise ModelError(
        f"The checkpoint {path} is {saved}, and this strategy reads one {wanted}. Go on with the "
        "strategy that saved it, or start a new run; model.init_args.init_from takes the weights "
        "of a finished one."
    )


def check_fit(
    path: Path | str | None, saved: dict[str, Any], expected: dict[str, Any], strict: bool
) -> None:
    """Compare the names and shapes of a checkpoint's weights with a model's.

    Args:
        path: the checkpoint.
        saved: the checkpoint's shapes by name.
        expected: the model's shapes by name.
        strict: whether each of the model's weights must be in the checkpoint.

    Raises:
        ModelError: with the first one that differs.
    """
    saved = {name: tuple(shape) for name, shape in saved.items()}
    expected = {name: tuple(shape) for name, shape in expected.items()}
    for name in sorted(saved.keys() | expected.keys() if strict else saved):
        if saved.get(name) != expected.get(name):
            raise ModelError(
                f"The checkpoint {path} does not fit this model: the shape of {name} is "
                f"{saved.get(name, 'missing')} there and {expected.get(name, 'missing')} here. Use "
                "the config, base and tokenizer that the run was started with, or start a new run."
            )
