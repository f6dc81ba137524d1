"""The arm of llama.cpp in `generate.py`: `llama_cpp_arm.py FILE TOKENS RATE`."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

PROMPT = "x" * 32


def rate_of(generate: Callable[[], int]) -> float:
    """Return the rate [tokens/s] of a function that returns how many tokens it generated."""
    start = time.perf_counter()
    return generate() / (time.perf_counter() - start)


def stream(file: Path, tokens: int) -> float:
    """Let llama.cpp continue the prompt, once unmeasured; return its rate [tokens/s]."""
    from minigpt.infer.engine import Sampling
    from minigpt.infer.gguf import Gguf

    engine = Gguf(file)
    engine.endless = True
    for _ in range(2):
        rate = rate_of(lambda: len(engine.complete([PROMPT], Sampling(tokens))[0].ids))
    return rate


if __name__ == "__main__":
    file, tokens, rate_file = sys.argv[1:]
    Path(rate_file).write_text(str(stream(Path(file), int(tokens))))
