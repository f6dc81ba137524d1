"""Prompts become tokens: for each model one after the other, away from the event loop."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

from minigpt.data.formats import Message
from minigpt.data.template_process import TemplateProcess
from minigpt.errors import MiniGPTError
from minigpt.infer.continuous_batch import is_failure
from minigpt.infer.engine import Engine

log = logging.getLogger(__name__)


class EncodingError(Exception):
    """A prompt at which the tokenizer of its model failed."""


class Encoder:
    """Encodes the prompts of one model, in a thread of its own.

    The tokenizer computes without the GIL, and a chat template that is not ours is rendered in a
    process, so that neither can hold up the event loop or another model.

    Args:
        engine: the model.

    Attributes:
        max_characters: no text of more characters has few enough tokens for the context.
    """

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        longest = max(map(len, engine.tokenizer.get_vocab()), default=1)
        self.max_characters = engine.context * longest
        # One thread, because chat templates and tokenizers are not made to be shared.
        self._thread = ThreadPoolExecutor(1, "minigpt-encode")
        self._process: TemplateProcess | None = None
        if engine.codec is not None and not engine.codec.template.native:
            self._process = TemplateProcess(self.max_characters)
            engine.codec.template.renderer = self._process

    async def encode(
        self, prompt: str | Sequence[Message], stopping: asyncio.Future[None]
    ) -> list[int] | None:
        """Return the ids of a prompt; None when `stopping` is done before.

        One that waits is taken off the queue when this is cancelled.

        Raises:
            MiniGPTError: for a prompt that cannot be encoded.
            EncodingError: when the tokenizer fails.
        """
        loop = asyncio.get_running_loop()
        work = loop.run_in_executor(self._thread, self._encode, prompt)
        try:
            futures: set[asyncio.Future[Any]] = {work, stopping}
            await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
            return work.result() if work.done() else None
        finally:
            work.cancel()

    def _encode(self, prompt: str | Sequence[Message]) -> list[int]:
        try:
            return self.engine.encode(prompt)
        except BaseException as error:
            if isinstance(error, MiniGPTError) or not is_failure(error):
                raise
            raise EncodingError(f"The tokenizer failed on this prompt: {error!r}") from None

    def close(self) -> None:
        """Encode no more; what is being encoded is not waited for."""
        self._thread.shutdown(wait=False, cancel_futures=True)
        if self._process is not None and self.engine.codec is not None:
            self._process.close()
            self.engine.codec.template.renderer = render_jinja_template
