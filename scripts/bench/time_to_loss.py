"""Time to a held-out loss: what a plain AdamW loop reaches, and how much sooner we do.

    python scripts/bench/time_to_loss.py --data texts.jsonl --val val.jsonl --seconds 600 --share 8

The plain loop (baseline.py) trains for --seconds once for each learning rate, which
falls to 0 along a cosine over that time; its best held-out loss counts. Then `minigpt fit` gets a
--share'th of the time: as many steps as it makes in it, by a short run before.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

from baseline import LoopConfig
from measure import (
    FOREVER,
    PRECISIONS,
    Result,
    architecture,
    fit,
    publish,
    run,
    surroundings,
)
from train import Workload, config, prepare, run_baseline

from minigpt.cli.options import CommandParser
from minigpt.data import tokenizer as tokenizers
from minigpt.data.store import Limits, open_store

SHORT_RUN = 10  # steps that are timed first


def run_plain_loop(args: argparse.Namespace, work: Workload, val: Path) -> dict[float, Result]:
    """Train the plain loop at each learning rate."""
    runs = {}
    for lr in args.baseline_lrs:
        loop = LoopConfig(
            stage="pretrain",
            model=work.start,
            stores=(str(work.store.path), str(val)),
            batch_size=work.batch_size,
            max_length=args.max_length,
            tokens_per_batch=args.tokens_per_batch,
            precision=work.precision,
            device=work.device,
            steps=FOREVER,
            seconds=args.seconds,
            lr=lr,
            decay=True,
        )
        runs[lr] = run_baseline(loop, work.directory)
        print(f"plain loop, lr {lr}: {runs[lr]['held_out']:.4f}", file=sys.stderr, flush=True)
    return runs


def train(
    args: argparse.Namespace, work: Workload, name: str, steps: int, val: str | None
) -> Result:
    """Run `minigpt fit`; return its summary with the seconds that training took."""
    options = config(work, "model", work.directory / name, seed=0)
    options["model"]["init_args"] |= {
        "optimizer": {"name": args.optimizer, "lr": args.lr, "adamw_lr": args.adamw_lr},
        "schedule": {"name": "wsd", "decay": args.decay},
        "tokenizer": options["model"]["init_args"].pop("init_from"),
        "architecture": architecture(args.size),
        "compile_layers": False,  # the seconds that are reported would leave that out
    }
    options["data"]["init_args"] |= {"val": val, "tokens_per_batch": args.tokens_per_batch}
    options["trainer"] |= {"max_steps": steps, "max_time": None, "log_every_n_steps": 10}
    options["trainer"] |= {"val_check_interval": steps, "limit_val_batches": 1.0 if val else 0.0}
    _, summary, _ = fit(options)
    return summary | {"train_s": summary["tokens_seen"] / summary["useful_tokens_per_s"]}


def run_minigpt(args: argparse.Namespace, work: Workload) -> Result:
    """Train for the share of the time."""
    step = train(args, work, "short", SHORT_RUN, None)["train_s"] / SHORT_RUN
    steps = max(2, round(args.seconds / args.share / step))
    return train(args, work, "long", steps, str(Path(args.val).resolve()))


def measure(args: argparse.Namespace, directory: Path) -> Result:
    """Run both sides and return what is reported."""
    work = prepare(args, directory)
    tokenizer = tokenizers.load(work.start)
    limits = Limits(args.max_length, data_limit=args.rows, on_bad_row="skip")
    val = open_store(args.val, "text", tokenizer, limits, directory / "cache")
    runs = run_plain_loop(args, work, val.path)
    best = min(runs, key=lambda lr: runs[lr]["held_out"])
    ours = run_minigpt(args, work)
    return {
        "data": Path(args.data).resolve().name,
        "size": args.size,
        "optimizer": args.optimizer,
        "precision": work.precision,
        **surroundings(),
        "baseline_lr": best,
        "baseline_loss": runs[best]["held_out"],
        "baseline_s": runs[best]["seconds"],
        "loss": ours["final"]["val/loss"],
        "seconds": ours["train_s"],
        "times_sooner": runs[best]["seconds"] / ours["train_s"],
        "reached": str(ours["final"]["val/loss"] <= runs[best]["held_out"]),
        "runs": {"baseline": {str(lr): run for lr, run in runs.items()}, "minigpt": ours},
    }


def main(arguments: list[str]) -> None:
    parser = CommandParser(prog="scripts/bench/time_to_loss.py", description=__doc__)
    parser.set_defaults(model=None)  # random weights
    parser.add_argument("--data", required=True)
    parser.add_argument("--val", required=True)
    parser.add_argument("--seconds", type=float, default=600.0, help="for the plain loop (600)")
    parser.add_argument("--share", type=float, default=8.0, help="we get 1/SHARE of it (8)")
    parser.add_argument("--baseline_lrs", type=float, nargs="+", default=[3e-4, 1e-3, 3e-3])
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="ours")
    parser.add_argument("--lr", type=float, default=3e-3, help="ours; with muon, of its matrices")
    parser.add_argument("--adamw_lr", type=float, default=1e-2, help="with muon, of the rest")
    parser.add_argument("--decay", type=float, default=0.8, help="share of our steps that fall")
    parser.add_argument("--tokens_per_batch", type=int, default=1024, help="of our step")
    parser.add_argument("--max_length", type=int, default=512)
    parser.add_argument("--batch_size", type=int, default=8, help="blocks of the plain loop's step")
    parser.add_argument("--rows", type=int, help="use only the first rows")
    parser.add_argument("--size", default="26m")
    parser.add_argument("--tokenizer", help="directory; by default one is trained on --data")
    parser.add_argument("--vocabulary", type=int, default=6400, help="tokens of that one (6,400)")
    parser.add_argument("--precision", choices=PRECISIONS, help="by default what is fast here")
    parser.add_argument("--json")
    args = parser.parse_args(arguments)
    args.stage, args.steps = "pretrain", FOREVER
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as directory:
        publish(measure(args, Path(directory)), args.json)


if __name__ == "__main__":
    sys.exit(run(main))
