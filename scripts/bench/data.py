"""Tokenising and packing JSONL against the tokenizer library alone."""

from __future__ import annotations

import json
import sys
import tempfile
from argparse import Namespace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

from measure import HERE, Result, alternate, median_of, publish, run, spawn, surroundings

from minigpt.cli.options import CommandParser, positive
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import BadRows, Text, read_records

EXAMPLES = """examples:
  python scripts/bench/data.py --data data/pretrain.jsonl
  python scripts/bench/data.py --data texts.jsonl --tokenizer outputs/tokenizer --sizes 10 2000
"""


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="scripts/bench/data.py",
        description="Time a file of texts from JSONL to packed micro-batches, at growing sizes.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--data", required=True, help='JSONL of {"text"}, repeated to each size')
    parser.add_argument("--tokenizer", help="directory; by default 6,400 tokens trained on --data")
    parser.add_argument("--max-length", "--max_length", type=positive, default=512)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[10, 100], help="MB (10 100)")
    parser.add_argument("--repeats", type=positive, default=3, help="at the first size (3)")
    parser.add_argument("--json", help="where to write the result")
    args = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as directory:
        report = measure(args, Path(directory))
    publish(report, args.json)


def measure(args: Namespace, directory: Path) -> Result:
    """Compare at the first size, then let the others show what memory they take."""
    if args.tokenizer:
        tokenizer = tokenizers.load(args.tokenizer)
    else:
        tokenizer = tokenizers.train([args.data], 6400)
    tokenizers.save(tokenizer, directory / "tokenizer")
    first, *larger = [repeated(Path(args.data), size, directory) for size in args.sizes]
    store = partial(run_arm, "store", args.max_length)
    library = partial(run_arm, "library", args.max_length)
    arms = {"minigpt": partial(store, first), "library": partial(library, first)}
    results = alternate(arms, args.repeats)
    larger_runs = [store(file, 0) for file in larger]
    speeds = {name: median_of(runs, "mb_per_s") for name, runs in results.items()}
    memory = [median_of(results["minigpt"], "peak_rss_mb")]
    memory += [result["peak_rss_mb"] for result in larger_runs]
    return {
        "data": Path(args.data).resolve().name,
        **surroundings(),
        "mb_per_s": speeds["minigpt"],
        "library_mb_per_s": speeds["library"],
        "ratio": speeds["minigpt"] / speeds["library"],
        **{f"peak_rss_mb_at_{size}_mb": m for size, m in zip(args.sizes, memory, strict=True)},
        "memory_growth": memory[-1] / memory[0],
        "runs": results | {"grown": larger_runs},
    }


def repeated(data: Path, megabytes: int, directory: Path) -> Path:
    """Write a file of about that size from the rows of another, over and over."""
    records = read_records([data], "text", BadRows())
    rows = [
        json.dumps({"text": record.text}, ensure_ascii=False).encode() + b"\n"
        for record, _ in records
        if isinstance(record, Text)
    ]
    mean = sum(map(len, rows)) / len(rows)
    path = directory / f"{megabytes}mb.jsonl"
    with path.open("wb") as file:
        file.writelines(islice(cycle(rows), max(1, round(megabytes * 1e6 / mean))))
    return path


def run_arm(name: str, max_length: int, file: Path, repeat: int) -> Result:
    """Run one arm in another process."""
    result_file = file.with_name("result.json")
    arguments = [name, str(file), str(max_length), str(repeat), str(result_file)]
    spawn([str(HERE / "data_arms.py"), *arguments], f"The benchmark of {file.name}")
    result: Result = json.loads(result_file.read_text())
    return result | {"mb_per_s": file.stat().st_size / 1e6 / result["seconds"]}


if __name__ == "__main__":
    sys.exit(run(main))
