"""Chats as tokens: the one place where messages become ids, for training and inference.

A chat is rendered by the tokenizer's own template (`ChatTemplate`) and tokenised as a whole, so
that its ids are those of `apply_chat_template`. What is trained on an answer is exactly the ids
that inference sends, and then those of the answer.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from itertools import chain, takewhile
from typing import NamedTuple

from transformers import PreTrainedTokenizerFast

from minigpt.data.records import Kind, Message
from minigpt.data.template import BREAK, ChatTemplate, Turn
from minigpt.data.tokenizer import CHAT_TEMPLATE, TURN_END, TURN_START, special_texts
from minigpt.errors import TokenizerError

log = logging.getLogger(__name__)

ANCHORS = ("\n", "a", ".")  # texts before which a text can be tokenised as in the middle of one
MIDDLES = ("x", "end|>", " x")

Units = Mapping[str, list[int]]  # the ids of each unit, see `ChatCodec.units`


class View(NamedTuple):
    """Tokens of an answer with what comes before it.

    Attributes:
        ids: [n] token ids.
        targets: [n] bool, which of them the model must say.
    """

    ids: list[int]
    targets: list[bool]


class Planned(NamedTuple):
    """A turn that is to be tokenised.

    Attributes:
        turn: the prompt and the answer.
        units: of the prompt, and of it with each further piece of the answer.
    """

    turn: Turn
    units: list[list[str]]


def install_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Give a tokenizer without a chat template ours; return whether tokens were added.

    The caller resizes the embeddings when it returns True.

    Raises:
        TokenizerError: when ids have holes, so that the new tokens get ids which others have.
    """
    if tokenizer.chat_template:
        return False
    before = tokenizer.get_vocab()
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
    after = tokenizer.get_vocab()
    if len(set(after.values())) - len(set(before.values())) < len(after) - len(before):
        raise TokenizerError(
            f"The tokenizer has no chat template, and ours needs {TURN_START} and {TURN_END}, for "
            "which tokenizers takes ids that other tokens have, because this one leaves ids out. "
            "Add two tokens with free ids to its tokenizer.json, or set "
            "model.init_args.chat_template to a template of the tokens it has."
        )
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = CHAT_TEMPLATE
    added = len(after) - len(before)
    log.warning("The tokenizer has no chat template: ours was installed, %d tokens added.", added)
    return added > 0


def refused_texts(tokenizer: PreTrainedTokenizerFast, kind: Kind) -> list[str]:
    """Return the special tokens that a text, or an answer of a chat, may not hold."""
    return special_texts(tokenizer) if kind == "text" else ChatTemplate(tokenizer).turn_texts


class ChatCodec:
    """Turns messages into token ids.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Attributes:
        template: renders the chats.

    Raises:
        TokenizerError: when the tokenizer has no chat template that can be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer, self.template = tokenizer, ChatTemplate(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        # These are found before anything else is done to a text: what stands before one and what
        # begins with one are tokenised apart.
        added = [t for t in tokenizer.added_tokens_decoder.values() if not t.normalized]
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._borders = {t.content for t in added if not (t.lstrip or t.single_word)}
        self._anchor, self._skipped = self._find_anchor()

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask for the next answer.

        Raises:
            DataError: when the template refuses the chat.
        """
        return self.encode([self.template.prompt(messages)])[0]

    def unit_texts(self, messages: Sequence[Message]) -> list[str]:
        """Return the texts that any tokenizer turns, one after the other, into a prompt's ids."""
        return [u.removeprefix(BREAK) for u in self.units(self.template.prompt(messages))]

    def encode_answers(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Return the ids that ask for an answer, and those of possible beginnings of it.

        Raises:
            DataError: when the template refuses the chat.
        """
        prompt = self.template.prompt(messages)
        start, *whole = self.encode([prompt, *(prompt + answer for answer in answers)])
        pairs = zip(whole, answers, strict=True)
        return start, [self._rest(start, ids, answer) for ids, answer in pairs]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts on all cores, without adding anything."""
        cut = [self.units(text) for text in texts]
        ids = self.encode_units(list(dict.fromkeys(chain(*cut))))
        return [_joined(units, ids) for units in cut]

    def units(self, text: str, before: Sequence[str] = ()) -> list[str]:
        """Cut a rendered text where its parts are tokenised apart all the same.

        A unit that begins with `BREAK` goes on in the middle of a text.

        Args:
            text: what is rendered.
            before: units of what stands before it.
        """
        units = list(before[:-1])
        for number, part in enumerate("".join((*before[-1:], text)).split(BREAK)):
            begun, done = BREAK if number else "", 0
            for match in self._added.finditer(part):
                if match.start() > done and match.group() in self._borders:
                    units.append(begun + part[done : match.start()])
                    begun, done = "", match.start()
            units.append(begun + part[done:])
        return [unit for unit in units if unit]

    def encode_units(self, units: Sequence[str]) -> Units:
        """Tokenise units on all cores."""
        middle = [unit.startswith(BREAK) for unit in units]
        texts = [
            self._anchor + unit[1:] if inside else unit
            for unit, inside in zip(units, middle, strict=True)
        ]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        rows = zip(units, encodings, middle, strict=True)
        return {u: self._without_anchor(u, e.ids) if inside else e.ids for u, e, inside in rows}

    def _without_anchor(self, unit: str, ids: list[int]) -> list[int]:
        begun = _begins(ids, self._skipped)
        return ids[len(self._skipped) :] if begun else self._ids(unit.removeprefix(BREAK))

    def chat(self, messages: Sequence[Message]) -> list[Planned]:
        """Return the answers of a chat, to be tokenised.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        return [self._planned(turn) for turn in self.template.turns(messages)]

    def answers(self, before: Sequence[Message], answers: Sequence[Message]) -> list[Planned]:
        """Return answers to the same messages, to be tokenised.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        return [self._planned(turn) for turn in self.template.answers(before, answers)]

    def _planned(self, turn: Turn) -> Planned:
        cut = [self.units(turn.prompt)]
        for piece in turn.answer:
            cut.append(self.units(piece.text, cut[-1]))
        return Planned(turn, cut)

    def view(self, planned: Planned, ids: Units) -> tuple[list[int], View]:
        """Return the ids of a turn's prompt, and its answer."""
        answer = planned.turn.answer
        start, *parts = (_joined(units, ids) for units in planned.units)
        whole = parts[-1]
        if not _begins(whole, start):  # a token would reach from the prompt into the answer
            said = [self.encode([BREAK + piece.text])[0] for piece in answer]
            marks = [[p.target] * len(part) for p, part in zip(answer, said, strict=True)]
            return start, View(list(chain(*said)), list(chain(*marks)))
        borders = [_same(part, whole) for part in parts[:-1]]
        targets: list[bool] = []
        for until, piece in zip([*borders, len(whole)], answer, strict=True):
            targets += [piece.target] * (until - len(start) - len(targets))
        return start, View(whole[len(start) :], targets)

    def views(self, chat: Sequence[Planned], ids: Units) -> list[View]:
        """Return a chat as samples; answers are together where a prompt goes on from the last."""
        views: list[View] = []
        for planned in chat:
            start, answer = self.view(planned, ids)
            before = views.pop() if views and _begins(start, views[-1].ids) else View([], [])
            between = [False] * (len(start) - len(before.ids))
            targets = before.targets + between + answer.targets
            views.append(View(start + answer.ids, targets))
        return views

    def _rest(self, start: list[int], whole: list[int], text: str) -> list[int]:
        """Return the ids of a text after a prompt, as long as no token reaches across."""
        return whole[len(start) :] if _begins(whole, start) else self.encode([BREAK + text])[0]

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _find_anchor(self) -> tuple[str, list[int]]:
        """Return a text, with its ids, behind which no space is put before another text."""
        added = self.tokenizer.added_tokens_decoder.values()
        plain = [t.content for t in added if t.content in self._borders and not t.rstrip]
        for anchor in (*plain[:1], *ANCHORS):
            ids = self._ids(anchor)
            if all(self._goes_on(anchor, ids, text) for text in MIDDLES):
                return anchor, ids
        return "", []

    def _goes_on(self, anchor: str, ids: list[int], text: str) -> bool:
        def decoded(some: list[int]) -> str:
            return str(self._backend.decode(some, skip_special_tokens=False))

        whole = self._ids(anchor + text)
        return _begins(whole, ids) and decoded(whole) == decoded(ids) + text


def _joined(units: Sequence[str], ids: Units) -> list[int]:
    return [token for unit in units for token in ids[unit]]


def _begins(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


def _same(one: list[int], other: list[int]) -> int:
    """Return with how many equal ids two lists begin."""
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
