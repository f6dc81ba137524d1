"""`minigpt bench train`: useful tokens per second of a stage against the plain loop."""

from __future__ import annotations

import json
import logging
import tempfile
from argparse import Namespace
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from minigpt.bench.baseline import Job
from minigpt.bench.measure import (
    Result,
    alternate,
    dense_peak,
    matmul_peak,
    middle,
    spawn,
    surroundings,
)
from minigpt.commands.options import CommandParser, positive
from minigpt.data.store import Limits, TokenStore, open_store
from minigpt.errors import ConfigError
from minigpt.files import write_json

EXAMPLES = """examples:
  minigpt bench train --stage pretrain --data data/pretrain.jsonl
  minigpt bench train --stage sft --data data/sft.jsonl --max-length 768 --json sft.json
  minigpt bench train --stage dpo --data data/dpo.jsonl --max-length 1024 --rows 64
"""
# Class of the module and of its data, kind of row, and the rows (pairs, blocks) of a step.
STAGES: dict[str, tuple[str, str, Any, int]] = {
    "pretrain": ("PretrainModule", "PretrainDataModule", "text", 8),
    "sft": ("SFTModule", "SFTDataModule", "chat", 16),
    "dpo": ("DPOModule", "DPODataModule", "preference", 4),
    "lora": ("LoRAModule", "SFTDataModule", "chat", 32),
}
FOREVER = 100_000


def main(args: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="minigpt bench train",
        description="Measure a stage against a plain transformers loop, in alternating processes.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--stage", choices=STAGES, required=True)
    parser.add_argument("--data", required=True, help="JSONL of the stage's rows")
    work_options(parser)
    parser.add_argument("--batch-size", "--batch_size", type=positive, help="rows of a step")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw", help="of ours")
    parser.add_argument("--repeats", type=positive, default=3, help="of each arm (3)")
    parser.add_argument("--steps", type=positive, default=FOREVER, help="measured steps at most")
    parser.add_argument("--seconds", type=float, default=12.0, help="measured seconds (12)")
    chosen = parser.parse_args(args)
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as work:
        report = measure(chosen, Path(work))
    publish(report, chosen.json)


def work_options(parser: CommandParser) -> None:
    """Add the options that name the work."""
    parser.add_argument("--max-length", "--max_length", type=positive, default=512)
    parser.add_argument("--rows", type=positive, help="use only the first rows of the data")
    parser.add_argument("--size", default="26m", help="name in configs/size, or a YAML file (26m)")
    parser.add_argument("--tokenizer", help="directory; by default 6,400 tokens trained on --data")
    parser.add_argument("--precision", help="bf16-mixed or 32-true; by default what is fast here")
    parser.add_argument("--json", help="where to write the result")


def publish(report: Result, path: str | None) -> None:
    """Print the figures, and write them all if asked to."""
    for name, value in report.items():
        if isinstance(value, int | float | str):
            print(f"{name:32} {value:,.4g}" if isinstance(value, float) else f"{name:32} {value}")
    if path:
        write_json(Path(path), report)


@dataclass(frozen=True)
class Work:
    """What both arms train: the start, the rows, and how much a step takes."""

    place: Path
    model: Path
    store: TokenStore
    precision: str
    device: str
    batch_size: int
    tokens_per_batch: int
    matrices: int
    attention: float

    def flops(self, factor: int) -> float:
        """Return the operations that one useful token takes to train on."""
        return factor * self.matrices + 6 * self.attention


def prepare(chosen: Namespace, place: Path) -> Work:
    """Make the tokenizer, the model's start and the token store."""
    import torch

    from minigpt.cli import choose_precision, quiet
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.build import Architecture, build_native
    from minigpt.model.saved import save_model

    quiet()
    precision = str(choose_precision(chosen.precision, "auto"))
    given = chosen.tokenizer
    tokenizer = tokenizers.load(given) if given else tokenizers.train([chosen.data], 6400)
    sizes = Architecture(**architecture(chosen.size))
    torch.manual_seed(0)
    model = build_native(sizes, tokenizer)
    save_model(model, tokenizer, place / "start")
    kind, batch_size = STAGES[chosen.stage][2:]
    limits = Limits(chosen.max_length, data_limit=chosen.rows, on_bad_row="skip")
    store = open_store(
        *(chosen.data, kind, tokenizers.load(place / "start"), limits), place / "cache"
    )
    batch_size = getattr(chosen, "batch_size", None) or batch_size
    mean, square = moments(store)
    linear = (m for m in model.modules() if isinstance(m, torch.nn.Linear))
    return Work(
        place=place,
        model=place / "start",
        store=store,
        precision=precision,
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        tokens_per_batch=budget(chosen.stage, batch_size, chosen.max_length, mean),
        matrices=sum(layer.weight.numel() for layer in linear),
        attention=sizes.layers * sizes.heads * sizes.head_dim * square / mean,
    )


def architecture(size: str) -> dict[str, int]:
    """Read a size's overlay.

    Raises:
        ConfigError: when there is none of that name.
    """
    here = Path(__file__).resolve().parents[2] / "configs" / "size" / f"{size}.yaml"
    path = here if here.is_file() else Path(size)
    if not path.is_file():
        raise ConfigError(f"--size {size}: there is no {here} and no such file. Try 26m.")
    sizes: dict[str, int] = yaml.safe_load(path.read_text())["model"]["init_args"]["architecture"]
    return sizes


def moments(store: TokenStore) -> tuple[float, float]:
    """Return a sample's mean tokens, and the mean of its rows' squared lengths."""
    prompt, first, second = (np.asarray(store.samples[n], float) for n in SAMPLE_RUNS)
    squares = (prompt + first) ** 2 + np.where(second > 0, (prompt + second) ** 2, 0)
    return float((prompt + first + second).mean()), float(squares.mean())


SAMPLE_RUNS = ("prompt", "first", "second")


def budget(stage: str, batch_size: int, max_length: int, mean: float) -> int:
    """Return the tokens of our step: as many as the baseline's has without its padding."""
    if stage == "pretrain":
        return batch_size * max_length
    return max(round(batch_size * mean), max_length * (2 if stage == "dpo" else 1))


def measure(chosen: Namespace, place: Path) -> Result:
    """Run all arms and return what is reported."""
    work = prepare(chosen, place)
    arms = {"minigpt": partial(our_arm, chosen, work)}
    if chosen.stage == "dpo":
        arms["live"] = partial(our_arm, chosen, work, reference="model")
    arms["baseline"] = partial(their_arm, chosen, work)
    arms["matmul"] = lambda _: {"flops": matmul_peak(work.precision, work.device)}
    results = alternate(arms, chosen.repeats)
    return {**named(chosen, work), **figures(chosen, work, results), "runs": results}


def named(chosen: Namespace, work: Work) -> Result:
    """Return what was measured, and where."""
    return {
        "stage": chosen.stage,
        "size": chosen.size,
        "data": Path(chosen.data).name,
        "samples": len(work.store),
        "max_length": chosen.max_length,
        "batch_size": work.batch_size,
        "tokens_per_batch": work.tokens_per_batch,
        "precision": work.precision,
        "optimizer": chosen.optimizer,
        **surroundings(),
    }


def figures(chosen: Namespace, work: Work, results: dict[str, list[Result]]) -> Result:
    """Turn the runs into the figures of the report."""
    ours, theirs = results["minigpt"], results["baseline"]
    unit = "pairs_per_s" if chosen.stage == "dpo" else "tokens_per_s"
    speed = middle(ours, "tokens_per_s")
    peak = max(result["flops"] for result in results["matmul"])
    # A frozen matrix needs no gradient of its own: LoRA takes 4 instead of 6 per weight.
    flops = speed * work.flops(4 if chosen.stage == "lora" else 6)
    report: Result = {
        "useful_tokens_per_s": speed,
        "baseline_useful_tokens_per_s": middle(theirs, "tokens_per_s"),
        "ratio": middle(ours, unit) / middle(theirs, unit),
        "gemm_peak_fraction": flops / peak,
        "gemm_peak_gflops": peak / 1e9,
        "gemm_precision": "bf16" if work.precision.startswith("bf16") else "fp32",
        "first_step_s": middle(ours, "first_step_s"),
    }
    for name in ("peak_rss_mb", "peak_gpu_mb"):
        if name in ours[0]:
            report |= {name: middle(ours, name), f"baseline_{name}": middle(theirs, name)}
    if chosen.stage == "dpo":
        live = results["live"]
        report["pairs_per_s"], report["live_pairs_per_s"] = middle(ours, unit), middle(live, unit)
        report["baseline_pairs_per_s"] = middle(theirs, unit)
        report["ratio_live"] = middle(live, unit) / middle(theirs, unit)
        report["live_peak_rss_mb"] = middle(live, "peak_rss_mb")
    if (dense := dense_peak(work.device)) is not None:
        report["mfu"] = flops / dense
    return report


def our_arm(chosen: Namespace, work: Work, repeat: int, reference: str = "precomputed") -> Result:
    """Run `minigpt fit` and read its speed from what it logged; the first step warms up."""
    run_dir = work.place / f"run-{reference}-{repeat}"
    made = config(chosen, work, run_dir, repeat)
    if chosen.stage == "dpo":
        made["model"]["init_args"]["reference"] = reference
    file = work.place / "fit.yaml"
    file.write_text(json.dumps(made))  # JSON is YAML
    started = spawn(["minigpt", "fit", "--config", str(file)], "minigpt fit")
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    steps = [row for row in map(json.loads, lines) if "tokens_seen" in row]
    return our_speed(steps) | {
        "first_step_s": steps[0]["time"] - started,
        "loss": steps[-1]["train/loss"],
        **{
            name: value
            for name, value in json.loads((run_dir / "summary.json").read_text()).items()
            if name.startswith("peak_")
        },
    }


def our_speed(steps: list[Result]) -> Result:
    """Return tokens (and pairs) per second from the end of the first step on."""
    seconds = steps[-1]["time"] - steps[0]["time"]
    tokens = steps[-1]["tokens_seen"] - steps[0]["tokens_seen"]
    pairs = sum(row.get("train/pairs", 0.0) for row in steps[1:])
    return {"tokens_per_s": tokens / seconds, "pairs_per_s": pairs / seconds}


def config(chosen: Namespace, work: Work, run_dir: Path, seed: int) -> Result:
    """Return the config of our arm: the stage as users run it, without validation."""
    module, data, _, _ = STAGES[chosen.stage]
    start: Result = {
        "init_from": str(work.model),
        "optimizer": {"name": chosen.optimizer, "lr": 1e-4},
    }
    if chosen.stage == "lora":
        start["lora"] = {"r": Job.rank, "alpha": 2 * Job.rank, "dropout": 0.0}
    rows = {
        "train": chosen.data,
        "val_share": 0.0,
        "max_length": chosen.max_length,
        "tokens_per_batch": work.tokens_per_batch,
        "data_limit": chosen.rows,
        "on_bad_row": "skip",
        "seed": seed,
        "cache_dir": str(work.place / "cache"),
    }
    return {
        "run_dir": str(run_dir),
        "model": {"class_path": module, "init_args": start},
        "data": {"class_path": data, "init_args": rows},
        "trainer": {
            "max_steps": chosen.steps + 1,
            "min_steps": 2,
            "min_epochs": 0,  # else the time is looked at after a whole epoch
            "max_time": {"seconds": max(1, round(chosen.seconds))},
            "precision": work.precision,
            "log_every_n_steps": 1,
            "enable_progress_bar": False,
        },
        "checkpoint": {"every": FOREVER},
    }


def their_arm(chosen: Namespace, work: Work, repeat: int) -> Result:
    """Run the plain loop."""
    job = Job(
        stage=chosen.stage,
        model=str(work.model),
        stores=(str(work.store.path), None),
        batch_size=work.batch_size,
        max_length=chosen.max_length,
        precision=work.precision,
        device=work.device,
        steps=chosen.steps,
        seconds=chosen.seconds,
        seed=repeat,
    )
    return run_baseline(job, work.place)


def run_baseline(job: Job, place: Path) -> Result:
    """Run the plain loop in a process of its own; return its figures with its speed."""
    file, result = place / "job.json", place / "result.json"
    file.write_text(json.dumps(asdict(job)))
    spawn(["minigpt.bench.baseline", str(file), str(result)], "The baseline")
    done: Result = json.loads(result.read_text())
    seconds = done["seconds"]
    return done | {
        "tokens_per_s": done["tokens"] / seconds,
        "pairs_per_s": done["samples"] / seconds,
    }


logging.getLogger("transformers").setLevel(logging.ERROR)
