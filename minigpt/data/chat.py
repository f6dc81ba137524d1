"""Chats as tokens: the one place where messages become ids, for training and inference.

A chat is rendered by the tokenizer's own template and cut into pieces at the borders of
the assistant's turns; each piece is tokenised alone. So the tokens that inference sends,
plus the answer, are exactly the tokens that training saw, and the target mask needs no
guess about characters.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any, NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast
from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data.ends import target_end, turn_end
from minigpt.data.records import Message
from minigpt.data.tokenizer import CHAT_TEMPLATE, TURN_END, TURN_START
from minigpt.errors import DataError, TokenizerError

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """A run of rendered text, and whether the model is trained to say it."""

    text: str
    target: bool


def has_generation_marks(template: str | None) -> bool:
    """Whether a chat template marks the assistant's turns with ``{% generation %}``."""
    return template is not None and "endgeneration" in template


def install_template(tokenizer: PreTrainedTokenizerFast) -> bool:
    """Give a tokenizer without a chat template ours; return whether tokens were added.

    The caller resizes the embeddings when it returns True.
    """
    if tokenizer.chat_template:
        return False
    before = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": [TURN_START, TURN_END]})
    tokenizer.eos_token = TURN_END
    tokenizer.chat_template = CHAT_TEMPLATE
    added = len(tokenizer) - before
    log.warning("The tokenizer has no chat template: ours was installed, %d tokens added.", added)
    return added > 0


class ChatCodec:
    """Turns messages into pieces of text and pieces into token ids.

    Args:
        tokenizer: a fast tokenizer with a chat template.

    Raises:
        TokenizerError: when the tokenizer has no chat template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        if not tokenizer.chat_template:
            raise TokenizerError(
                "The tokenizer has no chat template. SFT, DPO and LoRA install one; start "
                "from a model that went through one of them, or set chat_template."
            )
        self.tokenizer = tokenizer
        self.marked = has_generation_marks(tokenizer.chat_template)
        self.turn_end = turn_end(tokenizer) or tokenizer.eos_token
        special = tokenizer.special_tokens_map
        self._variables: dict[str, Any] = {
            key: value for key, value in special.items() if isinstance(value, str)
        }

    def prompt(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the pieces that ask for the next answer, past answers masked as in training."""
        return self._pieces(messages, ask=True)

    def chat(self, messages: Sequence[Message]) -> list[Piece]:
        """Return the pieces of a whole chat; assistant turns are targets.

        Raises:
            DataError: when the template hides or changes the assistant's turns.
        """
        pieces = self._pieces(messages, ask=False)
        if not any(piece.target for piece in pieces):
            raise DataError(
                "the chat template leaves no assistant text to train on",
                remedy="Check the template's {% generation %} block.",
                reason="no_targets",
            )
        while pieces and not pieces[-1].target:  # nothing is learnt after the last answer
            pieces.pop()
        return pieces

    def answer(self, prompt: Sequence[Message], answer: Message) -> Piece:
        """Return the answer's piece as it stands at the end of the chat."""
        return self.chat([*prompt, answer])[-1]

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        """Tokenise texts on all cores, without adding anything."""
        backend = self.tokenizer.backend_tokenizer
        return [e.ids for e in backend.encode_batch_fast(list(texts), add_special_tokens=False)]

    def encode_prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the ids that ask for the next answer."""
        ids = self.encode([piece.text for piece in self.prompt(messages)])
        return [token for piece in ids for token in piece]

    def _render(self, messages: Sequence[Message], ask: bool) -> tuple[str, list[tuple[int, int]]]:
        chat = [{"role": m.role, "content": m.content} for m in messages]
        try:
            rendered: Any = render_jinja_template(
                conversations=[chat],
                chat_template=self.tokenizer.chat_template,
                return_assistant_tokens_mask=self.marked,
                add_generation_prompt=ask,
                **self._variables,
            )
        except TemplateError as error:
            raise DataError(
                f"the chat template refuses the chat: {error}",
                remedy="Leave the row out, or use another template.",
                reason="template",
            ) from error
        texts, spans = rendered
        return texts[0], list(spans[0]) if self.marked else []

    def _pieces(self, messages: Sequence[Message], ask: bool) -> list[Piece]:
        if not self.marked:
            return self._pieces_by_prefix(messages, ask)
        text, spans = self._render(messages, ask)
        pieces, done = [], 0
        for start, marked_end in spans:
            end = target_end(text, start, marked_end, self.turn_end)
            pieces += [Piece(text[done:start], False), Piece(text[start:end], True)]
            done = end
        pieces.append(Piece(text[done:], False))
        return [piece for piece in pieces if piece.text]

    def _pieces_by_prefix(self, messages: Sequence[Message], ask: bool) -> list[Piece]:
        """Find assistant turns as what each turn adds to the rendered chat before it."""
        pieces: list[Piece] = []
        done = ""

        def add(until: int, generation: bool, target: bool) -> None:
            nonlocal done
            text = self._render(messages[:until], generation)[0]
            if not text.startswith(done):
                raise DataError(
                    "the chat template rewrites earlier turns, so the assistant's text cannot "
                    "be told apart",
                    remedy="Use a template with {% generation %} marks.",
                    reason="template",
                )
            if target:  # what follows the end of the turn belongs to the next one
                text = text[: target_end(text, len(done), len(text), self.turn_end)]
            if len(text) > len(done):
                pieces.append(Piece(text[len(done) :], target))
            done = text

        for index, message in enumerate(messages):
            if message.role == "assistant":
                add(index, True, False)
                add(index + 1, False, True)
        if ask or not pieces:
            add(len(messages), ask, False)
        return pieces
