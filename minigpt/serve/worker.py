"""The thread that computes: it steps the batch of each model and hands out the new tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TypeVar

from minigpt.data.formats import Message
from minigpt.errors import ConfigError
from minigpt.infer.continuous_batch import ContinuousBatch, Delta
from minigpt.infer.engine import Engine, Sampling
from minigpt.serve.encoder import Encoder, EncodingError

log = logging.getLogger(__name__)

STOPPED = "The server was stopped."
# Tokens of prompts that one step reads: all answers of the model wait for it, and so does a stop.
PREFILL = {"cpu": 512, "cuda": 4096}
Argument = TypeVar("Argument")


class QueueFullError(Exception):
    """The server is at its capacity: the client should come back later."""


class ServingError(Exception):
    """An answer that cannot be finished, through no fault of the client's."""

    def __init__(self, reason: str, status: int = 500) -> None:
        super().__init__(reason)
        self.status = status


class Completion:
    """The sequences of one HTTP request.

    Args:
        model: name of the model.
        sequences: ids of a prompt and its sampling, for each sequence to generate.
    """

    def __init__(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> None:
        self.model = model
        self.sequences = sequences
        self.started_at = time.perf_counter()
        self.unfinished = set(range(len(sequences)))
        self.inbox: asyncio.Queue[tuple[int, Delta] | ServingError] = asyncio.Queue()

    async def deltas(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (sequence, new tokens) until all are finished, or raise ServingError."""
        remaining = len(self.sequences)
        while remaining:
            item = await self.inbox.get()
            if isinstance(item, ServingError):
                raise item
            if item[1].error:
                raise ServingError(item[1].error)
            remaining -= item[1].finish is not None
            yield item


class Worker:
    """Continuous batching of all requests, one batch for each model.

    The public methods belong to the event loop, and all work on a batch to the thread. Between
    them go commands one way and deltas the other. Each model's prompts are encoded in a thread of
    their own.

    Args:
        engines: the served models by name.
        slots: how many sequences of a model are generated at once.
        max_queue: how many more may wait.
    """

    def __init__(self, engines: Mapping[str, Engine], slots: int, max_queue: int) -> None:
        self.engines = engines
        self.slots = slots
        self.capacity = slots + max_queue
        self.batches = {name: self._batch(name) for name in engines}
        self.completions: set[Completion] = set()
        self.broken = False
        self.encoders = {name: Encoder(engine) for name, engine in engines.items()}
        self._reserved: Counter[str] = Counter()  # sequences whose prompts are being encoded
        self._commands: queue.SimpleQueue[tuple[Callable[[Completion], None], Completion] | None]
        self._commands = queue.SimpleQueue()
        # Of each model: number of a request in its batch -> completion and index of the sequence.
        self._owners: dict[str, dict[int, tuple[Completion, int]]] = {name: {} for name in engines}
        self._thread = threading.Thread(target=self._run, name="minigpt-decode", daemon=True)
        self._loop: asyncio.AbstractEventLoop
        self._stopping: asyncio.Future[None]

    def start(self) -> None:
        """Start to compute, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._stopping = self._loop.create_future()
        self._thread.start()

    def end_requests(self) -> None:
        """End all requests, those whose prompts are being encoded too, and take no more."""
        if not self._stopping.done():
            self._stopping.set_result(None)
        self.fail(self.completions, STOPPED, 503)

    def stop(self) -> None:
        """End the thread after its current step."""
        self.end_requests()
        for encoder in self.encoders.values():
            encoder.close()
        self._commands.put(None)
        self._thread.join()

    @property
    def alive(self) -> bool:
        """Whether answers are still being computed."""
        return self._thread.is_alive() and not self.broken

    @contextmanager
    def reserved(self, model: str, count: int) -> Iterator[None]:
        """Count sequences as load until the block ends; errors are those of `check_capacity`."""
        self.check_capacity(model, count)
        self._reserved[model] += count
        try:
            yield
        finally:
            self._reserved[model] -= count

    async def encode(self, model: str, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt.

        Raises:
            MiniGPTError: for a prompt that cannot be encoded.
            ServingError: when the tokenizer fails, or the server stops.
        """
        try:
            ids = await self.encoders[model].encode(prompt, self._stopping)
        except EncodingError as error:
            log.error("%s: %s", model, error)
            raise ServingError(str(error)) from None
        if ids is None:
            raise ServingError(STOPPED, 503)
        return ids

    def submit(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> Completion:
        """Queue the sequences of one request; errors are those of `check_capacity`."""
        self.check_capacity(model, len(sequences))
        completion = Completion(model, sequences)
        self.completions.add(completion)
        self._commands.put((self._admit, completion))
        return completion

    def load(self, model: str) -> int:
        """Return how many sequences of a model are generated, wait, or are reserved."""
        generated = sum(len(c.unfinished) for c in self.completions if c.model == model)
        return generated + self._reserved[model]

    def check_capacity(self, model: str, count: int) -> None:
        """Check that so many more sequences can be taken.

        Raises:
            ServingError: when nothing is computed any more.
            ConfigError: when they are more than an idle server takes.
            QueueFullError: when they are more than it takes now.
        """
        if self._stopping.done():
            raise ServingError(STOPPED, 503)
        if not self.alive:
            raise ServingError("The server computes no answers any more. Restart it.", 503)
        if count > self.capacity:
            raise ConfigError(f"{count} answers are more than {self.capacity}, the most.")
        if self.load(model) + count > self.capacity:
            raise QueueFullError

    def cancel(self, completion: Completion) -> None:
        """Free the slots of a request; nothing happens when it is finished."""
        if completion in self.completions:
            self.completions.discard(completion)
            self._commands.put((self._drop, completion))

    def fail(self, completions: Iterable[Completion], reason: str, status: int = 500) -> None:
        """End requests with an error."""
        for completion in set(completions):
            self.cancel(completion)
            completion.inbox.put_nowait(ServingError(reason, status))

    def _batch(self, model: str) -> ContinuousBatch:
        engine = self.engines[model]
        prefill = PREFILL.get(engine.model.device.type, PREFILL["cpu"])
        return ContinuousBatch(engine, self.slots, prefill)

    def _run(self) -> None:
        try:
            self._compute()
        except BaseException:  # a panic in Rust is no Exception
            log.exception("No answers are computed any more. Restart the server.")
            self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        self.broken = True  # at once, as the thread lives on for a moment
        self.fail(self.completions, "The server failed on this request.")

    def _compute(self) -> None:
        while True:
            idle = all(batch.idle for batch in self.batches.values())
            while idle or not self._commands.empty():
                command = self._commands.get()
                idle = False
                if command is None:
                    return
                action, completion = command
                self._guarded(completion.model, action, completion)
            for model, batch in self.batches.items():
                if not batch.idle:
                    self._guarded(model, self._step, model)

    def _guarded(self, model: str, action: Callable[[Argument], None], argument: Argument) -> None:
        """Act on a model's batch; if it breaks, its requests fail and a new one takes its place."""
        try:
            action(argument)
        except Exception:
            log.exception("The batch of %s broke; its requests are given up.", model)
            failed = {completion for completion, _ in self._owners[model].values()}
            if isinstance(argument, Completion):
                failed.add(argument)
            self._owners[model].clear()
            self.batches[model] = self._batch(model)
            message = "The model failed on this request."
            self._loop.call_soon_threadsafe(self.fail, failed, message)

    def _admit(self, completion: Completion) -> None:
        """Add the sequences of a request to their batch; an error ends this request alone."""
        try:
            for index, (ids, sampling) in enumerate(completion.sequences):
                number = self.batches[completion.model].add(ids, sampling)
                self._owners[completion.model][number] = (completion, index)
        except Exception:
            log.exception("A request to %s cannot be added to its batch.", completion.model)
            message = "The model cannot take this request."
            self._loop.call_soon_threadsafe(self.fail, {completion}, message)

    def _drop(self, completion: Completion) -> None:
        owners = self._owners[completion.model]
        for number in [number for number, (owner, _) in owners.items() if owner is completion]:
            del owners[number]
            self.batches[completion.model].cancel(number)

    def _step(self, model: str) -> None:
        owners = self._owners[model]
        deltas = []
        for delta in self.batches[model].step():
            deltas.append((*owners[delta.request], delta))
            if delta.finish is not None:
                del owners[delta.request]
        self._loop.call_soon_threadsafe(self._deliver, deltas)

    def _deliver(self, deltas: Sequence[tuple[Completion, int, Delta]]) -> None:
        for completion, index, delta in deltas:
            completion.inbox.put_nowait((index, delta))
            if delta.finish is not None:
                completion.unfinished.discard(index)
                if not completion.unfinished:
                    self.completions.discard(completion)
