"""`minigpt bench train`: useful tokens per second of a stage against the plain loop."""

from __future__ import annotations

import json
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np

from minigpt.bench.baseline import LEAST, Job
from minigpt.bench.measure import (
    HALVES,
    PRECISIONS,
    Result,
    alternate,
    architecture,
    dense_peak,
    matmul_peak,
    middle,
    publish,
    spawn,
    surroundings,
    told,
)
from minigpt.cli.options import CommandParser, positive
from minigpt.data.store import Limits, TokenStore, open_store

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
ARMS = {"MiniGPT": "", "live reference": "live_", "plain loop": "baseline_", "TRL": "trl_"}
SHOWN = {
    "useful tokens/s": "useful_tokens_per_s",
    "pairs/s": "pairs_per_s",
    "peak memory, MB": "peak_rss_mb",
    "peak GPU memory, MB": "peak_gpu_mb",
}


def main(args: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="minigpt bench train",
        description="Measure a stage against a plain transformers loop, in alternating processes.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--data", required=True, help="JSONL of the stage's rows")
    add("--rows", type=positive, help="use only the first rows of the data (dpo: 64)")
    add("--max-length", "--max_length", type=positive, default=512, help="of a sample (512)")
    add("--batch-size", "--batch_size", type=positive, help="rows, pairs or blocks of a step")
    add("--size", default="26m", help="name in configs/size, or a YAML file (26m)")
    add("--model", help="run directory, HF directory or hub id to start from, in place of --size")
    add("--tokenizer", help="directory; by default one is trained on --data")
    add("--vocabulary", type=positive, default=6400, help="tokens of that one (6,400)")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="of our arm (adamw)")
    add("--precision", choices=PRECISIONS, help="of all arms; by default what is fast here")
    add("--repeats", type=positive, default=3, help="of each arm (3)")
    add("--steps", type=positive, default=FOREVER, help="steps to measure at most")
    add("--seconds", type=positive, default=12, help=f"measured in each run (12), or {LEAST} steps")
    add("--json", help="where to write the result")
    chosen = parser.parse_args(args)
    if chosen.stage == "dpo":  # the first run computes the reference's log-probs of them all
        chosen.rows = chosen.rows or 64
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as place:
        report = measure(prepare(chosen, Path(place)))
    print(table(report))
    publish(report, chosen.json)


@dataclass(frozen=True)
class Work:
    """What all arms train: the start, the rows, and how much a step takes."""

    chosen: Namespace
    place: Path
    start: str
    store: TokenStore
    precision: str
    device: str
    batch_size: int
    tokens_per_batch: int
    sample_tokens: float
    vocabulary: int
    matrices: int
    attention: float


def prepare(chosen: Namespace, place: Path) -> Work:
    """Make the tokenizer, the model's start and the token store."""
    import torch

    from minigpt.cli.trainer import choose_precision, quiet
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.pretrained import find_model, load_model
    from minigpt.model.rope import check_length

    quiet()
    torch.manual_seed(0)
    _, _, kind, usual = STAGES[chosen.stage]
    start = str(find_model(chosen.model) if chosen.model else new_model(chosen, place / "start"))
    model = load_model(start)
    check_length(model.config, chosen.max_length, kind, "--max-length")
    limits = Limits(chosen.max_length, data_limit=chosen.rows, on_bad_row="skip")
    tokenizer = tokenizers.load(start)
    store = open_store(chosen.data, kind, tokenizer, limits, place / "cache")
    mean, square = moments(store)
    linear = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    batch_size = chosen.batch_size or usual
    return Work(
        *(chosen, place, start, store),
        str(choose_precision(PRECISIONS.get(chosen.precision), "auto")),
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        tokens_per_batch=budget(chosen.stage, batch_size, chosen.max_length, mean),
        sample_tokens=mean,
        vocabulary=len(tokenizer),
        matrices=sum(layer.weight.numel() for layer in linear),
        attention=attention_width(model.config) * square / mean,
    )


def new_model(chosen: Namespace, directory: Path) -> Path:
    """Write a model of the size that is asked for, with random weights, and its tokenizer."""
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import save_model

    if chosen.tokenizer:
        tokenizer = tokenizers.load(chosen.tokenizer)
    else:
        tokenizer = tokenizers.train([chosen.data], chosen.vocabulary)
    sizes = Architecture(**architecture(chosen.size))
    save_model(build_native(sizes, tokenizer), tokenizer, directory)
    return directory


def attention_width(config: Any) -> int:
    """Return layers × heads × width of a head."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers * heads * width)


def moments(store: TokenStore) -> tuple[float, float]:
    """Return a sample's mean tokens, and the mean of its rows' squared lengths, summed."""
    runs = (np.asarray(store.samples[name], float) for name in ("prompt", "first", "second"))
    prompt, first, second = runs
    squares = (prompt + first) ** 2 + np.where(second > 0, (prompt + second) ** 2, 0)
    return float((prompt + first + second).mean()), float(squares.mean())


def budget(stage: str, batch_size: int, max_length: int, mean: float) -> int:
    """Return the tokens of our step: as many as the baseline's has without its padding."""
    if stage == "pretrain":
        return batch_size * max_length
    return max(round(batch_size * mean), max_length * (2 if stage == "dpo" else 1))


def measure(work: Work) -> Result:
    """Run all arms and return what is reported."""
    chosen = work.chosen
    arms: dict[str, Callable[[int], Result]] = {"minigpt": partial(our_arm, work, "precomputed")}
    if chosen.stage == "dpo":
        arms["live"] = partial(our_arm, work, "model")
    arms["baseline"] = partial(their_arm, work, "minigpt.bench.baseline")
    if find_spec("trl"):
        arms["trl"] = partial(their_arm, work, "minigpt.bench.peer")
    arms["matmul"] = lambda _: {"flops": matmul_peak(work.precision, work.device)}
    results = alternate(arms, chosen.repeats)
    results["start"] = [our_start(work)]
    names = ("stage", "size", "max_length", "optimizer", "repeats")
    return {
        **{name: getattr(chosen, name) for name in names},
        "data": Path(chosen.data).resolve().name,
        "vocabulary": work.vocabulary,
        "samples": len(work.store),
        "batch_size": work.batch_size,
        "tokens_per_batch": work.tokens_per_batch,
        "precision": work.precision,
        **surroundings(),
        **figures(work, results),
        "runs": results,
    }


def figures(work: Work, results: dict[str, list[Result]]) -> Result:
    """Turn the runs into the figures of the report."""
    ours, theirs, live, trl = (
        results.get(name, []) for name in ("minigpt", "baseline", "live", "trl")
    )
    unit = "useful_tokens_per_s"
    peak = max(result["flops"] for result in results["matmul"])
    # A frozen matrix needs no gradient of its own: LoRA takes 4 instead of 6 per weight.
    factor = 4 if work.chosen.stage == "lora" else 6
    flops = middle(ours, unit) * (factor * work.matrices + 6 * work.attention)
    report: Result = {
        "ratio": middle(ours, unit) / middle(theirs, unit),
        "gemm_peak_fraction": flops / peak,
        "gemm_peak_gflops": peak / 1e9,
        "gemm_precision": HALVES.get(work.precision, "fp32"),
        "first_step_s": middle(results["start"], "first_step_s"),
        "warm_up_s": middle(ours, "first_step_s"),
    }
    if live:
        report["ratio_live"] = middle(live, unit) / middle(theirs, unit)
    if trl:
        report["ratio_trl"] = middle(ours, unit) / middle(trl, unit)
    arms = {"": ours, "baseline_": theirs, "live_": live, "trl_": trl}
    for arm, runs in ((arm, runs) for arm, runs in arms.items() if runs):
        for name in [n for n in ours[0] if n == unit or n.startswith("peak_")]:
            report[arm + name] = middle(runs, name)
        if live:  # by the data's mean: the few pairs of a short run may be short or long ones
            report[f"{arm}pairs_per_s"] = middle(runs, unit) / work.sample_tokens
    dense = dense_peak(work.device)
    return report | ({"mfu": flops / dense} if dense else {})


def table(report: Result) -> str:
    """Return the arms side by side, under what they did."""
    arms = {title: arm for title, arm in ARMS.items() if f"{arm}useful_tokens_per_s" in report}
    lines = [
        f"{report['stage']} on {report['data']}: {report['size']}, at most {report['max_length']} "
        f"tokens, {report['threads']} threads, both sides in {report['precision']}.",
        f"A large matmul reaches {report['gemm_peak_gflops']:,.0f} GFLOP/s in "
        f"{report['gemm_precision']}; the step {report['gemm_peak_fraction']:.0%} of that.",
        "",
        " " * 20 + "".join(f"{title:>16}" for title in arms),
    ]
    for title, name in SHOWN.items():
        if name in report:
            values = (told(report[arm + name]) for arm in arms.values())
            lines.append(f"{title:20}" + "".join(f"{value:>16}" for value in values))
    ratios = [f"{report[r]:.2f}x" for r in ("ratio", "ratio_live") if r in report]
    return "\n".join([*lines, f"{'ratio':20}" + "".join(f"{r:>16}" for r in ratios), ""])


def our_arm(work: Work, reference: str, repeat: int) -> Result:
    """Run `minigpt fit` and read its speed from what it logged; the first step warms up."""
    return fit(work, config(work, reference, work.place / f"run-{reference}-{repeat}", repeat))


def our_start(work: Work) -> Result:
    """Run a single step: so short a run compiles nothing."""
    made = config(work, "model", work.place / "run-start", 0)
    made["trainer"] |= {"max_steps": 1, "min_steps": 1, "log_every_n_steps": 1}
    return fit(work, made)


def fit(work: Work, made: Result) -> Result:
    """Run `minigpt fit`; return what it took, and its speed after the first step."""
    file = work.place / "fit.yaml"
    file.write_text(json.dumps(made))  # JSON is YAML
    started = spawn(["minigpt", "fit", "--config", str(file)], "minigpt fit")
    run_dir = Path(made["run_dir"])
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    first, *steps = [row for row in map(json.loads, lines) if "tokens_seen" in row]
    done = {"first_step_s": first["time"] - started}
    if not steps:
        return done
    seconds = steps[-1]["time"] - first["time"]
    summary = json.loads((run_dir / "summary.json").read_text())
    return done | {
        "useful_tokens_per_s": (steps[-1]["tokens_seen"] - first["tokens_seen"]) / seconds,
        "steps": steps[-1]["step"] - first["step"],
        "loss": steps[-1]["train/loss"],
        **{name: value for name, value in summary.items() if name.startswith("peak_")},
    }


def config(work: Work, reference: str, run_dir: Path, seed: int) -> Result:
    """Return the config of our arm: the stage as users run it, without validation."""
    chosen = work.chosen
    module, data, _, _ = STAGES[chosen.stage]
    start: Result = {
        "init_from": work.start,
        "optimizer": {"name": chosen.optimizer, "lr": Job.lr},
    }
    if chosen.stage == "lora":
        start["lora"] = {"r": Job.rank, "alpha": 2 * Job.rank, "dropout": 0.0}
    if chosen.stage == "dpo":
        start["reference"] = reference
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
    # A GPU waits for each step whose numbers are written, so that most are not.
    every = 5 if work.device == "cuda" and chosen.steps >= 10 else 1
    trainer = {
        "max_steps": chosen.steps + 1,
        "min_steps": 1 + min(LEAST * every, chosen.steps),
        "min_epochs": 0,  # else the time is looked at after a whole epoch only
        "max_time": {"seconds": chosen.seconds},
        "precision": work.precision,
        "accelerator": "gpu" if work.device == "cuda" else "cpu",
        "devices": 1,  # as the plain loop
        "log_every_n_steps": every,
        "enable_progress_bar": False,
    }
    return {
        "run_dir": str(run_dir),
        "model": {"class_path": module, "init_args": start},
        "data": {"class_path": data, "init_args": rows},
        "trainer": trainer,
        "checkpoint": {"every": FOREVER},
    }


def their_arm(work: Work, module: str, repeat: int) -> Result:
    """Run the plain loop, or the peer of the same interface."""
    job = Job(
        stage=work.chosen.stage,
        model=work.start,
        stores=(str(work.store.path), None),
        batch_size=work.batch_size,
        max_length=work.chosen.max_length,
        tokens_per_batch=work.tokens_per_batch,
        precision=work.precision,
        device=work.device,
        steps=work.chosen.steps,
        seconds=work.chosen.seconds,
        seed=repeat,
    )
    return run_baseline(job, work.place, module)


def run_baseline(job: Job, place: Path, module: str = "minigpt.bench.baseline") -> Result:
    """Run the plain loop in a process of its own; return its figures with its speed."""
    file, result = place / "job.json", place / "result.json"
    file.write_text(json.dumps(asdict(job)))
    spawn([module, str(file), str(result)], f"python -m {module}")
    done: Result = json.loads(result.read_text())
    return done | {"useful_tokens_per_s": done["tokens"] / done["seconds"]}
