"""Which tokens end a model's turn: what training teaches, and what stops every reply.

A model may end its turns with several tokens: those of its own generation config, the
tokenizer's eos, and the one that its chat template really writes after an answer, which
need not be the eos (``<|end|>`` of Phi, ``<end_of_turn>`` of Gemma, ``<|eot_id|>`` of
Llama 3).
"""

from __future__ import annotations

from collections.abc import Iterable

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerFast

from minigpt.data.tokenizer import END_OF_TEXT, TURN_END

QUESTION, ANSWER = "Xyzzy", "Plugh"  # words that no template writes
_CHAT = [{"role": "user", "content": QUESTION}, {"role": "assistant", "content": ANSWER}]


def turn_end(tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the first special token that the chat template writes after an answer.

    Where an answer is followed by none, as in GLM's, it is the token that begins the user's
    next turn. None without a template, or where the template writes no special token there.
    """
    if not tokenizer.chat_template:
        return None
    for chat in (_CHAT, [*_CHAT, _CHAT[0]]):
        try:
            text = str(tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, ValueError, TypeError):
            return None
        _, answer, tail = text.partition(ANSWER)
        if answer and (found := _first_token(tail.partition(QUESTION)[0], tokenizer)):
            return found
    return None


def _first_token(text: str, tokenizer: PreTrainedTokenizerFast) -> str | None:
    """Return the special token that comes first in a text, or else the first added token."""
    added = tokenizer.added_tokens_decoder.values()
    special = {token.content for token in added if token.special} | {tokenizer.eos_token}
    others = {token.content for token in added if token.content.strip()}
    for names in (special, others):
        places = [(text.find(name), -len(name), name) for name in names if name and name in text]
        if places:
            return min(places)[2]
    return None


def end_tokens(
    tokenizer: PreTrainedTokenizerFast, own: int | Iterable[int] | None = None
) -> list[int]:
    """Return the ids that end a reply, in ascending order.

    Args:
        tokenizer: the model's own.
        own: `eos_token_id` of the model's generation config.
    """
    backend = tokenizer.backend_tokenizer
    names = filter(None, (tokenizer.eos_token, turn_end(tokenizer), TURN_END, END_OF_TEXT))
    ends = [backend.token_to_id(str(name)) for name in names]
    given = [own] if isinstance(own, int) else own or []
    ends += [token for token in given if token >= 0 and backend.id_to_token(token)]
    return sorted({token for token in ends if token is not None})
