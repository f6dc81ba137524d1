"""From prompts to token ids: what a model continues, or is asked."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerFast

from minigpt.data.chat import ChatCodec
from minigpt.data.formats import Message
from minigpt.data.tokenizer import document_end, document_start, with_start
from minigpt.errors import ConfigError, DataError


class PromptCodec:
    """Turns prompts into token ids, the same in training and inference.

    Args:
        tokenizer: a fast tokenizer; without a chat template, it takes plain texts only.

    Attributes:
        chats: encodes chats; None without a chat template.
        start: the tokens that the tokenizer writes before a text, such as BOS; often none.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.chats = ChatCodec(tokenizer) if tokenizer.chat_template else None
        self.start = document_start(tokenizer)

    def encode(self, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a text to continue, or of a chat to answer.

        Raises:
            ConfigError: for a chat when the tokenizer has no chat template.
            DataError: for text that is not valid Unicode, and for a chat that the template refuses
                or makes nothing of.
        """
        check_unicode(prompt)
        if isinstance(prompt, str):
            # A batch of one, because `encode` holds the GIL until it is done.
            backend = self.tokenizer.backend_tokenizer
            (encoding,) = backend.encode_batch_fast([prompt], add_special_tokens=False)
            ids = with_start(list(encoding.ids), self.start)
            return ids or [document_end(self.tokenizer)]
        if self.chats is None:
            raise ConfigError("This model has no chat template: give a plain text prompt.")
        ids = self.chats.encode_prompt(prompt)
        if not ids:
            raise DataError(
                "the chat template writes nothing for this chat",
                remedy="Check it, or give another chat.",
                reason="template",
            )
        return ids


def check_unicode(prompt: str | Sequence[Message]) -> None:
    """Refuse, with a DataError, text that is not valid Unicode."""
    texts = [prompt] if isinstance(prompt, str) else [m.content for m in prompt]
    try:
        "".join(texts).encode()
    except UnicodeEncodeError:
        raise DataError(
            "the prompt holds a lone surrogate, half of a character",
            remedy="Give it as valid UTF-8.",
            reason="lone_surrogate",
        ) from None
