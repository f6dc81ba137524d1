"""Reading checkpoints: plain values and tensors, never code, and only into a model they fit.

`RUN/checkpoints/step=N` holds what a run goes on from, and under `hf/` the model as it then was.
"""

from __future__ import annotations

import pickle
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from minigpt.errors import ModelError
from minigpt.reading import read_json, refusing

SHARDED = "meta.pt"  # what a checkpoint of FSDP2 holds beside its shards
CHECKPOINTS_DIR = "checkpoints"  # of a run directory
STEP_NAME = re.compile(r"step=(0|[1-9][0-9]*)")
MODEL_DIR = "hf"  # in a checkpoint and in a run directory
BEST_FILE = "best.json"  # beside the checkpoints: which of them is the best
BEST, LAST = "best", "last"  # stand for a checkpoint in paths


def step_of(checkpoint: Path) -> int:
    """Return the optimizer steps that a checkpoint was saved after."""
    return int(checkpoint.name.removeprefix("step="))


def newest_first(run_dir: Path) -> Iterator[Path]:
    """Yield a run's checkpoints, also damaged ones, the one with the most steps first."""
    paths = (run_dir / CHECKPOINTS_DIR).glob("step=*")
    checkpoints = [path for path in paths if STEP_NAME.fullmatch(path.name)]
    yield from sorted(checkpoints, key=step_of, reverse=True)


def names_checkpoint(path: Path) -> bool:
    """Whether a path has the form of a checkpoint's, whatever is there."""
    is_step = STEP_NAME.fullmatch(path.name) is not None
    return path.parent.name == CHECKPOINTS_DIR and (is_step or path.name in (BEST, LAST))


def find_checkpoint(path: Path) -> Path | None:
    """Return the checkpoint that a path names; None when it names something else.

    Args:
        path: `RUN/checkpoints/step=N`, `RUN/checkpoints/last` for the newest with a model, or
            `RUN/checkpoints/best` for the one that `checkpoint.best` keeps.

    Raises:
        ModelError: when there is no such checkpoint, or it holds no model.
    """
    folder, name = path.absolute().parent, path.name
    if not (names_checkpoint(path.absolute()) and folder.is_dir()):
        return None
    with_model = [each for each in newest_first(folder.parent) if (each / MODEL_DIR).is_dir()]
    checkpoint: Path | None = folder / name
    if name == LAST:
        checkpoint = with_model[0] if with_model else None
    if name == BEST:
        checkpoint = _best(folder)
    if checkpoint in with_model:
        return checkpoint
    listed = ", ".join(each.name for each in with_model) or "none"
    if checkpoint is not None and checkpoint.is_dir():
        raise ModelError(
            f"The checkpoint {checkpoint} holds no model ({MODEL_DIR}/ is missing in it): an "
            "earlier version saved it, or its run was cut off while it did. With a model: "
            f"{listed}. A run that goes on from it with --ckpt_path writes the model into it."
        )
    raise ModelError(f"There is no checkpoint {path}. In {folder} are, with a model: {listed}.")


def _best(folder: Path) -> Path:
    """Return the checkpoint that is noted as the best of a run."""
    file = folder / BEST_FILE
    if not file.is_file():
        raise ModelError(
            f"{folder} has no best checkpoint: a run keeps it where checkpoint.best names a metric "
            "such as val/loss, and notes it after its first validation. Name another checkpoint, "
            f"such as {folder / LAST}."
        )
    with refusing(str(file), ModelError, "Name a checkpoint by its step.", verb="is damaged"):
        return folder / f"step={int(read_json(file)['step'])}"


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
        state = torch.load(file, map_location=map_location, weights_only=True, mmap=mmap)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise refused(file.parent) from error
    if not isinstance(state, dict):
        raise refused(file.parent)
    return state


def refused(path: Path) -> ModelError:
    """Return the error for a checkpoint that is not ours, or holds code."""
    return ModelError(
        f"The checkpoint {path} is refused: it holds more than numbers and plain values, "
        "or is no checkpoint of MiniGPT."
    )


def check_sharding(path: Path, sharded: bool) -> None:
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
