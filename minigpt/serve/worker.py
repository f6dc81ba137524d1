"""The one thread that computes: it steps every model's batch and hands out what was said."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from minigpt.data.formats import Message
from minigpt.errors import ConfigError
from minigpt.infer.continuous_batch import ContinuousBatch, Delta
from minigpt.infer.engine import Engine, Sampling

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """All places are taken: the client should come back later."""


class ServingError(Exception):
    """An answer that cannot be finished, through no fault of the client's."""

    def __init__(self, reason: str, status: int = 500) -> None:
        super().__init__(reason)
        self.status = status


class Job:
    """The sequences of one request, of which some may still be written."""

    def __init__(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> None:
        self.model, self.sequences, self.since = model, sequences, time.perf_counter()
        self.open = set(range(len(sequences)))
        self.inbox: asyncio.Queue[tuple[int, Delta] | ServingError] = asyncio.Queue()

    async def parts(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (sequence, new part) until all are finished, or raise ServingError."""
        left = len(self.sequences)
        while left:
            part = await self.inbox.get()
            if isinstance(part, ServingError):
                raise part
            left -= part[1].finish is not None
            yield part


class Worker:
    """Continuous batching of all requests, one batch for each model.

    The public methods belong to the event loop and everything with a batch to the thread.
    Between them go commands one way and parts of answers the other.

    Args:
        engines: the served models by name.
        slots: how many sequences of a model are written at once.
        max_queue: how many more may wait.
    """

    def __init__(self, engines: Mapping[str, Engine], slots: int, max_queue: int) -> None:
        self.engines, self.slots, self.places = engines, slots, slots + max_queue
        self.batches = {name: ContinuousBatch(engine, slots) for name, engine in engines.items()}
        self.jobs: set[Job] = set()
        self.broken = False
        self._reading: Counter[str] = Counter()  # prompts that are encoded, or wait for it
        self._commands: queue.SimpleQueue[tuple[Callable[[Job], None], Job] | None]
        self._commands = queue.SimpleQueue()
        self._owners: dict[str, dict[int, tuple[Job, int]]] = {name: {} for name in engines}
        # One thread, because chat templates and tokenizers are not made to be shared.
        self._encoder = ThreadPoolExecutor(1, "minigpt-encode")
        self._thread = threading.Thread(target=self._run, name="minigpt-decode", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Start to compute, for the event loop that runs."""
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
        """Return the ids of a prompt, which takes a place while it waits to be encoded."""
        self._reading[model] += 1
        try:
            read = self.engines[model].encode
            return await self._loop.run_in_executor(self._encoder, read, prompt)
        finally:
            self._reading[model] -= 1

    def submit(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> Job:
        """Queue the sequences of one request; errors are those of `check_room`."""
        self.check_room(model, len(sequences))
        job = Job(model, sequences)
        self.jobs.add(job)
        self._commands.put((self._admit, job))
        return job

    def load(self, model: str) -> int:
        """Return how many sequences of a model are being written, wait, or are still prompts."""
        open_ = sum(len(job.open) for job in self.jobs if job.model == model)
        return open_ + self._reading[model]

    def check_room(self, model: str, count: int) -> None:
        """See that so many sequences can be taken.

        Raises:
            ServingError: when nothing is computed any more.
            ConfigError: when they never could.
            QueueFullError: when they find no place.
        """
        if not self.alive:
            raise ServingError("The server computes no answers any more. Restart it.", 503)
        if count > self.places:
            raise ConfigError(f"{count} answers are more than {self.places}, the most.")
        if self.load(model) + count > self.places:
            raise QueueFullError

    def cancel(self, job: Job) -> None:
        """Free what a request holds; nothing happens when it is finished."""
        if job in self.jobs:
            self.jobs.discard(job)
            self._commands.put((self._drop, job))

    def fail(self, jobs: set[Job], reason: str) -> None:
        """End requests with an error."""
        for job in set(jobs):
            self.cancel(job)
            job.inbox.put_nowait(ServingError(reason))

    def _run(self) -> None:
        try:
            self._compute()
        except Exception:
            log.exception("No answers are computed any more. Restart the server.")
            self._loop.call_soon_threadsafe(self._give_up)

    def _give_up(self) -> None:
        self.broken = True  # at once, as the thread lives on for a moment
        self.fail(self.jobs, "The server failed on this request.")

    def _compute(self) -> None:
        while True:
            idle = all(batch.idle for batch in self.batches.values())
            while idle or not self._commands.empty():
                command, idle = self._commands.get(), False
                if command is None:
                    return
                self._guarded(command[1].model, command[0], command[1])
            for model, batch in self.batches.items():
                if not batch.idle:
                    self._guarded(model, self._step, model)

    def _guarded(self, model: str, action: Callable[[Any], None], argument: Any) -> None:
        """Act on a model's batch; should it break, its requests fail and a new one goes on."""
        try:
            action(argument)
        except Exception:
            log.exception("The batch of %s broke; its requests are given up.", model)
            jobs = {job for job, _ in self._owners[model].values()}
            jobs |= {argument} if isinstance(argument, Job) else set()
            self._owners[model].clear()
            self.batches[model] = ContinuousBatch(self.engines[model], self.slots)
            self._loop.call_soon_threadsafe(self.fail, jobs, "The model failed on this request.")

    def _admit(self, job: Job) -> None:
        for index, (ids, sampling) in enumerate(job.sequences):
            number = self.batches[job.model].add(ids, sampling)
            self._owners[job.model][number] = (job, index)

    def _drop(self, job: Job) -> None:
        owners = self._owners[job.model]
        for number in [number for number, (owner, _) in owners.items() if owner is job]:
            del owners[number]
            self.batches[job.model].cancel(number)

    def _step(self, model: str) -> None:
        owners, parts = self._owners[model], []
        for delta in self.batches[model].step():
            parts.append((*owners[delta.request], delta))
            if delta.finish is not None:
                del owners[delta.request]
        self._loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[tuple[Job, int, Delta]]) -> None:
        for job, index, delta in parts:
            job.inbox.put_nowait((index, delta))
            if delta.finish is not None:
                job.open.discard(index)
                if not job.open:
                    self.jobs.discard(job)
