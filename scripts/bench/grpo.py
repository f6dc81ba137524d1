"""Samples per second of GRPO against TRL's trainer, and what sharing a group's prompt saves."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING, Any

from measure import (
    FOREVER,
    HERE,
    PRECISIONS,
    Result,
    alternate,
    architecture,
    fit,
    median_of,
    publish,
    run,
    side_by_side,
    spawn_arm,
    surroundings,
    trainer_options,
)

from minigpt.cli.options import CommandParser, positive, quiet

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from minigpt.data.formats import Message

EXAMPLES = """examples:
  python scripts/bench/grpo.py
  python scripts/bench/grpo.py --data data/sft.jsonl --prompts 16 --repeats 1 --json grpo.json
"""
REWARD = f"{HERE / 'grpo_reward.py'}:even_tokens"
MIN_STEPS = 3  # to measure, however long they take
LEARNING_RATE = 1e-6  # TRL's default; at it, answers stay as long as they are
STEP_ROWS = {
    "samples/s": "samples_per_s",
    "seconds of a step": "step_s",
    "  rollout and rewards": "rollout_s",
    "  update": "update_s",
    "tokens of an answer": "answer_tokens",
    "peak memory, MB": "peak_rss_mb",
    "peak GPU memory, MB": "peak_gpu_mb",
}
UPDATE_ROWS = {
    "target tokens/s": "targets_per_s",
    "seconds of an update": "seconds",
    "peak memory, MB": "peak_rss_mb",
    "peak GPU memory, MB": "peak_gpu_mb",
}


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="scripts/bench/grpo.py",
        description="Measure whole GRPO steps against TRL's GRPOTrainer (extra `bench`), and the "
        "update of a group with one prompt against one prompt for each answer, all in turn.",
        epilog=EXAMPLES,
    )
    add = parser.add_argument
    add("--data", default="data/lora_medical.jsonl", help="JSONL of chats, whose questions are put")
    add("--size", default="26m", help="name in configs/recipes, or a YAML file (26m)")
    add("--tokenizer", help="directory; by default one is trained on --data")
    add("--vocabulary", type=positive, default=6400, help="tokens of that one (6,400)")
    add("--prompts", type=positive, default=8, help="of a step (8)")
    add("--generations", type=positive, default=8, help="answers to each prompt (8)")
    add("--completion", type=positive, default=64, help="tokens of the longest answer (64)")
    add("--prompt-length", type=positive, default=512, help="of the shared prompt (512)")
    add("--precision", choices=PRECISIONS, help="of all arms; by default what is fast here")
    add("--repeats", type=positive, default=3, help="of each arm (3)")
    add("--steps", type=positive, default=FOREVER, help="steps to measure at most")
    add("--seconds", type=positive, default=30, help=f"of each run (30), or {MIN_STEPS} steps")
    add("--json", help="where to write the result")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as directory:
        report = measure(prepare(args, Path(directory)), args)
    print(table(report))
    publish(report, args.json)


@dataclass(frozen=True)
class Workload:
    """What all arms do, as they read it from JSON."""

    start: str  # HF directory of the model
    rows: str  # JSONL of prompts
    directory: str  # for files of the arms
    precision: str  # Lightning's name
    device: str  # cpu or cuda
    prompts: int  # of a step
    generations: int  # answers to each
    completion: int  # tokens of an answer at most
    longest_prompt: int  # among the rows, in tokens
    prompt_length: int  # tokens of the prompt that is shared or repeated
    steps: int  # to measure at most
    seconds: float  # after which an arm stops, but not before MIN_STEPS


def prepare(args: Namespace, directory: Path) -> Workload:
    """Make the tokenizer, the model and the rows of prompts."""
    import torch

    from minigpt.cli.settings import choose_precision
    from minigpt.data.prompts import PromptCodec
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import save_model

    quiet()
    torch.manual_seed(0)
    tokenizer = tokenizer_of(args)
    model = build_native(Architecture(**architecture(args.size)), tokenizer)
    save_model(model, tokenizer, directory / "start")
    questions = questions_of(args.data)
    rows = directory / "prompts.jsonl"
    with rows.open("w") as file:
        for question in questions:
            chat = [{"role": message.role, "content": message.content} for message in question]
            file.write(json.dumps({"messages": chat}) + "\n")
    codec = PromptCodec(tokenizer)
    return Workload(
        start=str(directory / "start"),
        rows=str(rows),
        directory=str(directory),
        precision=str(choose_precision(PRECISIONS.get(args.precision), "auto")),
        device="cuda" if torch.cuda.is_available() else "cpu",
        longest_prompt=max(len(codec.encode(question)) for question in questions),
        **{name: getattr(args, name) for name in ("prompts", "generations", "completion")},
        **{name: getattr(args, name) for name in ("prompt_length", "steps", "seconds")},
    )


def tokenizer_of(args: Namespace) -> PreTrainedTokenizerFast:
    """Return the tokenizer; one that is trained here gets as many tokens as were asked for."""
    from minigpt.data import tokenizer as tokenizers

    if args.tokenizer:
        return tokenizers.load(args.tokenizer)
    tokenizer = tokenizers.train([args.data], args.vocabulary)
    # A small file does not give them all, but the size of the head is part of what is measured.
    missing = args.vocabulary - len(tokenizer)
    tokenizer.add_tokens([f"<|filler {number}|>" for number in range(missing)])
    return tokenizer


def questions_of(path: str) -> list[list[Message]]:
    """Return the messages of each chat up to the last question."""
    from minigpt.data.formats import BadRows, Chat, read_records

    questions = []
    for record, _ in read_records([path], "chat", BadRows("skip")):
        assert isinstance(record, Chat)
        messages = list(record.messages)
        while messages and messages[-1].role != "user":
            messages.pop()
        questions += [messages] if messages else []
    return questions


def measure(work: Workload, args: Namespace) -> Result:
    """Run all arms and return what is reported."""
    arms: dict[str, Callable[[int], Result]] = {"minigpt": partial(our_steps, work)}
    if find_spec("trl"):
        arms["trl"] = lambda _: other_arm(work, "grpo_trl")
    else:
        print("TRL is not measured; it needs: pip install 'minigpt[bench]'", file=sys.stderr)
    for name in ("shared", "repeated"):
        arms[name] = partial(our_update, work, name)
    results = alternate(arms, args.repeats)
    difference = other_arm(work, "grpo_update", "difference")
    names = ("size", "prompts", "generations", "completion", "prompt_length", "repeats")
    return {
        **{name: getattr(args, name) for name in names},
        "data": Path(args.data).resolve().name,
        "longest_prompt": work.longest_prompt,
        "precision": work.precision,
        **surroundings(),
        **figures(results),
        "gradient_difference": difference["gradient_difference"],
        "runs": results,
    }


def figures(results: dict[str, list[Result]]) -> Result:
    """Turn the runs into the figures of the report."""
    report: Result = {}
    for arm, runs in results.items():
        report |= {f"{arm}_{name}": median_of(runs, name) for name in runs[0]}
    if "trl" in results:
        report["ratio"] = report["minigpt_samples_per_s"] / report["trl_samples_per_s"]
        peak = "peak_gpu_mb" if "minigpt_peak_gpu_mb" in report else "peak_rss_mb"
        report["memory_share"] = report[f"minigpt_{peak}"] / report[f"trl_{peak}"]
    report["ratio_shared"] = report["shared_targets_per_s"] / report["repeated_targets_per_s"]
    return report


def table(report: Result) -> str:
    """Return both measurements, each with its arms side by side."""
    steps = {"MiniGPT": "minigpt_", "TRL": "trl_"}
    ratio = ""
    if "ratio" in report:
        ratio = f"{report['ratio']:.2f}x, with {report['memory_share']:.0%} of the memory"
    else:
        del steps["TRL"]
    answers = f"{report['generations']} answers of {report['completion']} tokens"
    sharing = {"one prompt": "shared_", "repeated": "repeated_"}
    shared = (
        f"{report['ratio_shared']:.2f}x; gradients in fp32 differ by "
        f"{report['gradient_difference']:.1e}"
    )
    return "\n".join(
        [
            f"GRPO, {report['size']}, {report['threads']} threads, {report['precision']}: "
            f"{report['prompts']} prompts of {report['data']} a step, {answers} to each.",
            *side_by_side(report, steps, STEP_ROWS),
            *([f"{'ratio':24}  {ratio}"] if ratio else []),
            "",
            f"The update of {answers} to a prompt of {report['prompt_length']}, which stands in "
            "the batch once, or before each of them.",
            *side_by_side(report, sharing, UPDATE_ROWS),
            f"{'ratio':24}  {shared}",
            "",
        ]
    )


def our_steps(work: Workload, repeat: int) -> Result:
    """Run `minigpt fit` and read its speed from what it logged; the first step warms up."""
    options = config(work, Path(work.directory) / f"run-{repeat}", repeat)
    (first, *steps), summary, _ = fit(options)
    return step_figures(
        work,
        len(steps),
        steps[-1]["time"] - first["time"],
        mean(row["rollout/seconds"] for row in steps),
        mean(row["rollout/length"] for row in steps),
    ) | {name: value for name, value in summary.items() if name.startswith("peak_")}


def step_figures(
    work: Workload, steps: int, seconds: float, rollout: float, length: float
) -> Result:
    """Return what is reported of whole steps.

    Args:
        work: says how many samples a step has.
        steps, seconds: that were measured.
        rollout: seconds of sampling and scoring in each.
        length: mean tokens of an answer.
    """
    step = seconds / steps
    return {
        "samples_per_s": work.prompts * work.generations / step,
        "step_s": step,
        "rollout_s": rollout,
        "update_s": step - rollout,
        "answer_tokens": length,
        "steps": steps,
    }


def config(work: Workload, run_dir: Path, seed: int) -> dict[str, Any]:
    """Return the config of our arm: the stage as users run it, without validation and replay."""
    rows = {
        "train": work.rows,
        "val_share": 0.0,
        "prompts_per_batch": work.prompts,
        "num_generations": work.generations,
        "max_completion_length": work.completion,
        "max_length": work.longest_prompt + work.completion,
        "seed": seed,
        "cache_dir": str(Path(work.directory) / "cache"),
    }
    start = {
        "init_from": work.start,
        "rewards": [{"kind": "function", "function": REWARD}],
        "optimizer": {"name": "adamw", "lr": LEARNING_RATE},
        "collapse": {"action": "off"},  # an untrained model's answers do not end
    }
    return {
        "run_dir": str(run_dir),
        "model": {"class_path": "GRPOModule", "init_args": start},
        "data": {"class_path": "GRPODataModule", "init_args": rows},
        "trainer": trainer_options(work, MIN_STEPS),
        "checkpoint": {"every": FOREVER},
    }


def our_update(work: Workload, name: str, _: int) -> Result:
    """Run the update of a group in another process; return its figures."""
    return other_arm(work, "grpo_update", name)


def other_arm(work: Workload, script: str, *more: str) -> Result:
    """Run a script on the work in another process; return what it wrote."""
    return spawn_arm(script, asdict(work), Path(work.directory), *more)


def read_work(path: str) -> Workload:
    """Read what `other_arm` wrote for an arm."""
    return Workload(**json.loads(Path(path).read_text()))


if __name__ == "__main__":
    sys.exit(run(main))
