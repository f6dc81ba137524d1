"""Chats as tokens: the one place where messages become ids, for training and inference.

    ChatCodec      messages → ids: rendered as text, cut into units, tokenised on all cores
    ChatTemplate   messages → text, with the tokenizer's own template
    turn_end       the token that ends an answer

A chat is rendered by the tokenizer's template and tokenised as a whole, so that its ids are those
of `apply_chat_template`. What is trained on an answer is exactly the ids that inference sends,
and then those of the answer.

Only what inference sends counts as a prompt. An answer is what the model is to say after that
prompt, up to the token that ends its turn. So a template may drop earlier reasoning, move the
system's text, or open a block of reasoning in its generation prompt: each answer is read off
the chat that ends with it, never off a longer one.

A control token in the text of a system or user message is broken by `BREAK`, so that it stays
text: nobody but the template and the assistant can begin or end a turn.

A model may end its turns with several tokens: those of its generation config, the
tokenizer's eos, and the one that its chat template really writes after an answer, which
need not be the eos (``<|end|>`` of Phi, ``<end_of_turn>`` of Gemma, ``<|eot_id|>`` of
Llama 3).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain, takewhile
from typing import Any, NamedTuple, cast

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data.formats import Kind, Message
from minigpt.data.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, special_texts
from minigpt.errors import DataError, TokenizerError
from minigpt.reading import MEGABYTE, TimeUpError, limited_memory, limited_time, reason_of, refusing

log = logging.getLogger(__name__)

# Prefixes with which a tokenizer may encode a text without adding a space before it.
ANCHORS = ("\n", "a", ".")
MIDDLES = ("x", "end|>", " x")  # texts by which `_find_anchor` tries out such a prefix
# Halves of surrogate pairs: no valid text holds them, so they cannot be confused with content.
BREAK = "\ud800"
ANSWER = "\ud801"
OPTION = "model.init_args.chat_template"
REMEDY = f"Leave it out (on_bad_row: skip does, in training), or train with another {OPTION}."
RENDER_SECONDS = 20  # of computing; templates take milliseconds
RENDER_MEMORY = 512 * MEGABYTE  # that a template may take
# Characters of a rendered chat, beside `LONGEST_RATIO` times its own: a template is a program, and
# may write without end.
LONGEST, LONGEST_RATIO = 16 * MEGABYTE, 8
SAME_END = 4  # characters by which two renderings of a prompt must end alike to be aligned
SPACE = re.compile(r"\s+")
PROBE_QUESTION, PROBE_ANSWER = "Xyzzy", "Plugh"  # words that no template writes
_PROBE_CHAT = [
    {"role": "user", "content": PROBE_QUESTION},
    {"role": "assistant", "content": PROBE_ANSWER},
]

UnitIds = Mapping[str, list[int]]  # the ids of each unit, see `ChatCodec.units`


class Piece(NamedTuple):
    """A run of rendered text, and whether the model is trained to say it."""

    text: str
    target: bool


class Turn(NamedTuple):
    """A prompt as inference sends it, and the answer that is trained behind it."""

    prompt: str
    answer: list[Piece]


class MaskedIds(NamedTuple):
    """Tokens of an answer, with or without what comes before it.

    Attributes:
        ids: [n] token ids.
        targets: [n] bool, which of them are trained.
    """

    ids: list[int]
    targets: list[bool]


class PlannedTurn(NamedTuple):
    """A turn with its texts split into units, each of which is encoded once.

    Attributes:
        turn: the prompt and the answer.
        units: the prompt cut into units, then the prompt with each further piece of the answer.
    """

    turn: Turn
    units: list[list[str]]


class ChatCodec:
    """Turns messages into token ids.

    Training plans the turns of many rows (`plan_chat`, `plan_answers`), has their units tokenised
    together (`encode_units`), and joins their ids (`chat_samples`, `turn_ids`).

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Attributes:
        template: renders the chats.

    Raises:
        TokenizerError: when the tokenizer has no chat template that can be read.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.template = ChatTemplate(tokenizer)
        self._backend = tokenizer.backend_tokenizer
        # The tokenizer looks for these before all else, and tokenises apart what stands before one.
        added = [t for t in tokenizer.added_tokens_decoder.values() if not t.normalized]
        names = sorted((token.content for token in added), key=len, reverse=True)
        self._added = re.compile("|".join(map(re.escape, names)) or "(?!)")
        self._borders = {t.content for t in added if not (t.lstrip or t.single_word)}
        self._anchor, self._anchor_ids = self._find_anchor()

    def plan_chat(self, messages: Sequence[Message]) -> list[PlannedTurn]:
        """Return the turns of a chat that are trained on, to be tokenised.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        return [self._plan(turn) for turn in self.template.turns(messages)]

    def plan_answers(
        self, before: Sequence[Message], answers: Sequence[Message]
    ) -> list[PlannedTurn]:
        """Return answers to the same messages, to be tokenised.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        return [self._plan(turn) for turn in self.template.answers(before, answers)]

    def _plan(self, turn: Turn) -> PlannedTurn:
        units = [self.units(turn.prompt)]
        for piece in turn.answer:
            units.append(self.units(piece.text, units[-1]))
        return PlannedTurn(turn, units)

    def units(self, text: str, before: Sequence[str] = ()) -> list[str]:
        """Split a rendered text at the added tokens, where the tokenizer splits it anyway.

        A unit that begins with `BREAK` continues a text, so that no space may be put before it.

        Args:
            text: the rendered text.
            before: units of what stands before it.
        """
        units = list(before[:-1])
        for number, unbroken in enumerate("".join((*before[-1:], text)).split(BREAK)):
            prefix = BREAK if number else ""
            start = 0
            for match in self._added.finditer(unbroken):
                if match.start() > start and match.group() in self._borders:
                    units.append(prefix + unbroken[start : match.start()])
                    prefix = ""
                    start = match.start()
            units.append(prefix + unbroken[start:])
        return [unit for unit in units if unit]

    def encode_units(self, units: Sequence[str]) -> UnitIds:
        """Tokenise units on all cores."""
        texts = [
            self._anchor + unit.removeprefix(BREAK) if unit.startswith(BREAK) else unit
            for unit in units
        ]
        encodings = self._backend.encode_batch_fast(texts, add_special_tokens=False)
        return {
            unit: self._without_anchor(unit, encoding.ids)
            if unit.startswith(BREAK)
            else encoding.ids
            for unit, encoding in zip(units, encodings, strict=True)
        }

    def _without_anchor(self, unit: str, ids: list[int]) -> list[int]:
        if _starts_with(ids, self._anchor_ids):
            return ids[len(self._anchor_ids) :]
        return self._ids(unit.removeprefix(BREAK))

    def chat_samples(self, chat: Sequence[PlannedTurn], unit_ids: UnitIds) -> list[MaskedIds]:
        """Return a chat as samples: a turn whose prompt begins with the last one continues it."""
        samples: list[MaskedIds] = []
        for planned in chat:
            prompt, answer = self.turn_ids(planned, unit_ids)
            if samples and _starts_with(prompt, samples[-1].ids):
                targets = samples.pop().targets
            else:
                targets = []
            between = [False] * (len(prompt) - len(targets))
            samples.append(MaskedIds(prompt + answer.ids, targets + between + answer.targets))
        return samples

    def turn_ids(self, planned: PlannedTurn, unit_ids: UnitIds) -> tuple[list[int], MaskedIds]:
        """Return the ids of a turn's prompt, and its answer."""
        pieces = planned.turn.answer
        prompt, *prefixes = (_joined(units, unit_ids) for units in planned.units)
        full = prefixes[-1]
        if not _starts_with(full, prompt):  # a token would reach from the prompt into the answer
            encoded = [self.encode([BREAK + piece.text])[0] for piece in pieces]
            masks = [[p.target] * len(ids) for p, ids in zip(pieces, encoded, strict=True)]
            return prompt, MaskedIds(list(chain(*encoded)), list(chain(*masks)))
        borders = [common_prefix(prefix, full) for prefix in prefixes[:-1]]
        targets: list[bool] = []
        for end, piece in zip([*borders, len(full)], pieces, strict=True):
            targets += [piece.target] * (end - len(prompt) - len(targets))
        return prompt, MaskedIds(full[len(prompt) :], targets)

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask for the next answer.

        Raises:
            DataError: when the template refuses the chat.
        """
        return self.encode([self.template.prompt(messages)])[0]

    def encode_answers(
        self, messages: Sequence[Message], answers: Sequence[str]
    ) -> tuple[list[int], list[list[int]]]:
        """Return the ids that ask for an answer, and those of possible beginnings of it.

        Raises:
            DataError: when the template refuses the chat.
        """
        text = self.template.prompt(messages)
        prompt, *answered = self.encode([text, *(text + answer for answer in answers)])
        return prompt, [
            ids[len(prompt) :] if _starts_with(ids, prompt) else self.encode([BREAK + answer])[0]
            for ids, answer in zip(answered, answers, strict=True)
        ]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise rendered texts on all cores, without adding anything."""
        units = [self.units(text) for text in texts]
        unit_ids = self.encode_units(list(dict.fromkeys(chain(*units))))
        return [_joined(text_units, unit_ids) for text_units in units]

    def unit_texts(self, messages: Sequence[Message]) -> list[str]:
        """Return the texts that any tokenizer turns, one after the other, into a prompt's ids."""
        return [u.removeprefix(BREAK) for u in self.units(self.template.prompt(messages))]

    def _ids(self, text: str) -> list[int]:
        return list(self._backend.encode(text, add_special_tokens=False).ids)

    def _find_anchor(self) -> tuple[str, list[int]]:
        """Return a prefix, with its ids, after which the tokenizer puts no space before a text."""
        added = self.tokenizer.added_tokens_decoder.values()
        plain = [t.content for t in added if t.content in self._borders and not t.rstrip]
        for anchor in (*plain[:1], *ANCHORS):
            ids = self._ids(anchor)
            if all(self._is_safe_prefix(anchor, ids, text) for text in MIDDLES):
                return anchor, ids
        return "", []

    def _is_safe_prefix(self, anchor: str, anchor_ids: list[int], text: str) -> bool:
        ids = self._ids(anchor + text)
        return (
            _starts_with(ids, anchor_ids) and self._decoded(ids) == self._decoded(anchor_ids) + text
        )

    def _decoded(self, ids: list[int]) -> str:
        return str(self._backend.decode(ids, skip_special_tokens=False))


def _joined(units: Sequence[str], unit_ids: UnitIds) -> list[int]:
    return [token for unit in units for token in unit_ids[unit]]


def _starts_with(ids: list[int], start: list[int]) -> bool:
    return ids[: len(start)] == start


def common_prefix(left: list[int], right: list[int]) -> int:
    """Return with how many equal ids two lists begin."""
    pairs = zip(left, right, strict=False)
    return sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))


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


def has_generation_marks(template: str | None) -> bool:
    """Whether a chat template marks the assistant's turns with ``{% generation %}``."""
    return template is not None and "endgeneration" in template


class ChatTemplate:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Attributes:
        renderer: renders Jinja; a server has it done in a process of its own.
        native: whether `source`, the template, is our own, which is rendered without Jinja.
        control: texts that stay text in what system and user say: special tokens, and other
            added tokens that the template writes.
        turn_texts: special tokens that begin or end a turn or a text.
        turn_end: the text of the token that ends an answer; "" where there is none.

    Raises:
        TokenizerError: when there is no template, or it is no valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.renderer: Callable[..., object] = render_jinja_template
        self.source: str = _the_template(tokenizer.chat_template)
        self.native = self.source == CHAT_TEMPLATE
        if self.native:  # which always ends, so that nothing need be bounded
            self._examine(tokenizer)
            return
        with refusing("The chat template", TokenizerError, f"Set {OPTION} to another."):
            self._examine(tokenizer)

    def _examine(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.marked = has_generation_marks(self.source)
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.turn_end = str(turn_end(tokenizer) or tokenizer.eos_token or "")
        probe = self._probe()
        # What the template writes after an answer.
        self._after = probe.partition(ANSWER)[2] if ANSWER in probe else None
        self.control = _control_texts(tokenizer, self.source + probe)
        self.turn_texts = _turn_texts(tokenizer, probe)
        pattern = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or "(?!)"
        self._control = re.compile(pattern)
        self._overlapping = re.compile(f"(?={pattern})")
        added = tokenizer.added_tokens_decoder.values()
        normalized = any(token.normalized and token.content in self.control for token in added)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if normalized else None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that asks for the next answer.

        Raises:
            DataError: when the template refuses the chat.
        """
        return self._render(messages, add_generation_prompt=True)[0]

    def turns(self, messages: Sequence[Message]) -> list[Turn]:
        """Return each answer of a chat that is trained on, as at inference.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        return [
            turn
            for index, message in enumerate(messages)
            if message.role == "assistant" and message.train
            for turn in self.answers(messages[:index], [message])
        ]

    def answers(self, before: Sequence[Message], answers: Sequence[Message]) -> list[Turn]:
        """Return answers to the same messages as at inference.

        Raises:
            DataError: when the template cannot carry the chat.
        """
        prompt = self.prompt(before)
        if self.native:
            return [Turn(prompt, [Piece(a.content + TURN_END, True)]) for a in answers]
        self._check_shown(before, prompt)
        return [Turn(prompt, self._answer(before, answer, prompt)) for answer in answers]

    def _answer(self, before: Sequence[Message], answer: Message, prompt: str) -> list[Piece]:
        text, spans = self._render([*before, answer], add_generation_prompt=False)
        after = self._after
        if after is not None and text.startswith(prompt) and text.endswith(after):
            body = text[len(prompt) : len(text) - len(after)]
            if answer.content.strip() in body or _spaceless(answer.content) in _spaceless(body):
                return self._pieces(body + self._end(after), len(prompt), spans)
        return [Piece(self._rewritten(before, answer, prompt, text), True)]

    def _rewritten(self, before: Sequence[Message], answer: Message, prompt: str, text: str) -> str:
        """Return the answer's text where the rendered chat does not continue the prompt with it.

        The answer is rendered a second time as `ANSWER`, to see what stands around it.
        """
        chat = [*before, Message("assistant", ANSWER)]
        probe, _ = self._render(chat, add_generation_prompt=False)
        head, separator, after = probe.partition(ANSWER)
        if not separator:
            raise _no_targets()
        shown = text[len(head) : len(text) - len(after)]
        is_whole = _spaceless(shown) == _spaceless(answer.content)
        complete = is_whole and text == head + shown + after
        content = shown if complete else answer.content.strip()
        opened, between = _joint(prompt, head)
        if "</think>" in between and "</think>" in content:
            between = ""
        return between + _continuation(opened, content) + self._end(after)

    def _end(self, after: str) -> str:
        """Return the end of a turn, which is what follows an answer up to its end token."""
        if not self.turn_end or self.turn_end not in after:
            return self.turn_end
        return after.partition(self.turn_end)[0] + self.turn_end

    def _pieces(self, answer: str, start: int, spans: Sequence[tuple[int, int]]) -> list[Piece]:
        """Cut an answer where the template's ``{% generation %}`` marks begin and end."""
        if not self.marked:
            return [Piece(answer, True)]
        clipped = [(max(a - start, 0), min(b - start, len(answer))) for a, b in spans]
        clipped = [(a, b) for a, b in clipped if a < b]
        if not clipped:
            raise _no_targets()
        if not answer[: clipped[0][0]].strip():  # the space before an answer is learnt, too
            clipped[0] = (0, clipped[0][1])
        if answer[clipped[-1][1] :].strip() in ("", self.turn_end):  # and so is the end of a turn
            clipped[-1] = (clipped[-1][0], len(answer))
        pieces = []
        done = 0
        for a, b in clipped:
            pieces += [Piece(answer[done:a], False), Piece(answer[a:b], True)]
            done = b
        return [piece for piece in pieces if piece.text]

    def _check_shown(self, messages: Sequence[Message], prompt: str) -> None:
        """Refuse a chat of which the template leaves out what system or user say."""
        for message in messages:
            text = self._broken(message).strip()
            if message.role == "assistant" or text in prompt:
                continue
            if _spaceless(text) not in _spaceless(prompt):
                raise DataError(
                    f"the chat template leaves out the text of the {message.role} message",
                    remedy=REMEDY,
                    reason="template",
                )

    def _broken(self, message: Message) -> str:
        """Return a message's text with `BREAK` behind the first character of each control token.

        Raises:
            DataError: when the tokenizer would make a control token of the text all the same.
        """
        text = message.content
        if message.role == "assistant":
            return text
        if self._control.search(text):
            cuts = [match.start() + 1 for match in self._overlapping.finditer(text)]
            borders = zip([0, *cuts], [*cuts, len(text)], strict=True)
            text = BREAK.join(text[start:end] for start, end in borders)
        elif self._normalizer is None:
            return text
        pieces = text.split(BREAK)
        if self._normalizer is not None:
            pieces = [self._normalizer.normalize_str(piece) for piece in pieces]
        for piece in pieces:
            if unbroken := self._control.search(piece):
                raise DataError(
                    f"the {message.role} message holds {unbroken.group()!r}, which the tokenizer "
                    "cannot read as text",
                    remedy="Remove it: what a user says must not be able to end a turn.",
                    reason="special_token",
                )
        return text

    def _render(
        self, messages: Sequence[Message], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return a chat as text, with the spans of the template's marks."""
        chat = [{"role": m.role, "content": self._broken(m)} for m in messages]
        render = self._render_native if self.native else self._render_jinja
        return render(chat, add_generation_prompt)

    def _render_native(
        self, chat: list[dict[str, str]], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render our own template, several times as fast as Jinja does."""
        turns = [f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in chat]
        return "".join(turns) + f"{TURN_START}assistant\n" * add_generation_prompt, []

    def _render_jinja(
        self, chat: list[dict[str, str]], add_generation_prompt: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            with _bounded():
                rendered = self.renderer(
                    conversations=[chat],
                    chat_template=self.source,
                    return_assistant_tokens_mask=self.marked and not add_generation_prompt,
                    add_generation_prompt=add_generation_prompt,
                    **self._variables,
                )
        except TokenizerError:
            raise
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"The chat template is no valid Jinja: {error.message} in its line "
                f"{error.lineno}. Mend it, or set {OPTION} to another."
            ) from error
        except Exception as error:  # a template is a program
            raise DataError(
                f"the chat template refuses the chat: {reason_of(error)}",
                remedy=REMEDY,
                reason="template",
            ) from error
        texts, spans = cast(tuple[list[str], list[list[tuple[int, int]]]], rendered)
        if len(texts[0]) > LONGEST + LONGEST_RATIO * sum(len(m["content"]) for m in chat):
            raise _endless()
        return texts[0], list(spans[0]) if spans else []

    def _probe(self) -> str:
        """Return the smallest chat with an answer as text, "" where the template refuses it."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            render = self._render_native if self.native else self._render_jinja
            return render(chat, add_generation_prompt=False)[0]
        except DataError:
            return ""


def _the_template(template: object) -> str:
    """Return a tokenizer's template; raise a TokenizerError when it has several, or none."""
    if isinstance(template, dict):
        raise TokenizerError(
            f"The tokenizer has several chat templates ({', '.join(sorted(template))}), and none "
            f"of them is called default. Train with {OPTION} set to one of these names."
        )
    if not template:
        raise TokenizerError(
            "The tokenizer has no chat template. SFT, DPO and LoRA install one; start from a "
            f"model that went through one of them, or set {OPTION} to the file of one."
        )
    return str(template)


@contextmanager
def _bounded() -> Iterator[None]:
    """Refuse a template that takes too much time or memory in here."""
    try:
        with limited_time(RENDER_SECONDS), limited_memory(RENDER_MEMORY):
            yield
    except (TimeUpError, MemoryError) as error:
        raise _endless() from error


def _endless() -> TokenizerError:
    return TokenizerError(
        f"The chat template does not end: a chat takes more than {RENDER_SECONDS} seconds, "
        f"{RENDER_MEMORY // MEGABYTE} MB or {LONGEST:,} characters. Set {OPTION} to another."
    )


def _control_texts(tokenizer: PreTrainedTokenizerFast, template: str) -> list[str]:
    control = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip()
        and (token.special or token.content in control or token.content in template)
    ]


def _turn_texts(tokenizer: PreTrainedTokenizerFast, probe: str) -> list[str]:
    ends = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, END_OF_TEXT}
    return [text for text in special_texts(tokenizer) if text in probe or text in ends]


def _spaceless(text: str) -> str:
    return SPACE.sub("", text)


def _no_targets() -> DataError:
    return DataError(
        "the chat template leaves no assistant text to train on",
        remedy=f"Check its {{% generation %}} block, or set {OPTION} to another.",
        reason="no_targets",
    )


def _joint(prompt: str, head: str) -> tuple[str, str]:
    """Return what the prompt writes beyond `head`, and what is still missing before the answer.

    Args:
        prompt: the text that inference sends.
        head: the text before the answer, as rendered with the answer behind it.
    """
    if prompt.startswith(head):
        return prompt[len(head) :], ""
    if head.startswith(prompt):
        return "", head[len(prompt) :]
    for length in range(min(len(head), 64)):  # earlier turns differ, so only the ends compare
        if _same_end(prompt, head[: len(head) - length]):
            return "", head[len(head) - length :]
    if _same_end(prompt.rstrip(), head.rstrip()):
        return "", ""
    raise DataError(
        "the chat template rewrites earlier turns, so the assistant's text cannot be told apart",
        remedy=REMEDY,
        reason="template",
    )


def _same_end(left: str, right: str) -> bool:
    return len(right) >= SAME_END and left.endswith(right[-SAME_END:])


def _continuation(opened: str, answer: str) -> str:
    """Return what is left to say of an answer after what the prompt has already written of it.

    A block that the prompt opens, such as ``<think>``, and the answer lacks is closed at once.
    """
    begun = opened.strip()
    if begun and answer.lstrip().startswith(begun):
        return answer.lstrip()[len(begun) :].removeprefix(opened[len(opened.rstrip()) :])
    closing = begun.replace("<", "</", 1)
    if begun.startswith("<") and begun.endswith(">") and closing not in answer:
        return f"\n{closing}\n\n{answer}"
    return answer


def turn_end(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the first special token that the chat template writes after an answer.

    Where an answer is followed by none, as in GLM's, it is the token that begins the user's
    next turn. None without a template, or where the template writes no special token there.
    """
    if not tokenizer.chat_template:
        return None
    if tokenizer.chat_template == CHAT_TEMPLATE:
        return TURN_END
    for chat in (_PROBE_CHAT, [*_PROBE_CHAT, _PROBE_CHAT[0]]):
        try:
            with _bounded():
                text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except TokenizerError:
            raise
        except Exception:  # a template is a program
            return None
        _, answer, tail = text.partition(PROBE_ANSWER)
        token = _first_token(tail.partition(PROBE_QUESTION)[0], tokenizer) if answer else None
        if token:
            return token
    return None


def _first_token(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the special token that comes first in a text, or else the first added token."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {tokenizer.eos_token}
    others = {token.content for token in added if token.content.strip()}
    for names in (special, others):
        matches = [(text.find(name), -len(name), name) for name in names if name and name in text]
        if matches:
            return min(matches)[2]
    return None


def end_tokens(
    tokenizer: PreTrainedTokenizerFast, eos_token_id: int | Iterable[int] | None = None
) -> list[int]:
    """Return the ids that end a reply, in ascending order.

    Args:
        tokenizer: the tokenizer that the model was trained with.
        eos_token_id: the setting in the model's generation config.
    """
    backend = tokenizer.backend_tokenizer
    names = filter(None, (tokenizer.eos_token, turn_end(tokenizer), TURN_END, END_OF_TEXT))
    ends = [backend.token_to_id(str(name)) for name in names]
    configured = [eos_token_id] if isinstance(eos_token_id, int) else eos_token_id or []
    ends += [token for token in configured if token >= 0 and backend.id_to_token(token)]
    return sorted({token for token in ends if token is not None})
