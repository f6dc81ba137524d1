"""Useful tokens per second of a stage of training against the plain loop."""

from __future__ import annotations

import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from baseline import MIN_STEPS, LoopConfig
from measure import (
    FOREVER,
    HALVES,
    PRECISIONS,
    Result,
    alternate,
    architecture,
    dense_peak,
    fit,
    matmul_peak,
    median_of,
    publish,
    run,
    side_by_side,
    spawn_arm,
    surroundings,
    trainer_options,
)

from minigpt.cli.options import CommandParser, positive, quiet
from minigpt.data.formats import Kind
from minigpt.data.store import Limits, TokenStore, open_store

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

EXAMPLES = """examples:
  python scripts/bench/train.py --stage pretrain --data data/pretrain.jsonl
  python scripts/bench/train.py --stage sft --data data/sft.jsonl --max-length 768 --json sft.json
  python scripts/bench/train.py --stage dpo --data data/dpo.jsonl --max-length 1024 --rows 64
"""
# Class of the module and of its data, kind of row, and the rows (pairs, blocks) of a step.
STAGES: dict[str, tuple[str, str, Kind, int]] = {
    "pretrain": ("PretrainModule", "PretrainDataModule", "text", 8),
    "sft": ("SFTModule", "SFTDataModule", "chat", 16),
    "dpo": ("DPOModule", "DPODataModule", "preference", 4),
    "lora": ("LoRAModule", "SFTDataModule", "chat", 32),
}
ARMS = {"MiniGPT": "", "live reference": "live_", "plain loop": "baseline_", "TRL": "trl_"}
TABLE_ROWS = {
    "useful tokens/s": "useful_tokens_per_s",
    "pairs/s": "pairs_per_s",
    "peak memory, MB": "peak_rss_mb",
    "peak GPU memory, MB": "peak_gpu_mb",
}


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="scripts/bench/train.py",
        description="Measure a stage against a plain transformers loop, in alternating processes.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--stage", choices=STAGES, required=True)
    add("--data", required=True, help="JSONL of the stage's rows")
    add("--rows", type=positive, help="use only the first rows of the data (dpo: 64)")
    add("--max-length", "--max_length", type=positive, default=512, help="of a sample (512)")
    add("--batch-size", "--batch_size", type=positive, help="rows, pairs or blocks of a step")
    add("--size", default="26m", help="name in configs/recipes, or a YAML file (26m)")
    add("--model", help="run directory, HF directory or hub id to start from, in place of --size")
    add("--tokenizer", help="directory; by default one is trained on --data")
    add("--vocabulary", type=positive, default=6400, help="tokens of that one (6,400)")
    add("--optimizer", choices=("adamw", "muon"), default="adamw", help="of our arm (adamw)")
    add("--precision", choices=PRECISIONS, help="of all arms; by default what is fast here")
    add("--repeats", type=positive, default=3, help="of each arm (3)")
    add("--steps", type=positive, default=FOREVER, help="steps to measure at most")
    add(
        "--seconds",
        type=positive,
        default=12,
        help=f"measured in each run (12), or {MIN_STEPS} steps",
    )
    add("--json", help="where to write the result")
    args = parser.parse_args(arguments)
    if args.stage == "dpo":  # the first run computes the reference's log-probs of them all
        args.rows = args.rows or 64
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as directory:
        report = measure(prepare(args, Path(directory)))
    print(table(report))
    publish(report, args.json)


@dataclass(frozen=True)
class Workload:
    """What all arms train: the start, the rows, and how much a step takes."""

    args: Namespace
    directory: Path
    start: str  # HF directory
    store: TokenStore
    precision: str
    device: str
    batch_size: int  # rows, pairs or blocks of a step of the other arms
    tokens_per_batch: int  # of our step
    sample_tokens: float  # mean of a sample
    vocabulary: int
    matrices: int  # weights of all linear layers
    attention: float  # multiplications a token of causal attention, in the forward pass

    @property
    def steps(self) -> int:
        """Steps to measure at most."""
        return int(self.args.steps)

    @property
    def seconds(self) -> float:
        """After which an arm stops."""
        seconds: float = self.args.seconds
        return seconds


def prepare(args: Namespace, directory: Path) -> Workload:
    """Make the tokenizer, the model's start and the token store."""
    import torch

    from minigpt.cli.settings import choose_precision
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.pretrained import find_model, load_model
    from minigpt.model.rope import check_length

    quiet()
    torch.manual_seed(0)
    _, _, kind, default_size = STAGES[args.stage]
    start = str(find_model(args.model) if args.model else new_model(args, directory / "start"))
    model = load_model(start)
    check_length(model.config, args.max_length, kind == "preference", "--max-length")
    limits = Limits(args.max_length, data_limit=args.rows, on_bad_row="skip")
    tokenizer = tokenizers.load(start)
    store = open_store(args.data, kind, tokenizer, limits, directory / "cache")
    mean, square = moments(store)
    linear = (layer for layer in model.modules() if isinstance(layer, torch.nn.Linear))
    batch_size = args.batch_size or default_size
    return Workload(
        args=args,
        directory=directory,
        start=start,
        store=store,
        precision=str(choose_precision(PRECISIONS.get(args.precision), "auto")),
        device="cuda" if torch.cuda.is_available() else "cpu",
        batch_size=batch_size,
        tokens_per_batch=budget(args.stage, batch_size, args.max_length, mean),
        sample_tokens=mean,
        vocabulary=len(tokenizer),
        matrices=sum(layer.weight.numel() for layer in linear),
        attention=attention_width(model.config) * square / mean,
    )


def new_model(args: Namespace, directory: Path) -> Path:
    """Write a model of the size that is asked for, with random weights, and its tokenizer."""
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import save_model

    if args.tokenizer:
        tokenizer = tokenizers.load(args.tokenizer)
    else:
        tokenizer = tokenizers.train([args.data], args.vocabulary)
    sizes = Architecture(**architecture(args.size))
    save_model(build_native(sizes, tokenizer), tokenizer, directory)
    return directory


def attention_width(config: PreTrainedConfig) -> int:
    """Return layers × heads × width of a head."""
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    return int(config.num_hidden_layers * heads * width)


def moments(store: TokenStore) -> tuple[float, float]:
    """Return the mean tokens of a sample, and the mean sum of its rows' squared lengths."""
    samples = store.samples[:]
    prompt = np.asarray(samples["prompt"], float)[:, None]
    answers = np.asarray(samples["answers"], float)
    squares = np.where(answers > 0, (prompt + answers) ** 2, 0).sum(1)
    return float((prompt[:, 0] + answers.sum(1)).mean()), float(squares.mean())


def budget(stage: str, batch_size: int, max_length: int, mean: float) -> int:
    """Return the tokens of our step: as many as the baseline's has without its padding."""
    if stage == "pretrain":
        return batch_size * max_length
    return max(round(batch_size * mean), max_length * (2 if stage == "dpo" else 1))


def measure(work: Workload) -> Result:
    """Run all arms and return what is reported."""
    args = work.args
    arms: dict[str, Callable[[int], Result]] = {"minigpt": partial(our_arm, work, "precomputed")}
    if args.stage == "dpo":
        arms["live"] = partial(our_arm, work, "model")
    arms["baseline"] = partial(their_arm, work, "baseline")
    if find_spec("trl"):
        arms["trl"] = partial(their_arm, work, "peer")
    arms["matmul"] = lambda _: {"flops": matmul_peak(work.precision, work.device)}
    results = alternate(arms, args.repeats)
    results["start"] = [our_start(work)]
    names = ("stage", "size", "max_length", "optimizer", "repeats")
    return {
        **{name: getattr(args, name) for name in names},
        "data": Path(args.data).resolve().name,
        "vocabulary": work.vocabulary,
        "samples": len(work.store),
        "batch_size": work.batch_size,
        "tokens_per_batch": work.tokens_per_batch,
        "precision": work.precision,
        **surroundings(),
        **figures(work, results),
        "runs": results,
    }


def figures(work: Workload, results: dict[str, list[Result]]) -> Result:
    """Turn the runs into the figures of the report."""
    ours, theirs, live, trl = (
        results.get(name, []) for name in ("minigpt", "baseline", "live", "trl")
    )
    unit = "useful_tokens_per_s"
    peak = max(result["flops"] for result in results["matmul"])
    # A frozen matrix needs no gradient of its own: LoRA takes 4 instead of 6 per weight.
    factor = 4 if work.args.stage == "lora" else 6
    flops = median_of(ours, unit) * (factor * work.matrices + 6 * work.attention)
    report: Result = {
        "ratio": median_of(ours, unit) / median_of(theirs, unit),
        "gemm_peak_fraction": flops / peak,
        "gemm_peak_gflops": peak / 1e9,
        "gemm_precision": HALVES.get(work.precision, "fp32"),
        "first_step_s": median_of(results["start"], "first_step_s"),
        "warm_up_s": median_of(ours, "first_step_s"),
    }
    if live:
        report["ratio_live"] = median_of(live, unit) / median_of(theirs, unit)
    if trl:
        report["ratio_trl"] = median_of(ours, unit) / median_of(trl, unit)
    arms = {"": ours, "baseline_": theirs, "live_": live, "trl_": trl}
    for arm, runs in ((arm, runs) for arm, runs in arms.items() if runs):
        for name in [n for n in ours[0] if n == unit or n.startswith("peak_")]:
            report[arm + name] = median_of(runs, name)
        if live:  # by the data's mean: the few pairs of a short run may be short or long ones
            report[f"{arm}pairs_per_s"] = median_of(runs, unit) / work.sample_tokens
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
        *side_by_side(report, arms, TABLE_ROWS),
    ]
    ratios = [f"{report[r]:.2f}x" for r in ("ratio", "ratio_live") if r in report]
    return "\n".join([*lines, f"{'ratio':24}" + "".join(f"{r:>16}" for r in ratios), ""])


def our_arm(work: Workload, reference: str, repeat: int) -> Result:
    """Run `minigpt fit` and read its speed from what it logged; the first step warms up."""
    return speed(config(work, reference, work.directory / f"run-{reference}-{repeat}", repeat))


def our_start(work: Workload) -> Result:
    """Run a single step: so short a run compiles nothing."""
    options = config(work, "model", work.directory / "run-start", 0)
    options["trainer"] |= {"max_steps": 1, "min_steps": 1, "log_every_n_steps": 1}
    return speed(options)


def speed(options: Result) -> Result:
    """Run `minigpt fit`; return its times, and its speed after the first step."""
    (first, *steps), summary, started = fit(options)
    result = {"first_step_s": first["time"] - started}
    if not steps:
        return result
    seconds = steps[-1]["time"] - first["time"]
    return result | {
        "useful_tokens_per_s": (steps[-1]["tokens_seen"] - first["tokens_seen"]) / seconds,
        "steps": steps[-1]["step"] - first["step"],
        "loss": steps[-1]["train/loss"],
        **{name: value for name, value in summary.items() if name.startswith("peak_")},
    }


def config(work: Workload, reference: str, run_dir: Path, seed: int) -> Result:
    """Return the config of our arm: the stage as users run it, without validation."""
    args = work.args
    module, data, _, _ = STAGES[args.stage]
    start: Result = {
        "init_from": work.start,
        "optimizer": {"name": args.optimizer, "lr": LoopConfig.lr},
    }
    if args.stage == "lora":
        start["lora"] = {"r": LoopConfig.rank, "alpha": 2 * LoopConfig.rank, "dropout": 0.0}
    if args.stage == "dpo":
        start["reference"] = reference
    rows = {
        "train": args.data,
        "val_share": 0.0,
        "max_length": args.max_length,
        "tokens_per_batch": work.tokens_per_batch,
        "data_limit": args.rows,
        "on_bad_row": "skip",
        "seed": seed,
        "cache_dir": str(work.directory / "cache"),
    }
    # A GPU waits for each step whose numbers are written, so that most are not.
    log_every = 5 if work.device == "cuda" and args.steps >= 10 else 1
    return {
        "run_dir": str(run_dir),
        "model": {"class_path": module, "init_args": start},
        "data": {"class_path": data, "init_args": rows},
        "trainer": trainer_options(work, MIN_STEPS * log_every, log_every),
        "checkpoint": {"every": FOREVER},
    }


def their_arm(work: Workload, script: str, repeat: int) -> Result:
    """Run the plain loop, or TRL's trainer, which takes the same config."""
    loop = LoopConfig(
        stage=work.args.stage,
        model=work.start,
        stores=(str(work.store.path), None),
        batch_size=work.batch_size,
        max_length=work.args.max_length,
        tokens_per_batch=work.tokens_per_batch,
        precision=work.precision,
        device=work.device,
        steps=work.args.steps,
        seconds=work.args.seconds,
        seed=repeat,
    )
    return run_baseline(loop, work.directory, script)


def run_baseline(loop: LoopConfig, directory: Path, script: str = "baseline") -> Result:
    """Run the plain loop in another process; return its figures with its speed."""
    result = spawn_arm(script, asdict(loop), directory)
    return result | {"useful_tokens_per_s": result["tokens"] / result["seconds"]}


if __name__ == "__main__":
    sys.exit(run(main))
