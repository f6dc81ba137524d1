#!/usr/bin/env python
"""Measure `minigpt data check` and `stats` on files made of the bundled rows, all different:
alone, `check` against the bundled exams, and `stats` with a tokenizer trained on the rows.

Speed is the file's size by the time of one core that reading it takes, without the start of
the process; memory is the process's peak.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KINDS = {"text": "pretrain.jsonl", "chat": "sft.jsonl", "preference": "dpo.jsonl"}
ARMS = ("check", "check --exam", "stats", "stats --tokenizer")
CHILD = """
import resource, sys, time
from minigpt.cli.data import main
import minigpt.datatools.check, minigpt.datatools.stats
minigpt.datatools.stats.languages(["é"])
start = time.process_time()
main(sys.argv[1:])
usage = resource.getrusage(resource.RUSAGE_SELF)
print(time.process_time() - start, usage.ru_maxrss / 1000, file=sys.stderr)
"""


def varied(value: object, rng: random.Random, size: int) -> object:
    """Return a row with a number after each text, and texts repeated up to `size` characters."""
    if isinstance(value, dict):
        return {k: v if k == "role" else varied(v, rng, size) for k, v in value.items()}
    if isinstance(value, list):
        return [varied(item, rng, size) for item in value]
    assert isinstance(value, str)
    return "\n".join(value for _ in range(1 + size // len(value))) + f" {rng.randrange(10**6)}"


def rows(kind: str, chinese: bool) -> Iterator[bytes]:
    """Yield lines without end: texts of about 1 kB, or chats and preferences as they are."""
    rng = random.Random(0)
    size = (300 if chinese else 900) * (kind == "text")
    lines = (ROOT / "data" / KINDS[kind]).read_text(encoding="utf-8").splitlines()
    pool = [json.loads(line) for line in lines if line.isascii() != chinese]
    while True:
        row = varied(rng.choice(pool), rng, size)
        yield json.dumps(row, ensure_ascii=False).encode() + b"\n"


def write(path: Path, kind: str, chinese: bool, size: float) -> int:
    """Write at least `size` bytes, and return how many rows."""
    count, lines = 0, rows(kind, chinese)
    with path.open("wb") as file:
        while file.tell() < size:
            file.write(next(lines))
            count += 1
    return count


def measure(arm: str, path: Path) -> tuple[float, float]:
    """Return the seconds and the peak megabytes of one of `ARMS` on a file."""
    verb, *option = arm.split()
    tokenizer = path.with_name("tokenizer")
    if option == ["--tokenizer"] and not tokenizer.exists():
        from minigpt.cli.tokenizer import train_to

        train_to(tokenizer, [str(ROOT / "data" / name) for name in KINDS.values()], 6400)
    exams = sorted((ROOT / "data" / "exam").glob("*.jsonl"))
    values = {"--tokenizer": [tokenizer], "--exam": exams}
    options = [*option, *(str(file) for name in option for file in values[name])]
    command = [sys.executable, "-c", CHILD, verb, str(path), *options]
    search = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": search}
    process = subprocess.run(command, env=environment, capture_output=True, text=True)
    if process.returncode:
        raise SystemExit(process.stderr)
    seconds, peak = map(float, process.stderr.splitlines()[-1].split())
    return seconds, peak


def main() -> None:
    """Make the files one after the other, measure, and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=float, nargs="+", default=[10.0], help="sizes (10)")
    parser.add_argument("--repeats", type=int, default=3, help="the fastest counts (3)")
    args = parser.parse_args()
    print(f"{'rows':22} {'MB':>6} {'B/row':>6}", *(f"  {arm:>18}" for arm in ARMS))
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "rows.jsonl")
        for kind in KINDS:
            for language in ("English", "Chinese"):
                for size in args.mb:
                    count = write(path, kind, language == "Chinese", size * 1e6)
                    mb = path.stat().st_size / 1e6
                    line = f"{kind + ', ' + language:22} {mb:6.1f} {mb * 1e6 / count:6.0f}"
                    for arm in ARMS:
                        seconds, peak = min(measure(arm, path) for _ in range(args.repeats))
                        line += f"   {mb / seconds:5.1f} MB/s {peak:4.0f} MB"
                    print(line, flush=True)


if __name__ == "__main__":
    main()
