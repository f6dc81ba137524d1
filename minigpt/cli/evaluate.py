"""`minigpt evaluate`: measure one or several models on files, side by side."""

from __future__ import annotations

import argparse
import os
from pathlib import Path
from typing import TYPE_CHECKING

from minigpt.cli.options import (
    MODEL_HELP,
    CommandParser,
    add_sampling,
    check_distinct,
    positive,
    quiet,
    sampling_of,
    writing,
)
from minigpt.errors import ConfigError
from minigpt.terminal import printable

if TYPE_CHECKING:
    from minigpt.evaluate.scores import Results

KINDS = {
    "text": "bits per byte of {text} rows or a .txt file; files, folders, patterns",
    "choices": "multiple choice: {prompt | messages, choices, answer} rows",
    "pairs": "minimal pairs: {good, bad} rows",
    "exam": "exams: {messages, answer} rows; the model must reply",
    "preferences": "preference pairs: accuracy, margin, KL to --reference, length bias",
    "prompts": "prompts to complete: repetition, loops, length of the replies",
    "lm_eval": "task files (YAML) of lm-evaluation-harness, run offline",
}
EXAMPLES = """examples:
  minigpt evaluate --model outputs/pretrain outputs/sft --text data/pretrain_val.jsonl
  minigpt evaluate --model outputs/sft --choices data/eval/choices.jsonl \\
    --pairs data/eval/pairs.jsonl --exam data/exam/*.jsonl --json scores.json --html scores.html
  minigpt evaluate --model outputs/dpo --reference outputs/sft --preferences data/dpo_val.jsonl
  minigpt evaluate --model outputs/sft --lm-eval data/eval/choices.yaml
  minigpt evaluate --reward_model outputs/reward --preferences data/dpo_val.jsonl
  minigpt evaluate --model outputs/sft outputs/dpo --reward_model outputs/reward \
    --prompts prompts.jsonl
"""
RANKED = ("preferences", "choices")  # files whose answers a reward model ranks


def main(argv: list[str]) -> None:
    """Parse the command line, measure, and print the table."""
    args = parser().parse_args(argv)
    check_options(args)
    inputs = [file for kind in KINDS for file in getattr(args, kind)]
    check_distinct("--json", args.json, inputs)
    check_distinct("--html", args.html, inputs)
    results: dict[str, Results] = {}
    try:
        measure(args, results)
    finally:  # after an error or Ctrl-C, too, the finished results are printed
        if results:
            from minigpt.evaluate.suite import format_table

            print(printable(format_table(results)), flush=True)


def parser() -> CommandParser:
    """Describe the command line."""
    top = CommandParser(
        prog="minigpt evaluate", description="Measure models side by side.", epilog=EXAMPLES
    )
    top.add_argument("--model", nargs="+", default=[], help=f"each a {MODEL_HELP}")
    top.add_argument(
        "--reward_model",
        help="ranks answers of --preferences and --choices, and scores the replies to --prompts",
    )
    for kind, description in KINDS.items():
        names = sorted({f"--{kind.replace('_', '-')}", f"--{kind}"})
        top.add_argument(*names, nargs="+", default=[], metavar="FILE", help=description)
    top.add_argument("--reference", help="model that --preferences are compared with")
    top.add_argument("--beta", type=float, default=0.1, help="scale of the rewards (0.1)")
    top.add_argument("--max_length", type=positive, default=512, help="tokens of a text (512)")
    add_sampling(top, max_new_tokens=64, temperature=0.0)
    top.add_argument("--json", type=Path, help="write all scores")
    top.add_argument("--html", type=Path, help="write a page with tables and charts")
    return top


def check_options(args: argparse.Namespace) -> None:
    """Raise a ConfigError for options that do not go together."""
    if args.reference and not (args.preferences and args.model):
        raise ConfigError(
            "--reference is what the models of --model are compared with on --preferences: name "
            "models, and a file of preference pairs."
        )
    if len(set(args.model)) < len(args.model):
        raise ConfigError("--model names the same model twice.")
    if args.reward_model in args.model:
        raise ConfigError("--reward_model and --model name the same model.")
    used = {kind for kind in KINDS if getattr(args, kind)}
    if not args.model and (args.reward_model is None or not used or used - {*RANKED}):
        raise ConfigError(
            "--model is missing: name the models to measure. Without one, --reward_model ranks "
            "the answers of --preferences and --choices."
        )
    if args.reward_model and not used & {*RANKED, "prompts"}:
        raise ConfigError(
            "--reward_model has nothing to score: name files with --preferences, --choices or "
            "--prompts."
        )


def measure(args: argparse.Namespace, results: dict[str, Results]) -> None:
    """Run every test on every model; one model is in memory at a time, and the reward model.

    Each score is added to the results, and written, as soon as it is measured.
    """
    if args.lm_eval:  # before a library reads these variables
        for name in ("HF_HUB_OFFLINE", "HF_DATASETS_OFFLINE", "HF_EVALUATE_OFFLINE"):
            os.environ.setdefault(name, "1")
    from minigpt.data.formats import expand_files
    from minigpt.evaluate.suite import Settings, prepare, prepare_ranking
    from minigpt.infer.engine import Engine
    from minigpt.progress import shown

    quiet()
    sampling = sampling_of(args)
    settings = Settings(args.reference, args.beta, args.max_length, sampling, args.reward_model)
    files = {kind: expand_files(getattr(args, kind)) for kind in KINDS}
    tests = prepare(files, settings) if args.model else {}
    ranking = prepare_ranking(files, settings) if args.reward_model else {}
    for model in args.model:
        engine = Engine.load(model)
        for name, test in tests.items():
            with shown(f"{model}: {name}"):
                scores = test(engine)
            results.setdefault(model, {})[name] = scores
            write_results(args, results)
    for name, rank in ranking.items():
        with shown(f"{args.reward_model}: {name}"):
            results.setdefault(args.reward_model, {})[name] = rank(settings.scorer)
        write_results(args, results)


def write_results(args: argparse.Namespace, results: dict[str, Results]) -> None:
    """Write the results so far into the files that --json and --html name."""
    from minigpt.files import write_json, write_text

    if args.json:
        models = {
            model: {
                test: {name: score.plain() for name, score in scores.items()}
                for test, scores in tests.items()
            }
            for model, tests in results.items()
        }
        with writing(args.json):
            write_json(args.json, {"models": models})
    if args.html:
        with writing(args.html):
            write_text(args.html, html(results))


def html(results: dict[str, Results]) -> str:
    """Return a page: for each test a table, and bars of its main score."""
    from minigpt.page import page
    from minigpt.report.build import Document, add_scores

    document = Document()
    add_scores(document, results)
    return page("Evaluation", "".join(document.html))
