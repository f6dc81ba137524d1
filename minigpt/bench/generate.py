"""`minigpt bench generate`: tokens per second of decoding, against transformers' `generate`."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import tempfile
import time
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from minigpt.bench.measure import architecture, publish, spawn
from minigpt.cli.options import CommandParser, positive
from minigpt.errors import ConfigError

EXAMPLES = """examples:
  minigpt bench generate
  minigpt bench generate --model outputs/sft --tokens 256 --json generate.json
"""
VOCABULARY = 6400  # of a model with random weights
PROMPTS = 32  # of the batch, 8 to 160 tokens long
PROMPT = "x" * 32  # alone


def main(args: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="minigpt bench generate",
        description="Measure decoding against transformers' generate, the arms in turn.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", help="by default one of --size with random weights")
    parser.add_argument("--size", default="26m", help="name in configs/size, or a YAML file (26m)")
    parser.add_argument("--tokens", type=positive, default=128, help="of each reply (128)")
    parser.add_argument("--repeats", type=positive, default=5, help="of each arm (5)")
    parser.add_argument("--json", help="where to write the result")
    chosen = parser.parse_args(args)
    publish(measure(chosen), chosen.json)


def measure(chosen: Namespace) -> dict[str, Any]:
    """Run all arms in turn; return the median rates [tokens/s] and their ratios."""
    import torch

    from minigpt.cli.trainer import quiet
    from minigpt.model.architecture import cast_weights
    from minigpt.model.optimizer import fast_bf16

    quiet()
    model, tokenizer = load(chosen)
    arms = arms_of(model, tokenizer, chosen, "fp32")
    half = copy.deepcopy(model)
    cast_weights(half, torch.bfloat16)
    arms |= arms_of(half, tokenizer, chosen, "bf16")
    with ExitStack() as stack:
        gguf, said = gguf_arm(model, tokenizer, chosen, stack)
        arms |= gguf
        # In turn, so that a busy machine meets all alike; the first time warms up.
        runs = [{n: arm() for n, arm in arms.items()} for _ in range(1 + chosen.repeats)][1:]
    rate = {name: round(median(run[name] for run in runs), 1) for name in arms}
    pairs = {
        "ratio_fp32": ("fp32", "transformers_fp32"),
        "ratio_bf16": ("bf16", "transformers_bf16"),
        "ratio_int8": ("int8", "transformers_fp32"),
        "ratio_gguf_q8_0": ("gguf_q8_0", "transformers_fp32"),
        "ratio_batch": ("batch_fp32", "one_by_one_fp32"),
    }
    ratios = {n: round(rate[a] / rate[b], 2) for n, (a, b) in pairs.items() if a in rate}
    return {
        **{f"{name}_tokens_per_s": value for name, value in rate.items()},
        **ratios,
        "bf16": "in hardware" if fast_bf16(torch.device("cpu")) else "emulated by this CPU",
        "gguf": said,
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def timed(work: Callable[[], int]) -> float:
    """Return the rate [tokens/s] of what returns how many tokens it made."""
    start = time.perf_counter()
    return work() / (time.perf_counter() - start)


def arms_of(
    model: Any, tokenizer: Any, chosen: Namespace, dtype: str
) -> dict[str, Callable[[], float]]:
    """Return what is measured in a dtype; each arm returns its rate [tokens/s]."""
    import torch

    from minigpt.infer.engine import Engine, Sampling

    engine, how = Engine(model, tokenizer), Sampling(chosen.tokens)
    engine.ends = set()  # random weights may end a reply at once
    letters = random.Random(0)
    prompts = ["x" * letters.randint(8, 160) for _ in range(PROMPTS)]

    def stream(engine: Engine) -> int:
        return sum(len(delta.ids) for delta in engine.stream(PROMPT, how))

    def transformers() -> int:
        ids = torch.tensor([engine.encode(PROMPT)])
        given = {"attention_mask": torch.ones_like(ids), "pad_token_id": 0}
        out = model.generate(ids, **given, max_new_tokens=chosen.tokens, do_sample=False)
        return int(out.shape[1] - ids.shape[1])

    def complete(*groups: list[str]) -> int:
        return sum(len(reply.ids) for group in groups for reply in engine.complete(group, how))

    arms = {f"transformers_{dtype}": transformers, dtype: lambda: stream(engine)}
    if dtype == "fp32":
        small = Engine(model, tokenizer, int8=True)
        small.ends = set()
        arms["int8"] = lambda: stream(small)
        alone = [[one] for one in prompts]
        arms["one_by_one_fp32"] = lambda: complete(*alone)
        arms["batch_fp32"] = lambda: complete(prompts)
    return {name: partial(timed, arm) for name, arm in arms.items()}


def gguf_arm(
    model: Any, tokenizer: Any, chosen: Namespace, stack: ExitStack
) -> tuple[dict[str, Callable[[], float]], str]:
    """Export to GGUF q8_0; return the arm of llama.cpp with it, and whether there is one.

    It has processes of its own: where the threads of llama.cpp are, those of torch no longer
    wait awake for their next product.
    """
    if not all(importlib.util.find_spec(name) for name in ("gguf", "xllamacpp")):
        return {}, "not measured; it needs: pip install 'minigpt[gguf]'"
    from minigpt.export.card import Card
    from minigpt.export.gguf import check_config, pre_tokenizer, write
    from minigpt.infer.engine import Engine

    try:
        check_config(model.config)
        pre = pre_tokenizer(tokenizer)
    except ConfigError as error:
        return {}, f"not measured: {error}"
    file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "model.gguf"
    write(Engine(model, tokenizer), file, "q8_0", pre, Card("bench", "bench"))
    rate = file.with_name("rate")

    def arm() -> float:
        spawn(["minigpt.bench.generate", str(file), str(chosen.tokens), str(rate)], "llama.cpp")
        return float(rate.read_text())

    return {"gguf_q8_0": arm}, "measured"


def gguf_stream(file: Path, tokens: int) -> float:
    """Let llama.cpp go on with the prompt, once unmeasured; return its rate [tokens/s]."""
    from minigpt.infer.engine import Sampling
    from minigpt.infer.gguf import Gguf

    engine = Gguf(file)
    engine.endless = True
    for _ in range(2):
        rate = timed(lambda: len(engine.complete([PROMPT], Sampling(tokens))[0].ids))
    return rate


def load(chosen: Namespace) -> tuple[Any, Any]:
    """Return the model on the CPU and its tokenizer: one saved, or a size with random weights.

    Raises:
        ConfigError: when the size has no such file.
    """
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import load_model, tokenizer_place

    if chosen.model:
        model: Any = load_model(chosen.model, "sdpa").eval()
        tokenizer = tokenizers.load(tokenizer_place(chosen.model))
    else:
        tokenizer = bytes_only()
        sizes: Any = architecture(chosen.size)
        model = build_native(Architecture(**sizes), tokenizer)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.config._attn_implementation = "sdpa"
    model.generation_config.eos_token_id = None
    return model.eval(), tokenizer


def bytes_only() -> Any:
    """Return a tokenizer whose tokens are the bytes: a model without training says no words.

    One merge, of letters that no prompt holds, is there for llama.cpp, which loads none without.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    from minigpt.data.tokenizer import SPECIAL_TOKENS, wrap

    alphabet = [*SPECIAL_TOKENS, *sorted(pre_tokenizers.ByteLevel.alphabet()), "qq"]
    vocabulary = {token: index for index, token in enumerate(alphabet)}
    bpe = Tokenizer(models.BPE(vocabulary, [("q", "q")]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    return wrap(bpe)


if __name__ == "__main__":  # llama.cpp's process
    Path(sys.argv[3]).write_text(str(gguf_stream(Path(sys.argv[1]), int(sys.argv[2]))))
