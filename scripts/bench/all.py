"""Run all benchmarks and write docs/benchmarks.md; `make bench` calls it.

    python scripts/bench/all.py                    # the bundled data
    python scripts/bench/all.py --data_dir DIR     # pretrain, sft, dpo and lora.jsonl of your own

Results are kept as JSON in --output_dir, and the page is made from them; what is there
already is measured anew only with --force. The page has time_to_loss.json, which time_to_loss.py
takes an hour for, when it is there.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

from measure import HERE, Result, rounded

ROOT = HERE.parents[1]
# Stages, and the --max-length at which each is measured.
STAGES = {"pretrain": 512, "sft": 768, "dpo": 1024, "lora": 340}
UNITS = {"dpo": ("pairs_per_s", "pairs/s")}  # others: tokens
# File names in data/, without .jsonl.
BUNDLED = {"pretrain": "pretrain", "sft": "sft", "dpo": "dpo", "lora": "lora_medical"}
NOTES = """Every line comes from one command that measures both sides in turn, each in processes
of its own, and takes the median. *Useful* tokens are the data's own; padding never counts. The
plain loop is [baseline.py](../scripts/bench/baseline.py): transformers (peft for LoRA) with SDPA,
autocast where the hardware has bf16, fused AdamW, padded to the longest of a batch (pretraining:
blocks without padding). Memory is the peak of the whole process."""


def bench(name: str, *arguments: object) -> None:
    """Run one benchmark; its output goes to the terminal."""
    script = str(HERE / f"{name}.py")
    subprocess.run([sys.executable, script, *map(str, arguments)], cwd=ROOT, check=True)


def time_starts(repeats: int) -> Result:
    """Time what a user waits for: help, and the imports that it should not need."""
    commands = {
        "help": ["-m", "minigpt", "--help"],
        "fit_help": ["-m", "minigpt", "fit", "--help"],
        "imports": ["-c", "import torch, lightning"],
    }
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, command in commands.items():
            started = time.perf_counter()
            subprocess.run([sys.executable, *command], cwd=ROOT, check=True, capture_output=True)
            seconds[name].append(time.perf_counter() - started)
    return {f"{name}_s": median(times) for name, times in seconds.items()}


def collect(args: argparse.Namespace) -> dict[str, Result]:
    """Measure what is not measured yet; return all results by name."""
    out = Path(args.output_dir).resolve()
    out.mkdir(parents=True, exist_ok=True)
    data = Path(args.data_dir).resolve()
    names = BUNDLED if is_bundled(data) else {stage: stage for stage in STAGES}
    files = {stage: data / f"{name}.jsonl" for stage, name in names.items()}
    tokenizer = ["--tokenizer", args.tokenizer] if args.tokenizer else []
    common = [*tokenizer, "--repeats", args.repeats]
    for stage, length in STAGES.items():
        if args.force or not (out / f"{stage}.json").exists():
            options = ["--max-length", length, "--size", args.size, "--seconds", args.seconds]
            options += ["--stage", stage, "--data", files[stage], *common]
            bench("train", *options, "--json", out / f"{stage}.json")
    if args.force or not (out / "data.json").exists():
        options = ["--data", files["pretrain"], "--sizes", *args.sizes, *common]
        bench("data", *options, "--json", out / "data.json")
    if args.force or not (out / "grpo.json").exists():
        options = ["--data", files["lora"], "--size", args.size, "--seconds", args.seconds]
        bench("grpo", *options, *common, "--json", out / "grpo.json")
    if args.force or not (out / "start.json").exists():
        (out / "start.json").write_text(json.dumps(time_starts(args.repeats)))
    return {file.stem: json.loads(file.read_text()) for file in sorted(out.glob("*.json"))}


def is_bundled(data: Path) -> bool:
    """Whether a folder is the bundled data, whose files have other names."""
    return data.resolve() == ROOT / "data"


def page(results: dict[str, Result], command: str) -> str:
    """Return the page."""
    lines = ["# Benchmarks", "", "## Training", "", *training_table(results), "", NOTES, ""]
    lines += ["## Reinforcement learning", "", *grpo_lines(results["grpo"]), ""]
    lines += ["## Preparing data", "", *data_lines(results["data"]), ""]
    if "time_to_loss" in results:
        lines += ["## Time to a loss", "", *time_to_loss_lines(results["time_to_loss"]), ""]
    lines += ["## Waiting", "", *start_lines(results), ""]
    return "\n".join([*lines, machine_line(results["pretrain"], command), ""])


def training_table(results: dict[str, Result]) -> list[str]:
    """Return the table of the stages."""
    titles = (
        "| stage | data, max length | unit | MiniGPT | plain loop | ratio | memory, MB | peak |"
    )
    rows = [titles, "|" + "---|" * 8]
    for stage in STAGES:
        r = results[stage]
        unit, shown = UNITS.get(stage, ("useful_tokens_per_s", "tokens/s"))
        head = f"| {stage} | {r['data']}, {r['max_length']} | {shown} |"
        theirs = f"{rounded(r[f'baseline_{unit}'])} |"
        baseline_memory = r["baseline_peak_rss_mb"]
        rows.append(
            f"{head} {rounded(r[unit])} | {theirs} {r['ratio']:.2f}× | {r['peak_rss_mb']:,.0f} of "
            f"{baseline_memory:,.0f} | {r['gemm_peak_fraction']:.0%} |"
        )
        if stage == "dpo":
            rows.append(
                f"| dpo, live reference | the same | {shown} | {rounded(r[f'live_{unit}'])} | "
                f"{theirs} {r['ratio_live']:.2f}× | {r['live_peak_rss_mb']:,.0f} of "
                f"{baseline_memory:,.0f} | |"
            )
    first = results["pretrain"]
    peak = f"{first['gemm_peak_gflops']:,.0f} GFLOP/s in {first['gemm_precision']}"
    rows += ["", f"*Peak* is the share of the best rate of a large matmul, {peak}."]
    peers = [f"{s} {r['ratio_trl']:.2f}×" for s in STAGES if "ratio_trl" in (r := results[s])]
    if peers:
        rows += ["", f"Against TRL on the same rows: {', '.join(peers)}."]
    return rows


def grpo_lines(r: Result) -> list[str]:
    """Return the lines on GRPO."""
    answers = f"{r['generations']} answers of {r['completion']} tokens"
    trl = ""
    if "ratio" in r:
        trl = (
            f", {r['ratio']:.2f}× TRL's {rounded(r['trl_samples_per_s'])} (rollout "
            f"{r['minigpt_rollout_s']:.1f} of {r['trl_rollout_s']:.1f} s, update "
            f"{r['minigpt_update_s']:.1f} of {r['trl_update_s']:.1f} s), with "
            f"{r['memory_share']:.0%} of its memory"
        )
    return [
        f"- Whole steps of GRPO, {r['prompts']} prompts of {r['data']} and {answers} to each: "
        f"{rounded(r['minigpt_samples_per_s'])} samples/s{trl}.",
        f"- The update of {answers} to one prompt of {r['prompt_length']}, which is computed once: "
        f"{rounded(r['shared_targets_per_s'])} target tokens/s, {r['ratio_shared']:.2f}× as many "
        "as with the prompt before each of them.",
    ]


def data_lines(r: Result) -> list[str]:
    """Return the lines on tokenising and packing."""
    name = "peak_rss_mb_at_"
    memory = {k.removeprefix(name).removesuffix("_mb"): v for k, v in r.items() if name in k}
    peaks = ", ".join(f"{peak:,.0f} MB for {size} MB of JSONL" for size, peak in memory.items())
    return [
        f"- JSONL to packed batches: {r['mb_per_s']:.2f} MB/s, which is {r['ratio']:.0%} of what "
        f"the tokenizer library reaches on texts in memory ({r['library_mb_per_s']:.2f} MB/s).",
        f"- Peak memory: {peaks}.",
    ]


def time_to_loss_lines(r: Result) -> list[str]:
    """Return the line on how soon a held-out loss is reached."""
    verb = "reached" if r["reached"] == "True" else "did not reach"
    return [
        f"- The plain loop with AdamW at its best learning rate ({r['baseline_lr']}) came to a "
        f"held-out loss of {r['baseline_loss']:.3f} nats per token on {r['data']} in "
        f"{r['baseline_s']:.0f} s; `minigpt fit` with {r['optimizer']} {verb} it: "
        f"{r['loss']:.3f} in {r['seconds']:.0f} s, {r['times_sooner']:.1f} times less "
        f"({r['size']}, {r['precision']}, {r['date']})."
    ]


def start_lines(results: dict[str, Result]) -> list[str]:
    """Return the lines on the time until something happens."""
    r, first = results["start"], results["pretrain"]["first_step_s"]
    return [
        f"- `minigpt --help`: {r['help_s']:.2f} s. `minigpt fit --help`: {r['fit_help_s']:.2f} s; "
        f"importing torch and lightning takes {r['imports_s']:.2f} s.",
        f"- `minigpt fit` to the end of its first pretraining step, data tokenised: {first:.1f} s.",
    ]


def machine_line(r: Result, command: str) -> str:
    """Return where and when it was measured, and with what."""
    versions = ", ".join(f"{name} {number}" for name, number in r["versions"].items())
    where = f"{r['system']}; {r['processor']}; {r['threads']} threads; {r['precision']}"
    return f"Measured {r['date']} with `{command}`: {where}; model {r['size']}; {versions}."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data_dir", default="data", help="holds pretrain, sft, dpo, lora.jsonl")
    parser.add_argument("--tokenizer", help="directory; by default one is trained for each file")
    parser.add_argument("--size", default="26m")
    parser.add_argument("--seconds", type=int, default=12, help="measured in each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sizes", type=int, nargs="+", default=[10, 100], help="MB of JSONL")
    parser.add_argument("--output_dir", default="outputs/bench", help="where results are kept")
    parser.add_argument("--page", default="docs/benchmarks.md")
    parser.add_argument("--force", action="store_true", help="measure everything anew")
    args = parser.parse_args()
    results = collect(args)
    command = "make bench" if is_bundled(Path(args.data_dir)) else "make bench DATA=DIR"
    Path(args.page).write_text(page(results, command), encoding="utf-8")
    print(f"Written to {args.page}.")


if __name__ == "__main__":
    main()
