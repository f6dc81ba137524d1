"""Tokens per second of decoding, against transformers' `generate`."""

from __future__ import annotations

import copy
import importlib.util
import random
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from llama_cpp_arm import PROMPT, rate_of
from measure import HERE, architecture, publish, run, spawn

from minigpt.cli.options import CommandParser, positive, quiet
from minigpt.errors import ConfigError

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

EXAMPLES = """examples:
  python scripts/bench/generate.py
  python scripts/bench/generate.py --model outputs/sft --tokens 256 --json generate.json
"""
VOCABULARY = 6400  # of a model with random weights
PROMPTS = 32  # of the batch, 8 to 160 tokens long


def main(arguments: list[str]) -> None:
    """Parse the command line, measure, print and write the result."""
    parser = CommandParser(
        prog="scripts/bench/generate.py",
        description="Measure decoding against transformers' generate, the arms in turn.",
        epilog=EXAMPLES,
    )
    parser.add_argument("--model", help="by default one of --size with random weights")
    parser.add_argument(
        "--size", default="26m", help="name in configs/recipes, or a YAML file (26m)"
    )
    parser.add_argument("--tokens", type=positive, default=128, help="of each reply (128)")
    parser.add_argument("--repeats", type=positive, default=5, help="of each arm (5)")
    parser.add_argument("--json", help="where to write the result")
    args = parser.parse_args(arguments)
    publish(measure(args), args.json)


def measure(args: Namespace) -> dict[str, Any]:
    """Run all arms in turn; return the median rates [tokens/s] and their ratios."""
    import torch

    from minigpt.model.architecture import cast_weights
    from minigpt.model.optimizer import fast_bf16

    quiet()
    model, tokenizer = load(args)
    arms = arms_of(model, tokenizer, args, "fp32")
    half = copy.deepcopy(model)
    cast_weights(half, torch.bfloat16)
    arms |= arms_of(half, tokenizer, args, "bf16")
    with ExitStack() as stack:
        gguf, outcome = gguf_arm(model, tokenizer, args, stack)
        arms |= gguf
        # In turn, so that a busy machine meets all alike; the first time warms up.
        runs = [{n: arm() for n, arm in arms.items()} for _ in range(1 + args.repeats)][1:]
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
        "gguf": outcome,
        "parameters": model.num_parameters(),
        "threads": torch.get_num_threads(),
        "processor": torch.backends.cpu.get_cpu_capability(),
    }


def arms_of(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: Namespace, dtype: str
) -> dict[str, Callable[[], float]]:
    """Return what is measured in a dtype; each arm returns its rate [tokens/s]."""
    import torch

    from minigpt.infer.engine import Engine, Sampling

    engine = Engine(model, tokenizer)
    sampling = Sampling(args.tokens)
    engine.ends = set()  # random weights may end a reply at once
    letters = random.Random(0)
    prompts = ["x" * letters.randint(8, 160) for _ in range(PROMPTS)]

    def stream(engine: Engine) -> int:
        return sum(len(delta.ids) for delta in engine.stream(PROMPT, sampling))

    def transformers() -> int:
        ids = torch.tensor([engine.encode(PROMPT)])
        out = model.generate(  # type: ignore[operator]  # of the mixin, which its class adds
            ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=0,
            max_new_tokens=args.tokens,
            do_sample=False,
        )
        return int(out.shape[1] - ids.shape[1])

    def complete(*groups: list[str]) -> int:
        return sum(len(reply.ids) for group in groups for reply in engine.complete(group, sampling))

    arms = {f"transformers_{dtype}": transformers, dtype: lambda: stream(engine)}
    if dtype == "fp32":
        int8 = Engine(model, tokenizer, int8=True)
        int8.ends = set()
        arms["int8"] = lambda: stream(int8)
        single = [[prompt] for prompt in prompts]
        arms["one_by_one_fp32"] = lambda: complete(*single)
        arms["batch_fp32"] = lambda: complete(prompts)
    return {name: partial(rate_of, arm) for name, arm in arms.items()}


def gguf_arm(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, args: Namespace, stack: ExitStack
) -> tuple[dict[str, Callable[[], float]], str]:
    """Export to GGUF q8_0; return the arm of llama.cpp with it, and whether there is one.

    It runs in other processes: where the threads of llama.cpp are, those of torch no longer
    wait awake for their next matmul.
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
    rate_file = file.with_name("rate")

    def arm() -> float:
        script = str(HERE / "llama_cpp_arm.py")
        spawn([script, str(file), str(args.tokens), str(rate_file)], "llama.cpp")
        return float(rate_file.read_text())

    return {"gguf_q8_0": arm}, "measured"


def load(args: Namespace) -> tuple[PreTrainedModel, PreTrainedTokenizerFast]:
    """Return the model on the CPU and its tokenizer: one saved, or a size with random weights.

    Raises:
        ConfigError: when the size has no such file.
    """
    from minigpt.data import tokenizer as tokenizers
    from minigpt.model.architecture import Architecture, build_native
    from minigpt.model.pretrained import load_model, tokenizer_source

    if args.model:
        model = load_model(args.model, "sdpa")
        tokenizer = tokenizers.load(tokenizer_source(args.model))
    else:
        tokenizer = bytes_only()
        model = build_native(Architecture(**architecture(args.size)), tokenizer)
        model.resize_token_embeddings(VOCABULARY, mean_resizing=False)
        model.config._attn_implementation = "sdpa"
    model.generation_config.eos_token_id = None
    return model.eval(), tokenizer


def bytes_only() -> PreTrainedTokenizerFast:
    """Return a tokenizer whose tokens are the bytes: an untrained model needs no words.

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


if __name__ == "__main__":
    sys.exit(run(main))
