#!/usr/bin/env python
"""Measure how much code one reads to follow an SFT batch from its JSONL file to new weights.

Trains a tiny model for one optimizer step on bundled chats with Lightning's own Trainer, without
acceleration, and records which of MiniGPT's functions run: rows, tokens, token store, order,
packed batch, loss, gradients, update. What is set up before is not recorded: loading the tokenizer,
and building the model and the optimizer (SETUP); nor is the schedule's step, which comes after the
update. Prints the files, each with the lines of the
bodies of the functions that ran, without docstrings and blank lines.

    python scripts/walk.py             # the files
    python scripts/walk.py --functions # before them each function, in the order of first calls
    python scripts/walk.py --anchors   # put the lines of today into docs/architecture.md
"""

from __future__ import annotations

import argparse
import ast
import os
import re
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import CodeType, FrameType

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
PACKAGE = ROOT / "minigpt"
PAGE = ROOT / "docs" / "architecture.md"
# A link to a definition: (path from docs/, line, its title, which is the qualified name).
ANCHOR = re.compile(r'\]\(\.\./(minigpt/[\w/]+\.py)#L(\d+) "([\w.]+)"\)')
SETUP = {
    "ModelHooks.configure_model",
    "ModelHooks.configure_optimizers",
    "ModelHooks.on_fit_start",
    "ModelSource.check_length",
    "ModelSource.embedding_rows",
    "ModelSource.tokenizer",
    "learning_rate_factor.<locals>.factor",
}
FunctionNode = ast.FunctionDef | ast.AsyncFunctionDef
Calls = dict[tuple[Path, int], str]  # (file, first line) to qualified name, in the order of calls


def main() -> int:
    """Trace a step and print what ran."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--functions", action="store_true", help="list each function before the files"
    )
    parser.add_argument("--anchors", action="store_true", help="update the links of the page")
    args = parser.parse_args()
    if args.anchors:
        PAGE.write_text(with_anchors(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        return 0
    os.environ["MINIGPT_ACCEL"] = "off"
    calls = trace_sft_step()
    if args.functions:
        for (file, line), name in calls.items():
            lines = len(body_lines(file, line))
            print(f"{lines:5} lines  {file.relative_to(ROOT)}:{line}  {name}")
        print()
    sizes = lines_by_file(calls)
    for file, lines in sizes.items():
        print(f"{lines:5} lines  {file.relative_to(ROOT)}")
    print(f"{sum(sizes.values()):5} lines in {len(sizes)} files")
    return 0


def with_anchors(page: str) -> str:
    """Return the page with the lines where the definitions that it links to are now.

    Raises:
        KeyError: for a name that is not defined in its file.
    """

    def update(link: re.Match[str]) -> str:
        file, _, name = link.groups()
        return f'](../{file}#L{definitions(ROOT / file)[name]} "{name}")'

    return ANCHOR.sub(update, page)


def definitions(file: Path) -> dict[str, int]:
    """Return the line of each class, function and method of a file by its qualified name."""
    lines: dict[str, int] = {}

    def collect(body: list[ast.stmt], prefix: str) -> None:
        for node in body:
            if isinstance(node, FunctionNode | ast.ClassDef):
                lines[prefix + node.name] = node.lineno
            if isinstance(node, ast.ClassDef):
                collect(node.body, f"{prefix}{node.name}.")

    collect(ast.parse(file.read_text(encoding="utf-8")).body, "")
    return lines


def trace_sft_step() -> Calls:
    """Return the functions of the package that run in one optimizer step of SFT."""
    from lightning.pytorch import Trainer

    from minigpt.data.datamodule import SFTDataModule
    from minigpt.stages import SFTModule

    with tempfile.TemporaryDirectory() as folder:
        chats = str(ROOT / "data" / "mini" / "sft.jsonl")
        data = SFTDataModule(train=chats, val_share=0.0, cache_dir=folder)
        module = SFTModule(init_from=make_model(Path(folder) / "model"))
        trainer = Trainer(
            max_steps=1,
            accelerator="cpu",
            gradient_clip_val=1.0,
            log_every_n_steps=1,
            use_distributed_sampler=False,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        with traced() as calls:
            trainer.fit(module, datamodule=data)
    return calls


def make_model(directory: Path) -> str:
    """Write a tiny model with a tokenizer."""
    from minigpt.data.tokenizer import train
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import save_model

    tokenizer = train([ROOT / "data" / "mini" / "sft.jsonl"], 400)
    sizes = Architecture(hidden_size=32, layers=1, heads=2, kv_heads=1, head_dim=16, ffn=64)
    save_model(build_native(sizes, tokenizer), tokenizer, directory)
    return str(directory)


@contextmanager
def traced() -> Iterator[Calls]:
    """Record which functions of the package are called, in all threads, but not inside SETUP."""
    calls: Calls = {}
    setup_depth = threading.local()

    def is_ours(code: CodeType) -> bool:
        return code.co_filename.startswith(str(PACKAGE)) and code.co_name.isidentifier()

    def record(frame: FrameType, event: str, _: object) -> None:
        code = frame.f_code
        if event not in ("call", "return") or not is_ours(code):
            return
        depth = getattr(setup_depth, "value", 0)
        if code.co_qualname in SETUP:
            setup_depth.value = depth + (1 if event == "call" else -1)
        elif event == "call" and not depth:
            calls.setdefault((Path(code.co_filename), code.co_firstlineno), code.co_qualname)

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        yield calls
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def lines_by_file(calls: Calls) -> dict[Path, int]:
    """Return how many lines of each file ran as bodies of functions, in the order of calls."""
    lines: dict[Path, set[int]] = {}
    for file, line in calls:
        lines.setdefault(file, set()).update(body_lines(file, line))
    return {file: len(numbers) for file, numbers in lines.items() if numbers}


def body_lines(file: Path, first: int) -> set[int]:
    """Return the lines of the body of the function that starts at a line (or at its decorator)."""
    text = file.read_text(encoding="utf-8")
    lines = text.splitlines()
    for node in ast.walk(ast.parse(text)):
        if not isinstance(node, FunctionNode):
            continue
        starts = [node.lineno, *(decorator.lineno for decorator in node.decorator_list)]
        if first != min(starts):
            continue
        has_docstring = ast.get_docstring(node) is not None
        return {
            number
            for statement in node.body[has_docstring:]
            for number in range(statement.lineno, (statement.end_lineno or 0) + 1)
            if lines[number - 1].strip()
        }
    return set()  # the body of a class, or an expression


if __name__ == "__main__":
    sys.exit(main())
