"""`minigpt bench data`: tokenising and packing JSONL against the tokenizer library alone."""

from __future__ import annotations

import json
import sys
import tempfile
import time
from functools import partial
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from minigpt.bench.measure import Result, alternate, middle, publish, spawn, surroundings
from minigpt.cli.options import CommandParser, positive
from minigpt.data import tokenizer as tokenizers
from minigpt.data.formats import BadRows, Text, read_records
from minigpt.machine import peak_memory

EXAMPLES = """examples:
  minigpt bench data --data data/pretrain.jsonl
  minigpt bench data --data texts.jsonl --tokenizer outputs/tokenizer --sizes 10 100 2000 --json F
"""


def main(args: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="minigpt bench data",
        description="Time a file of texts from JSONL to packed micro-batches, at growing sizes.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--data", required=True, help='JSONL of {"text"}, repeated to each size')
    parser.add_argument("--tokenizer", help="directory; by default 6,400 tokens trained on --data")
    parser.add_argument("--max-length", "--max_length", type=positive, default=512)
    parser.add_argument("--sizes", type=positive, nargs="+", default=[10, 100], help="MB (10 100)")
    parser.add_argument("--repeats", type=positive, default=3, help="at the first size (3)")
    parser.add_argument("--json", help="where to write the result")
    chosen = parser.parse_args(args)
    with tempfile.TemporaryDirectory(prefix="minigpt-bench-") as work:
        report = measure(chosen, Path(work))
    publish(report, chosen.json)


def measure(chosen: Any, work: Path) -> Result:
    """Compare at the first size, then let the others show what memory they take."""
    given = chosen.tokenizer
    tokenizer = tokenizers.load(given) if given else tokenizers.train([chosen.data], 6400)
    tokenizers.save(tokenizer, work / "tokenizer")
    first, *larger = [grown(Path(chosen.data), size, work) for size in chosen.sizes]
    at = (work, chosen.max_length)
    arms = {
        "minigpt": partial(run, "store", first, *at),
        "library": partial(run, "library", first, *at),
    }
    results = alternate(arms, chosen.repeats)
    grew = [run("store", file, *at, 0) for file in larger]
    speeds = {name: middle(done, "mb_per_s") for name, done in results.items()}
    memory = [middle(results["minigpt"], "peak_rss_mb"), *(done["peak_rss_mb"] for done in grew)]
    return {
        "data": Path(chosen.data).resolve().name,
        **surroundings(),
        "mb_per_s": speeds["minigpt"],
        "library_mb_per_s": speeds["library"],
        "ratio": speeds["minigpt"] / speeds["library"],
        **{f"peak_rss_mb_at_{size}_mb": m for size, m in zip(chosen.sizes, memory, strict=True)},
        "memory_growth": memory[-1] / memory[0],
        "runs": results | {"grown": grew},
    }


def grown(data: Path, megabytes: int, work: Path) -> Path:
    """Write a file of about that size from the rows of another, over and over."""
    records = read_records([data], "text", BadRows())
    rows = [
        json.dumps({"text": record.text}, ensure_ascii=False).encode() + b"\n"
        for record, _ in records
        if isinstance(record, Text)
    ]
    mean = sum(map(len, rows)) / len(rows)
    path = work / f"{megabytes}mb.jsonl"
    with path.open("wb") as file:
        file.writelines(islice(cycle(rows), max(1, round(megabytes * 1e6 / mean))))
    return path


def run(what: str, file: Path, work: Path, max_length: int, repeat: int) -> Result:
    """Run one arm in a process of its own."""
    result = work / "result.json"
    job = [what, str(file), str(work), str(max_length), str(repeat), str(result)]
    spawn(["minigpt.bench.data", *job], f"The benchmark of {file.name}")
    done: Result = json.loads(result.read_text())
    return done | {"mb_per_s": file.stat().st_size / 1e6 / done["seconds"]}


def store(file: Path, work: Path, max_length: int, repeat: int) -> Result:
    """Read, check, tokenise and store a file, and pack an epoch of it."""
    from minigpt.data.order import PackedOrder, Part
    from minigpt.data.store import Limits, open_store

    tokenizer = tokenizers.load(work / "tokenizer")
    started = time.perf_counter()
    made = open_store(file, "text", tokenizer, Limits(max_length), work / f"cache{repeat}")
    order = PackedOrder([made.lengths], [Part(len(made), len(made))], 8 * max_length, seed=0)
    packed = order.count()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": made.meta["tokens"], "batches": packed, **peak_memory()}


def library(file: Path, work: Path, max_length: int, repeat: int) -> Result:
    """Tokenise texts that lie in memory, a thousand at a time."""
    backend = tokenizers.load(work / "tokenizer").backend_tokenizer
    texts = [json.loads(line)["text"] for line in file.open()]
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        tokens += sum(len(e) for e in backend.encode_batch_fast(batch, add_special_tokens=False))
    return {"seconds": time.perf_counter() - started, "tokens": tokens, **peak_memory()}


if __name__ == "__main__":
    what, file, work, *numbers, result = sys.argv[1:]
    arm = {"store": store, "library": library}[what]
    done = arm(Path(file), Path(work), *map(int, numbers))
    Path(result).write_text(json.dumps(done))
