"""The arms of `data.py`: `data_arms.py ARM FILE MAX_LENGTH REPEAT RESULT` runs one."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from minigpt.data import tokenizer as tokenizers
from minigpt.data.order import FileShare, PackedOrder
from minigpt.data.store import Limits, open_store
from minigpt.machine import peak_memory


def store(file: Path, max_length: int, repeat: int) -> dict[str, float]:
    """Read, check, tokenise and store a file, and pack an epoch of it."""
    tokenizer = tokenizers.load(file.with_name("tokenizer"))
    started = time.perf_counter()
    tokens = open_store(
        file, "text", tokenizer, Limits(max_length), file.with_name(f"cache{repeat}")
    )
    order = PackedOrder(
        [tokens.lengths], [FileShare(len(tokens), len(tokens))], 8 * max_length, seed=0
    )
    packed = order.count()
    seconds = time.perf_counter() - started
    return {"seconds": seconds, "tokens": tokens.meta["tokens"], "batches": packed, **peak_memory()}


def library(file: Path, max_length: int, repeat: int) -> dict[str, float]:
    """Tokenise texts that lie in memory, a thousand at a time."""
    backend = tokenizers.load(file.with_name("tokenizer")).backend_tokenizer
    texts = [json.loads(line)["text"] for line in file.open()]
    started = time.perf_counter()
    tokens = 0
    for start in range(0, len(texts), 1000):
        batch = texts[start : start + 1000]
        tokens += sum(len(e) for e in backend.encode_batch_fast(batch, add_special_tokens=False))
    return {"seconds": time.perf_counter() - started, "tokens": tokens, **peak_memory()}


ARMS = {"store": store, "library": library}

if __name__ == "__main__":
    name, file, max_length, repeat, result_file = sys.argv[1:]
    result = ARMS[name](Path(file), int(max_length), int(repeat))
    Path(result_file).write_text(json.dumps(result))
