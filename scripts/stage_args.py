"""What the stage scripts share: the original tool's flags, turned into a `minigpt fit` call."""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the scripts run from any directory, installed or not

ENOUGH_ROWS = 40  # below, no row is held out


@dataclass(frozen=True)
class Defaults:
    """A stage's defaults in the original tool."""

    model_path: str | None
    output_dir: str
    data_file: str
    batch_size: int
    accumulation: int
    epochs: int
    learning_rate: float


def parser_for(stage: str, defaults: Defaults) -> argparse.ArgumentParser:
    """Return a parser with the flags that all training scripts have."""
    parser = argparse.ArgumentParser(
        description=f"MiniGPT: {stage}. The same as `minigpt fit --config configs/{stage}.yaml` "
        "with the original tool's flags.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--model_path", default=defaults.model_path, help="run directory or model to start from")
    add("--output_dir", default=defaults.output_dir, help="run directory")
    add("--data_file", default=defaults.data_file, help="JSONL to train on")
    add(
        "--val_file",
        help="held-out JSONL; by default FILE_val.jsonl beside --data_file if there "
        "is one, otherwise every 20th row is held out",
    )
    add("--batch_size", type=int, default=defaults.batch_size, help="rows of max_length tokens")
    add(
        "--gradient_accumulation_steps",
        type=int,
        default=defaults.accumulation,
        help="batches to an optimizer step",
    )
    add("--num_epochs", type=int, default=defaults.epochs, help="passes over the rows")
    add("--learning_rate", type=float, default=defaults.learning_rate, help="its peak")
    add("--save_steps", type=int, default=500, help="optimizer steps between checkpoints")
    add("--logging_steps", type=int, default=10, help="optimizer steps between logged ones")
    add("--fp16", action="store_true", help="mixed precision (bf16 or fp32 on a CPU)")
    add("--max_length", type=int, default=512, help="tokens of a row")
    add("--data_limit", type=int, help="use only the first rows")
    add("--tokenizer_path", help="by default the one saved with the model")
    add("--resume", action="store_true", help="go on from the newest checkpoint in --output_dir")
    add("--overwrite", action="store_true", help="start over in a used --output_dir")
    return parser


def fit(
    module: str,
    data_module: str,
    args: argparse.Namespace,
    model: dict[str, Any],
    data: dict[str, Any] | None = None,
    keep: int = 2,
) -> int:
    """Run `minigpt fit` with the chosen flags; return the exit status."""
    from minigpt.__main__ import main

    if data_module == "GRPODataModule":
        batch = {"data.prompts_per_batch": args.batch_size}
    else:  # two answers to a prompt may be two rows long
        rows = 2 if data_module in ("DPODataModule", "KTODataModule") else 1
        batch = {"data.tokens_per_batch": args.batch_size * args.max_length * rows}
    options: dict[str, Any] = {
        "run_dir": args.output_dir,
        "overwrite": args.overwrite,
        "ckpt_path": "auto" if args.resume else None,
        "checkpoint.every": args.save_steps,
        "checkpoint.keep": keep,
        "model": module,
        "model.init_from": args.model_path,
        "model.tokenizer": args.tokenizer_path,
        **{f"model.{name}": value for name, value in model.items()},
        "model.optimizer.lr": args.learning_rate,
        "data": data_module,
        "data.train": args.data_file,
        **validation(args),
        "data.max_length": args.max_length,
        **batch,
        "data.data_limit": args.data_limit,
        **{f"data.{name}": value for name, value in (data or {}).items()},
        "trainer.max_epochs": args.num_epochs,
        "trainer.accumulate_grad_batches": args.gradient_accumulation_steps,
        "trainer.log_every_n_steps": args.logging_steps,
        "trainer.precision": "16-mixed" if args.fp16 else None,
    }
    arguments = [f"--{name}={value}" for name, value in options.items() if value is not None]
    return main(["fit", *arguments])


def validation(args: argparse.Namespace) -> dict[str, Any]:
    """Return the held-out file, or the share of rows to hold out."""
    file = Path(args.data_file)
    beside = file.with_name(f"{file.stem}_val{file.suffix}")
    if args.val_file or beside.is_file():
        return {"data.val": args.val_file or str(beside)}
    enough = (args.data_limit or ENOUGH_ROWS) >= ENOUGH_ROWS and has_enough_rows(file)
    return {"data.val_share": 0.05 if enough else 0}


def has_enough_rows(file: Path) -> bool:
    """Whether a file has enough lines to hold some out."""
    if not file.is_file():
        return False  # training says so, with the remedy
    with file.open("rb") as lines:
        return len(list(islice(lines, ENOUGH_ROWS))) == ENOUGH_ROWS
