"""The thread that computes: it steps the batch of each model and hands out the new tokens."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from minigpt.data.formats import Message
from minigpt.errors import ConfigError
from minigpt.infer.continuous_batch import ContinuousBatch, Delta
from minigpt.infer.engine import Engine, Sampling

log = logging.getLogger(__name__)

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
            remaining -= item[1].finish is not None
            yield item


class Worker:
    """Continuous batching of all requests, one batch for each model.

    The public methods belong to the event loop, and all work on a batch to the thread. Between
    them go commands one way and deltas the other.

    Args:
        engines: the served models by name.
        slots: how many sequences of a model are generated at once.
        max_queue: how many more may wait.
    """

    def __init__(self, engines: Mapping[str, Engine], slots: int, max_queue: int) -> None:
        self.engines = engines
        self.slots = slots
        self.capacity = slots + max_queue
        self.batches = {name: ContinuousBatch(engine, slots) for name, engine in engines.items()}
        self.completions: set[Completion] = set()
        self.broken = False
        self._encoding: Counter[str] = Counter()  # prompts that are encoded, or wait for it
        self._commands: queue.SimpleQueue[tuple[Callable[[Completion], None], Completion] | None]
        self._commands = queue.SimpleQueue()
        # Of each model: number of a request in its batch -> completion and index of the sequence.
        self._owners: dict[str, dict[int, tuple[Completion, int]]] = {name: {} for name in engines}
        # One thread, because chat templates and tokenizers are not made to be shared.
        self._encoder = ThreadPoolExecutor(1, "minigpt-encode")
        self._thread = threading.Thread(target=self._run, name="minigpt-decode", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Start to compute, for the running event loop."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._commands.put(None)
        self._thread.join()
        self._encoder.shutdown()

    @property
    def alive(self) -> bool:
        """Whether answers are still being computed."""
        return self._thread.is_alive() and not self.broken

    async def encode(self, model: str, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt, which counts as load while it waits to be encoded."""
        self._encoding[model] += 1
        try:
            encode = self.engines[model].encode
            return await self._loop.run_in_executor(self._encoder, encode, prompt)
        finally:
            self._encoding[model] -= 1

    def submit(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> Completion:
        """Queue the sequences of one request; errors are those of `check_capacity`."""
        self.check_capacity(model, len(sequences))
        completion = Completion(model, sequences)
        self.completions.add(completion)
        self._commands.put((self._admit, completion))
        return completion

    def load(self, model: str) -> int:
        """Return how many sequences of a model are generated, wait, or are being encoded."""
        generated = sum(len(c.unfinished) for c in self.completions if c.model == model)
        return generated + self._encoding[model]

    def check_capacity(self, model: str, count: int) -> None:
        """See that so many more sequences can be taken.

        Raises:
            ServingError: when nothing is computed any more.
            ConfigError: when they never could.
            QueueFullError: when they cannot now.
        """
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

    def fail(self, completions: Iterable[Completion], reason: str) -> None:
        """End requests with an error."""
        for completion in set(completions):
            self.cancel(completion)
            completion.inbox.put_nowait(ServingError(reason))

    def _run(self) -> None:
        try:
            self._compute()
        except Exception:
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
            self.batches[model] = ContinuousBatch(self.engines[model], self.slots)
            message = "The model failed on this request."
            self._loop.call_soon_threadsafe(self.fail, failed, message)

    def _admit(self, completion: Completion) -> None:
        for index, (ids, sampling) in enumerate(completion.sequences):
            number = self.batches[completion.model].add(ids, sampling)
            self._owners[completion.model][number] = (completion, index)

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
