"""Parity: the results of an export are compared with those of the run's model."""

from __future__ import annotations

import logging
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import decoders, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from minigpt.data.formats import Message
from minigpt.data.tokenizer import special_texts
from minigpt.errors import ModelError
from minigpt.infer.engine import Engine, Sampling
from minigpt.infer.gguf import LlamaCpp

log = logging.getLogger(__name__)

Numbers = dict[str, Any]
ACCEPTED = "accepted_differences"
Chat = list[dict[str, str]]
TEXTS = 3000  # random texts whose ids are compared
NEW_TOKENS = 16  # of a reply, at most
TOP = 20  # likeliest tokens that llama.cpp is asked for
QUESTIONS = ("Hello", "你好，你是谁？", "1 + 1 =")
CHATS: list[list[tuple[str, str]]] = [
    [("user", "Hello\n")],
    [("system", "你是助手。"), ("user", "1 + 1 = ?")],
    [("user", "你好"), ("assistant", "Hi, 你好！"), ("user", "<b> & {{ x }} 'n' \"m\"")],
]
# Texts are drawn from blocks of Unicode (scripts, symbols, everything), spaces and signs.
BLOCKS = [(0, 0x7F), (0x80, 0x24F), (0x370, 0x6FF), (0x900, 0xDFF), (0x1E00, 0x30FF)]
BLOCKS += [(0x4E00, 0x9FFF), (0xAC00, 0xD7A3), (0x1F300, 0x1FAFF), (0, 0xD7FF), (0xE000, 0x10FFFF)]
SIGNS = (" ", "  ", "\n", "\r\n", "\t", "\u3000", " \n ", "'s", "'LL", "123", "，", "\u0301")


@dataclass(frozen=True)
class Expected:
    """Results of the run's model and tokenizer.

    Attributes:
        texts: random strings, each with its ids.
        chats: each with the prompt it becomes, as text and as ids.
        cases: a prompt, the likeliest reply with its end, both as ids, and the logits (reply,
            vocabulary) that gave the reply.
        start: ids that are written before a text, such as BOS.
        ends: ids that end a reply.
    """

    texts: list[tuple[str, list[int]]]
    chats: list[tuple[Chat, str, list[int]]]
    cases: list[tuple[list[int], list[int], Tensor]]
    start: list[int]
    ends: list[int]


def random_texts(
    count: int, special: Sequence[str], words: Sequence[str], seed: int = 0
) -> list[str]:
    """Return strings of many scripts, spaces, signs, special tokens and a tokenizer's words."""
    rng = random.Random(seed)

    def piece() -> str:
        draw = rng.random()
        if draw < 0.2:
            return rng.choice([*SIGNS, *special])
        if draw < 0.5:
            return rng.choice(words)
        first, last = rng.choice(BLOCKS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 6)))

    return ["".join(piece() for _ in range(rng.randint(2, 12))) for _ in range(count)]


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """Return the ids of texts, as training and inference make them."""
    batch = tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
    return [encoding.ids for encoding in batch]


def render(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> str | None:
    """Return a chat as a prompt; None when the template refuses such a chat."""
    try:
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    except Exception:  # a template is a program
        return None
    return str(text)


def prompt_ids(tokenizer: PreTrainedTokenizerFast, chat: Chat) -> list[int]:
    """Return a chat as the ids of a prompt, as plain transformers make them."""
    return list(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))


def prompts(tokenizer: PreTrainedTokenizerFast) -> list[tuple[Chat, str]]:
    """Return the chats that the tokenizer's template takes, each with the prompt it becomes."""
    if not tokenizer.chat_template:
        return []
    chats = [[{"role": role, "content": text} for role, text in chat] for chat in CHATS]
    return [(chat, text) for chat in chats if (text := render(tokenizer, chat)) is not None]


def expected_chats(engine: Engine) -> list[tuple[Chat, str, list[int]]]:
    """Return the chats that the model's template takes, each with its prompt as text and ids."""
    return [
        (chat, text, engine.encode([Message(turn["role"], turn["content"]) for turn in chat]))
        for chat, text in prompts(engine.tokenizer)
    ]


@torch.no_grad()
def logits_of(model: PreTrainedModel, prompt: list[int], reply: list[int]) -> Tensor:
    """Return the logits (reply, vocabulary) by which a model chooses the reply's tokens."""
    out: Tensor = model(torch.tensor([prompt + reply]), use_cache=False).logits
    return out[0, len(prompt) - 1 : -1].float()


def observe(engine: Engine) -> Expected:
    """Return what a model and its tokenizer compute, to compare an export with."""
    questions = [(Message("user", text),) if engine.codec else text for text in QUESTIONS]
    replies = engine.complete(questions, Sampling(max_new_tokens=NEW_TOKENS))
    cases = []
    for question, reply in zip(questions, replies, strict=True):
        ids = reply.ids + ([] if reply.ended_by is None else [reply.ended_by])
        prompt = engine.encode(question)
        cases.append((prompt, ids, logits_of(engine.model, prompt, ids)))
    backend = engine.tokenizer.backend_tokenizer
    words = backend.decode_batch([[token] for token in range(backend.get_vocab_size())])
    texts = random_texts(2 * TEXTS, special_texts(engine.tokenizer), list(filter(None, words)))
    texts = [text for text in texts if is_covered(engine.tokenizer, text)][:TEXTS]
    ids_of_texts = encode(engine.tokenizer, texts)
    return Expected(
        list(zip(texts, ids_of_texts, strict=True)),
        expected_chats(engine),
        cases,
        engine.start,
        sorted(engine.ends),
    )


def is_covered(tokenizer: PreTrainedTokenizerFast, text: str) -> bool:
    """Whether a byte-level vocabulary has all bytes of a text.

    Some lack bytes that their corpus lacked, such as control characters, and engines differ in
    what they make of those.
    """
    backend = tokenizer.backend_tokenizer
    if not isinstance(backend.decoder, decoders.ByteLevel):
        return True
    level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    signs = {sign for piece, _ in level.pre_tokenize_str(text) for sign in piece}
    return all(backend.token_to_id(sign) is not None for sign in signs)


def normalized(expected: Expected, tokenizer: PreTrainedTokenizerFast) -> Expected:
    """Return the same with normalized texts, for engines that leave out the normalizer."""
    normalizer = tokenizer.backend_tokenizer.normalizer
    texts = [normalizer.normalize_str(text) for text, _ in expected.texts]
    return replace(expected, texts=list(zip(texts, encode(tokenizer, texts), strict=True)))


def require(numbers: Numbers, difference: str, passed: bool, accept: bool = False) -> None:
    """Raise a ModelError with the numbers of a check, unless it passed.

    Args:
        numbers: stand in the error.
        difference: names what is wrong if the check failed.
        passed: whether there is no difference.
        accept: add the difference to the numbers instead of raising.
    """
    if passed:
        return
    figures = ", ".join(f"{name} {value}" for name, value in numbers.items())
    if accept:
        earlier = numbers.get(ACCEPTED)
        numbers[ACCEPTED] = f"{earlier}; {difference}" if earlier else difference
        log.warning("The export does not do what the model does: %s (%s).", difference, figures)
        return
    raise ModelError(
        f"The export does not do what the model does: {difference} ({figures}). Nothing was kept. "
        "Of GGUF files, choose a finer --dtype if it was one of few bits, or have "
        "--accept_differences keep it and say so in its card; else please report this."
    )


def check_texts(
    expected: Expected,
    ids_of: Callable[[list[str]], list[list[int]]],
    prompt_of: Callable[[Chat], str | None],
    chat_ids_of: Callable[[Chat], list[int]],
    accept: bool = False,
) -> Numbers:
    """Compare the ids of texts, and the prompts of chats; of each difference, name an example.

    The ids of a chat are compared where its text is the same.
    """
    theirs = ids_of([text for text, _ in expected.texts])
    wrong_texts = [
        (text, ours, other)
        for (text, ours), other in zip(expected.texts, theirs, strict=True)
        if ours != other
    ]
    wrong_chats = []  # rendered otherwise
    wrong_chat_ids = []  # rendered the same, but with other ids
    rendered_equal = 0
    for chat, text, ours in expected.chats:
        if (other_text := prompt_of(chat)) != text:
            wrong_chats.append((text, other_text))
            continue
        rendered_equal += 1
        if (other := chat_ids_of(chat)) != ours:
            wrong_chat_ids.append((text, ours, other))
    total = len(expected.chats)
    numbers: Numbers = {
        "texts_with_equal_ids": f"{len(theirs) - len(wrong_texts)} of {len(theirs)}",
        "chats_rendered_equal": f"{rendered_equal} of {total}",
        "chats_with_equal_ids": f"{rendered_equal - len(wrong_chat_ids)} of {total}",
    }
    if wrong_texts:
        text, ours, other = min(wrong_texts, key=lambda difference: len(difference[0]))
        numbers["text_with_other_ids"] = f"{text!r} becomes {other}, not {ours}"
    if wrong_chats:
        text, other_text = wrong_chats[0]
        numbers["chat_rendered_otherwise"] = f"{other_text!r}, not {text!r}"
    if wrong_chat_ids:
        text, ours, other = wrong_chat_ids[0]
        numbers["chat_with_other_ids"] = f"{text!r} becomes {other}, not {ours}"
    require(numbers, "token ids differ", bool(theirs) and not wrong_texts, accept)
    require(numbers, "chats are rendered otherwise", not wrong_chats, accept)
    require(numbers, "token ids of chats differ", not wrong_chat_ids, accept)
    return numbers


def merged(first: Numbers, second: Numbers) -> Numbers:
    """Return the numbers of two checks, with the differences accepted in both."""
    accepted = [numbers[ACCEPTED] for numbers in (first, second) if ACCEPTED in numbers]
    return first | second | ({ACCEPTED: "; ".join(accepted)} if accepted else {})


def check_special_ids(
    expected: Expected, start: list[int], ends: list[int], accept: bool = False
) -> Numbers:
    """Compare the tokens before a text, such as BOS, and those that end a reply."""
    numbers: Numbers = {"text_start": start, "end_tokens": ends}
    require(numbers, f"a text begins with {expected.start}", start == expected.start, accept)
    require(numbers, f"replies end with {expected.ends}", ends == expected.ends, accept)
    return numbers


def logprob_of(llama: LlamaCpp, ids: list[int], token: int, vocabulary: int) -> float | None:
    """Return llama.cpp's log-probability of a token after others, in nats.

    None while llama.cpp's own choice is a part of a character: it gives none then. Where a file of
    few bits has the token below its `TOP` likeliest, the whole vocabulary is asked for.
    """
    for count in (TOP, vocabulary):
        options: dict[str, Any] = {"n_predict": 1, "n_probs": count, "temperature": 0}
        steps = llama.ask("/completion", prompt=ids, **options).get("completion_probabilities", [])
        logprobs = {
            top["id"]: float(top["logprob"]) for step in steps for top in step["top_logprobs"]
        }
        if token in logprobs:
            return logprobs[token]
        if not steps:
            return None
    return -math.inf


def check_llamacpp(expected: Expected, file: Path, limit: float, accept: bool = False) -> Numbers:
    """Compare llama.cpp's ids, prompts, replies and log-probabilities of the model's replies.

    Replies may part where the model itself prefers its token by no more than twice the limit.
    """
    llama = LlamaCpp(file, max(len(prompt) for prompt, _, _ in expected.cases) + NEW_TOKENS + 8)
    numbers = check_texts(expected, llama.ids_of, llama.prompt_of, llama.chat_ids_of, accept)
    ends = [token for token in expected.ends if llama.ends_with(token)]
    numbers = merged(numbers, check_special_ids(expected, llama.start(), ends, accept))
    equal_replies = 0
    compared = 0
    largest = 0.0  # difference of a log-probability
    gap = 0.0  # between the model's best token and llama.cpp's, where replies part
    for prompt, reply, logits in expected.cases:
        scores = logits.log_softmax(-1)
        options: dict[str, Any] = {"temperature": 0, "return_tokens": True}
        theirs = llama.ask("/completion", prompt=prompt, n_predict=NEW_TOKENS, **options)["tokens"]
        equal_replies += theirs == reply
        for position, (other, best) in enumerate(zip(theirs, reply, strict=False)):
            if other != best:
                gap = max(gap, float(scores[position, best] - scores[position, other]))
                break
        for position, token in enumerate(reply):
            logprob = logprob_of(llama, prompt + reply[:position], token, scores.shape[1])
            if logprob is not None:
                largest = max(largest, abs(logprob - float(scores[position, token])))
                compared += 1
    numbers |= {
        "replies_equal": f"{equal_replies} of {len(expected.cases)}",
        "parted_at_a_gap_of": gap,
        "tokens_compared": compared,
        "max_logprob_difference": largest,
        "limit": limit,
    }
    require(numbers, "log-probabilities differ", largest <= limit and compared > 0, accept)
    require(numbers, "replies differ", gap <= 2 * limit, accept)
    return numbers
