"""Time to a held-out loss: what a plain AdamW loop reaches, and how much sooner we do.

    python scripts/time_to_loss.py --data texts.jsonl --val val.jsonl --seconds 600 --share 8

The plain loop (minigpt/bench/baseline.py) trains for --seconds once for each learning rate, which
falls to 0 along a cosine over that time; its best held-out loss counts. Then `minigpt fit` gets a
--share'th of the time: as many steps as it makes in it, by a short run before.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from minigpt.__main__ import ended_whole
from minigpt.bench.baseline import Job
from minigpt.bench.measure import (
    PRECISIONS,
    Result,
    architecture,
    publish,
    spawn,
    surroundings,
)
from minigpt.bench.train import FOREVER, Work, config, prepare, run_baseline
from minigpt.data import tokenizer as tokenizers
from minigpt.data.store import Limits, open_store

MEASURED = 10  # steps of the short run


def theirs(chosen: argparse.Namespace, work: Work, val: Path) -> dict[float, Result]:
    """Train the plain loop at each learning rate."""
    runs = {}
    for lr in chosen.baseline_lrs:
        job = Job(
            stage="pretrain",
            model=work.start,
            stores=(str(work.store.path), str(val)),
            batch_size=work.batch_size,
            max_length=chosen.max_length,
            tokens_per_batch=chosen.tokens_per_batch,
            precision=work.precision,
            device=work.device,
            steps=FOREVER,
            seconds=chosen.seconds,
            lr=lr,
            decay=True,
        )
        runs[lr] = run_baseline(job, work.place)
        print(f"plain loop, lr {lr}: {runs[lr]['held_out']:.4f}", file=sys.stderr, flush=True)
    return runs


def fit(chosen: argparse.Namespace, work: Work, name: str, steps: int, val: str | None) -> Result:
    """Run `minigpt fit`; return its summary with the seconds that training took."""
    made: Any = config(work, "model", work.place / name, seed=0)
    made["model"]["init_args"] |= {
        "optimizer": {"name": chosen.optimizer, "lr": chosen.lr, "adamw_lr": chosen.adamw_lr},
        "schedule": {"name": "wsd", "decay": chosen.decay},
        "tokenizer": made["model"]["init_args"].pop("init_from"),
        "architecture": architecture(chosen.size),
        "compile_layers": False,  # the seconds that are reported would leave that out
    }
    made["data"]["init_args"] |= {"val": val, "tokens_per_batch": chosen.tokens_per_batch}
    made["trainer"] |= {"max_steps": steps, "max_time": None, "log_every_n_steps": 10}
    made["trainer"] |= {"val_check_interval": steps, "limit_val_batches": 1.0 if val else 0.0}
    file = work.place / f"{name}.yaml"
    file.write_text(json.dumps(made))
    spawn(["minigpt", "fit", "--config", str(file)], "minigpt fit")
    summary: Result = json.loads((work.place / name / "summary.json").read_text())
    return summary | {"train_s": summary["tokens_seen"] / summary["useful_tokens_per_s"]}


def ours(chosen: argparse.Namespace, work: Work) -> Result:
    """Train for the share of the time."""
    step = fit(chosen, work, "short", MEASURED, None)["train_s"] / MEASURED
    steps = max(2, round(chosen.seconds / chosen.share / step))
    return fit(chosen, work, "long", steps, str(Path(chosen.val).resolve()))


def measure(chosen: argparse.Namespace, place: Path) -> Result:
    """Run both sides and return what is reported."""
    work = prepare(chosen, place)
    tokenizer = tokenizers.load(work.start)
    limits = Limits(chosen.max_length, data_limit=chosen.rows, on_bad_row="skip")
    val = open_store(chosen.val, "text", tokenizer, limits, place / "cache")
    runs = theirs(chosen, work, val.path)
    best = min(runs, key=lambda lr: runs[lr]["held_out"])
    done = ours(chosen, work)
    return {
        "data": Path(chosen.data).resolve().name,
        "size": chosen.size,
        "optimizer": chosen.optimizer,
        "precision": work.precision,
        **surroundings(),
        "baseline_lr": best,
        "baseline_loss": runs[best]["held_out"],
        "baseline_s": runs[best]["seconds"],
        "loss": done["final"]["val/loss"],
        "seconds": done["train_s"],
        "times_sooner": runs[best]["seconds"] / done["train_s"],
        "reached": str(done["final"]["val/loss"] <= runs[best]["held_out"]),
        "runs": {"baseline": {str(lr): run for lr, run in runs.items()}, "minigpt": done},
    }


def main(args: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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
    chosen = parser.parse_args(args)
    chosen.stage, chosen.steps = "pretrain", FOREVER
    with ended_whole(), tempfile.TemporaryDirectory(prefix="minigpt-bench-") as place:
        publish(measure(chosen, Path(place)), chosen.json)


if __name__ == "__main__":
    main()
