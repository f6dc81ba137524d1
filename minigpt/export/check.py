"""Parity: what an export computes is held against what the run's model computes."""

from __future__ import annotations

import http.client
import importlib.util
import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from minigpt.data.records import Message
from minigpt.data.tokenizer import special_texts
from minigpt.errors import ModelError
from minigpt.infer.engine import Engine, Sampling

Numbers = dict[str, Any]
Chat = list[dict[str, str]]
TEXTS = 3000
NEW_TOKENS = 16
TOP = 20  # of the likeliest tokens that llama.cpp tells at each step
QUESTIONS = ("Hello", "你好，你是谁？", "1 + 1 =")
CHATS = [
    [("user", "Hello")],
    [("system", "你是助手。"), ("user", "1 + 1 = ?")],
    [("user", "你好"), ("assistant", "Hi, 你好！"), ("user", "<b> & {{ x }} 'n' \"m\"")],
]
# Blocks of Unicode that texts are drawn from: scripts, symbols, and everything.
BLOCKS = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x2FFF)]
BLOCKS += [(0x3000, 0x30FF), (0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF)]
BLOCKS += [(0, 0xD7FF), (0xE000, 0x10FFFF)]
PIECES = [" ", "  ", "\n", "\r\n", "\t", "\u3000", " \n ", "'s", "'LL", "123", "，", "\u0301"]


@dataclass(frozen=True)
class Expected:
    """What the run's model and tokenizer do.

    Attributes:
        texts: random Unicode strings; `tokens`: their ids.
        chats: messages; `rendered`: the prompts they become.
        prompts: ids of prompts; `replies`: the likeliest reply to each, with its end.
        logits: for each prompt (reply, vocabulary): the scores that gave the reply's tokens.
    """

    texts: list[str]
    tokens: list[list[int]]
    chats: list[Chat]
    rendered: list[str]
    prompts: list[list[int]]
    replies: list[list[int]]
    logits: list[Tensor]


def random_texts(count: int, special: Sequence[str] = (), seed: int = 0) -> list[str]:
    """Return strings of many scripts, spaces, signs and special tokens."""
    rng = random.Random(seed)

    def piece() -> str:
        if rng.random() < 0.25:
            return rng.choice([*PIECES, *special])
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(1, 12))) for _ in range(count)]


def encoded(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, as training and inference make them."""
    backend = tokenizer.backend_tokenizer
    return [e.ids for e in backend.encode_batch_fast(texts, add_special_tokens=False)]


def render(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> str | None:
    """Return a chat as a prompt; None when the template refuses such a chat."""
    try:
        text: Any = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except TemplateError:
        return None
    return str(text)


def renderings(tokenizer: PreTrainedTokenizerFast) -> list[tuple[Chat, str]]:
    """Return the chats that the template takes, and the prompts they become."""
    if not tokenizer.chat_template:
        return []
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
    both = [(chat, render(tokenizer, chat)) for chat in chats]
    return [(chat, text) for chat, text in both if text is not None]


@torch.no_grad()
def logits_of(model: Any, prompt: list[int], reply: list[int]) -> Tensor:
    """Return the scores (reply, vocabulary) that a model gives where the reply's tokens stand."""
    out: Tensor = model(torch.tensor([prompt + reply]), use_cache=False).logits
    return out[0, len(prompt) - 1 : -1].float()


def observe(engine: Engine) -> Expected:
    """Record what a model does."""
    tokenizer = engine.tokenizer
    chats = renderings(tokenizer)
    asked = [(Message("user", text),) if engine.codec else text for text in QUESTIONS]
    prompts = [engine.encode(prompt) for prompt in asked]
    said = engine.complete(asked, Sampling(max_new_tokens=NEW_TOKENS))
    replies = [r.ids + ([] if r.ended_by is None else [r.ended_by]) for r in said]
    texts = random_texts(TEXTS, special_texts(tokenizer))
    logits = [logits_of(engine.model, p, r) for p, r in zip(prompts, replies, strict=True)]
    return Expected(
        texts,
        encoded(tokenizer, texts),
        [chat for chat, _ in chats],
        [text for _, text in chats],
        prompts,
        replies,
        logits,
    )


def hold(numbers: Numbers, what: str, fits: bool) -> None:
    """Go on if a check holds.

    Raises:
        ModelError: with the numbers, when it does not.
    """
    if not fits:
        told = ", ".join(f"{name} {value}" for name, value in numbers.items())
        raise ModelError(
            f"The export does not do what the model does: {what}. Nothing was kept. ({told}) "
            "Report it with the model's config.json."
        )


def check_tokenizer(expected: Expected, tokenizer: PreTrainedTokenizerFast) -> Numbers:
    """Compare token ids and rendered chats with a reloaded tokenizer."""
    pairs = zip(encoded(tokenizer, expected.texts), expected.tokens, strict=True)
    equal = sum(one == other for one, other in pairs)
    chats = sum(
        render(tokenizer, chat) == text
        for chat, text in zip(expected.chats, expected.rendered, strict=True)
    )
    numbers = {
        "texts_with_equal_ids": f"{equal} of {len(expected.texts)}",
        "chats_rendered_equal": f"{chats} of {len(expected.chats)}",
    }
    hold(numbers, "token ids differ", equal == len(expected.texts))
    hold(numbers, "chats are rendered otherwise", chats == len(expected.chats))
    return numbers


def check_logits(expected: Expected, model: Any, limit: float) -> Numbers:
    """Compare a reloaded model's scores with the expected ones."""
    cases = zip(expected.prompts, expected.replies, expected.logits, strict=True)
    worst = max(float((logits_of(model, p, r) - want).abs().max()) for p, r, want in cases)
    numbers = {"max_logit_difference": worst, "limit": limit}
    hold(numbers, "logits differ", worst <= limit)
    return numbers


def has_llamacpp() -> bool:
    """Whether llama.cpp can be run."""
    return importlib.util.find_spec("xllamacpp") is not None


class LlamaCpp:
    """llama.cpp on a GGUF file, asked over its loopback port.

    Raises:
        ModelError: when llama.cpp refuses the file.
    """

    def __init__(self, file: Path, context: int) -> None:
        import xllamacpp

        params = xllamacpp.CommonParams()
        params.model.path = str(file)
        params.n_ctx, params.n_parallel, params.warmup = context, 1, False
        params.verbosity = 1  # errors only
        exact = xllamacpp.ggml_type.GGML_TYPE_F32
        params.cache_type_k = params.cache_type_v = exact
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = torch.get_num_threads()
        try:
            self.server = xllamacpp.Server(params)
        except RuntimeError as error:
            raise ModelError(f"llama.cpp cannot load the export: {error}") from error
        self.host = urlsplit(self.server.listening_address).netloc

    def ask(self, path: str, **body: Any) -> Any:
        """Post a request; return the decoded answer."""
        connection = http.client.HTTPConnection(self.host)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", path, json.dumps(body), headers)
        answer = json.loads(connection.getresponse().read())
        connection.close()
        return answer

    def tokenize(self, texts: list[str], mark: int) -> list[int]:
        """Return the ids of all texts in a row, each followed by a mark."""
        content = [part for text in texts for part in (text, mark)]
        asked = {"content": content, "add_special": False, "parse_special": True}
        tokens: list[int] = self.ask("/tokenize", **asked)["tokens"]
        return tokens

    def render(self, chat: Chat) -> str:
        """Return a chat as a prompt."""
        return str(self.ask("/apply-template", messages=chat).get("prompt"))

    def reply(self, prompt: list[int]) -> list[int]:
        """Return the tokens of the likeliest reply."""
        asked = {"prompt": prompt, "n_predict": NEW_TOKENS, "temperature": 0}
        tokens: list[int] = self.ask("/completion", **asked, return_tokens=True)["tokens"]
        return tokens

    def logprobs(self, ids: list[int]) -> dict[int, float]:
        """Return the likeliest next tokens; none when the best is a part of a character."""
        asked = {"prompt": ids, "n_predict": 1, "temperature": 0, "n_probs": TOP}
        steps = self.ask("/completion", **asked).get("completion_probabilities", [])
        return {one["id"]: one["logprob"] for step in steps for one in step["top_logprobs"]}


def check_llamacpp(expected: Expected, file: Path, limit: float) -> Numbers:
    """Compare llama.cpp's token ids, prompts, replies and log-probabilities with the model's."""
    longest = max(map(len, expected.prompts)) + NEW_TOKENS
    llama = LlamaCpp(file, longest + 8)
    flat = [token for ids in expected.tokens for token in (*ids, 0)]
    numbers: Numbers = {"texts_with_equal_ids": f"{TEXTS} of {TEXTS}"}
    if llama.tokenize(expected.texts, 0) != flat:
        pairs = zip(expected.texts, expected.tokens, strict=True)
        equal = sum(llama.tokenize([text], 0)[:-1] == ids for text, ids in pairs)
        numbers["texts_with_equal_ids"] = f"{equal} of {TEXTS}"
        hold(numbers, "llama.cpp gives other token ids", False)
    pairs_of_chats = zip(expected.chats, expected.rendered, strict=True)
    equal = sum(llama.render(chat) == text for chat, text in pairs_of_chats)
    numbers["chats_rendered_equal"] = f"{equal} of {len(expected.chats)}"
    hold(numbers, "llama.cpp renders chats otherwise", equal == len(expected.chats))
    return numbers | check_replies(expected, llama, limit)


def check_replies(expected: Expected, llama: LlamaCpp, limit: float) -> Numbers:
    """Compare the likeliest replies and the log-probabilities of the model's own.

    Replies may part where the model itself is undecided within the limit.
    """
    same, compared, worst, parted = 0, 0, 0.0, 0.0
    cases = zip(expected.prompts, expected.replies, expected.logits, strict=True)
    for prompt, reply, logits in cases:
        scores = logits.log_softmax(-1)
        said = llama.reply(prompt)
        same += said == reply
        parting = next((i for i, (a, b) in enumerate(zip(said, reply, strict=False)) if a != b), -1)
        if parting >= 0:
            gap = scores[parting, reply[parting]] - scores[parting, said[parting]]
            parted = max(parted, float(gap))
        for place, token in enumerate(reply):
            if top := llama.logprobs(prompt + reply[:place]):
                moved = abs(top.get(token, -math.inf) - float(scores[place, token]))
                worst, compared = max(worst, moved), compared + 1
    numbers = {"replies_equal": f"{same} of {len(expected.replies)}", "parted_at_a_gap_of": parted}
    numbers |= {"tokens_compared": compared, "max_logprob_difference": worst, "limit": limit}
    hold(numbers, "log-probabilities differ", worst <= limit and compared > 0)
    hold(numbers, "replies differ", parted <= 2 * limit)
    return numbers
