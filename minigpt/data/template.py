"""Chat templates: chats become text as at inference, whatever the template does.

Only what inference sends counts as a prompt. An answer is what the model is to say after that
prompt, up to the token that ends its turn. So a template may drop earlier reasoning, move the
system's text, or open a block of reasoning in its generation prompt: each answer is read off
the chat that ends with it, never off a longer one.

A control token in the text of a system or user message is broken by `BREAK`, so that it stays
text: nobody but the template and the assistant can begin or end a turn.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data.ends import turn_end
from minigpt.data.records import Message
from minigpt.data.tokenizer import CHAT_TEMPLATE, END_OF_TEXT, TURN_END, TURN_START, special_texts
from minigpt.errors import DataError, TokenizerError

# Halves of surrogate pairs: no valid text holds them, so they cannot be confused with content.
BREAK = "\ud800"
ANSWER = "\ud801"
OPTION = "model.init_args.chat_template"
REMEDY = f"Leave it out (on_bad_row: skip does, in training), or train with another {OPTION}."
FAILURES = (TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
SAME_END = 4  # characters by which two renderings of a prompt must end alike to be aligned
SPACE = re.compile(r"\s+")


class Piece(NamedTuple):
    """A run of rendered text, and whether the model is trained to say it."""

    text: str
    target: bool


class Turn(NamedTuple):
    """What inference sends, and what the model is to say then."""

    prompt: str
    answer: list[Piece]


def has_generation_marks(template: str | None) -> bool:
    """Whether a chat template marks the assistant's turns with ``{% generation %}``."""
    return template is not None and "endgeneration" in template


class ChatTemplate:
    """Renders chats with a tokenizer's chat template.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Attributes:
        control: texts that stay text in what system and user say: special tokens, and other
            added tokens that the template writes.
        turn_texts: special tokens that begin or end a turn or a text.
        turn_end: the text of the token that ends an answer; "" where there is none.

    Raises:
        TokenizerError: when there is no template, or it is no valid Jinja.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.source: str = _single(tokenizer.chat_template)
        self.native = self.source == CHAT_TEMPLATE
        self.marked = has_generation_marks(self.source)
        self._variables: dict[str, Any] = dict(tokenizer.special_tokens_map)
        self.turn_end = str(turn_end(tokenizer) or tokenizer.eos_token or "")
        probe = self._probe()
        self._after = probe.partition(ANSWER)[2] if ANSWER in probe else None
        self.control = _control_texts(tokenizer, self.source + probe)
        self.turn_texts = _turn_texts(tokenizer, probe)
        named = "|".join(map(re.escape, sorted(self.control, key=len, reverse=True))) or "(?!)"
        self._control, self._overlapping = re.compile(named), re.compile(f"(?={named})")
        added = tokenizer.added_tokens_decoder.values()
        read = any(token.normalized and token.content in self.control for token in added)
        self._normalizer = tokenizer.backend_tokenizer.normalizer if read else None

    def prompt(self, messages: Sequence[Message]) -> str:
        """Return the text that asks for the next answer.

        Raises:
            DataError: when the template refuses the chat.
        """
        return self._render(messages, ask=True)[0]

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
        text, spans = self._render([*before, answer], ask=False)
        after = self._after
        if after is not None and text.startswith(prompt) and text.endswith(after):
            body = text[len(prompt) : len(text) - len(after)]
            if answer.content.strip() in body or _squeeze(answer.content) in _squeeze(body):
                said = body + self._end(after)
                return self._targets(said, len(prompt), text, spans)
        return [Piece(self._rewritten(before, answer, prompt, text), True)]

    def _rewritten(self, before: Sequence[Message], answer: Message, prompt: str, text: str) -> str:
        """Return what is to be said where the template shows the answer otherwise than the prompt.

        The answer is rendered a second time as `ANSWER`, to see what stands around it.
        """
        probe = self._render([*before, Message("assistant", ANSWER)], ask=False)[0]
        head, found, after = probe.partition(ANSWER)
        if not found:
            raise _no_targets()
        shown = text[len(head) : len(text) - len(after)]
        whole = _squeeze(shown) == _squeeze(answer.content) and text == head + shown + after
        said = shown if whole else answer.content.strip()
        opened, between = _joint(prompt, head)
        if "</think>" in between and "</think>" in said:
            between = ""
        return between + _within(opened, said) + self._end(after)

    def _end(self, after: str) -> str:
        """Return the end of a turn, which is what follows an answer up to its end token."""
        before, found, _ = after.partition(self.turn_end) if self.turn_end else (after, "", "")
        return before + found if found else self.turn_end

    def _targets(
        self, said: str, start: int, text: str, spans: Sequence[tuple[int, int]]
    ) -> list[Piece]:
        """Cut an answer where the template's ``{% generation %}`` marks begin and end."""
        if not self.marked:
            return [Piece(said, True)]
        clipped = [(max(a - start, 0), min(b - start, len(said))) for a, b in spans]
        clipped = [(a, b) for a, b in clipped if a < b]
        if not clipped:
            raise _no_targets()
        if not said[: clipped[0][0]].strip():  # the space before an answer is learnt, too
            clipped[0] = (0, clipped[0][1])
        if said[clipped[-1][1] :].strip() in ("", self.turn_end):  # and so is the end of a turn
            clipped[-1] = (clipped[-1][0], len(said))
        pieces, done = [], 0
        for a, b in clipped:
            pieces += [Piece(said[done:a], False), Piece(said[a:b], True)]
            done = b
        return [piece for piece in pieces if piece.text]

    def _check_shown(self, messages: Sequence[Message], prompt: str) -> None:
        """Refuse a chat of which the template leaves out what system or user say."""
        for message in messages:
            text = self._broken(message).strip()
            if message.role == "assistant" or text in prompt:
                continue
            if _squeeze(text) not in _squeeze(prompt):
                raise DataError(
                    f"the chat template leaves out the text of the {message.role} message",
                    remedy=REMEDY,
                    reason="template",
                )

    def _broken(self, message: Message) -> str:
        """Return a message's text, in which control tokens are broken behind a character."""
        text = message.content
        if message.role == "assistant":
            return text
        if self._control.search(text):
            places = [match.start() + 1 for match in self._overlapping.finditer(text)]
            borders = zip([0, *places], [*places, len(text)], strict=True)
            text = BREAK.join(text[start:end] for start, end in borders)
        elif self._normalizer is None:
            return text
        parts = text.split(BREAK)
        if self._normalizer is not None:
            parts = [self._normalizer.normalize_str(part) for part in parts]
        if hidden := next(filter(None, map(self._control.search, parts)), None):
            raise DataError(
                f"the {message.role} message holds {hidden.group()!r}, which the tokenizer cannot "
                "read as text",
                remedy="Remove it: what a user says must not be able to end a turn.",
                reason="special_token",
            )
        return text

    def _render(self, messages: Sequence[Message], ask: bool) -> tuple[str, list[tuple[int, int]]]:
        """Return a chat as text, with the spans of the template's marks."""
        chat = [{"role": m.role, "content": self._broken(m)} for m in messages]
        return self._render_native(chat, ask) if self.native else self._render_jinja(chat, ask)

    def _render_native(
        self, chat: list[dict[str, str]], ask: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        """Render our own template, several times as fast as Jinja does."""
        turns = [f"{TURN_START}{m['role']}\n{m['content']}{TURN_END}\n" for m in chat]
        return "".join(turns) + f"{TURN_START}assistant\n" * ask, []

    def _render_jinja(
        self, chat: list[dict[str, str]], ask: bool
    ) -> tuple[str, list[tuple[int, int]]]:
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                chat_template=self.source,
                return_assistant_tokens_mask=self.marked and not ask,
                add_generation_prompt=ask,
                **self._variables,
            )
        except TemplateSyntaxError as error:
            raise TokenizerError(
                f"The chat template is no valid Jinja: {error.message} in its line "
                f"{error.lineno}. Mend it, or set {OPTION} to another."
            ) from error
        except FAILURES as error:
            raise DataError(
                f"the chat template refuses the chat: {error}", remedy=REMEDY, reason="template"
            ) from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if spans else []

    def _probe(self) -> str:
        """Return the smallest chat with an answer as text, "" where the template refuses it."""
        chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": ANSWER}]
        try:
            return self._render_jinja(chat, ask=False)[0]
        except DataError:
            return ""


def _single(template: object) -> str:
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


def _control_texts(tokenizer: PreTrainedTokenizerFast, template: str) -> list[str]:
    named = set(getattr(tokenizer, "chat_control_tokens", None) or ())
    return [
        token.content
        for token in tokenizer.added_tokens_decoder.values()
        if token.content.strip()
        and (token.special or token.content in named or token.content in template)
    ]


def _turn_texts(tokenizer: PreTrainedTokenizerFast, probe: str) -> list[str]:
    ends = {tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, END_OF_TEXT}
    return [text for text in special_texts(tokenizer) if text in probe or text in ends]


def _squeeze(text: str) -> str:
    return SPACE.sub("", text)


def _no_targets() -> DataError:
    return DataError(
        "the chat template leaves no assistant text to train on",
        remedy=f"Check its {{% generation %}} block, or set {OPTION} to another.",
        reason="no_targets",
    )


def _joint(prompt: str, head: str) -> tuple[str, str]:
    """Return what the prompt says beyond `head`, and what is still missing before the answer.

    Args:
        prompt: what inference sends.
        head: what stands before the answer where the answer is shown.
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


def _same_end(one: str, other: str) -> bool:
    return len(other) >= SAME_END and one.endswith(other[-SAME_END:])


def _within(opened: str, said: str) -> str:
    """Return an answer as it goes on from what the prompt has already said of it.

    A block that the prompt opens, such as ``<think>``, and the answer lacks is closed at once.
    """
    begun = opened.strip()
    if begun and said.lstrip().startswith(begun):
        return said.lstrip()[len(begun) :].removeprefix(opened[len(opened.rstrip()) :])
    closing = begun.replace("<", "</", 1)
    if begun.startswith("<") and begun.endswith(">") and closing not in said:
        return f"\n{closing}\n\n{said}"
    return said
