"""The one thread that computes: it steps every model's batch and hands out what was said."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
from collections.abc import AsyncIterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor

from minigpt.data.records import Message
from minigpt.errors import ConfigError
from minigpt.infer.batch import Batch, Delta
from minigpt.infer.engine import Engine, Sampling

log = logging.getLogger(__name__)


class QueueFullError(Exception):
    """All places are taken and the queue is full: the client should come back later."""


class ServingError(Exception):
    """An answer that was begun and cannot be finished, through no fault of the client's."""


class Job:
    """The sequences of one request, of which some may still be written."""

    def __init__(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> None:
        self.model, self.sequences = model, sequences
        self.open = set(range(len(sequences)))
        self.inbox: asyncio.Queue[tuple[int, Delta] | ServingError] = asyncio.Queue()

    async def parts(self) -> AsyncIterator[tuple[int, Delta]]:
        """Yield (sequence, new part) until all sequences are finished.

        Raises:
            ServingError: when they never will be.
        """
        left = len(self.sequences)
        while left:
            part = await self.inbox.get()
            if isinstance(part, ServingError):
                raise part
            left -= part[1].finish is not None
            yield part


class Worker:
    """Continuous batching of all requests, one batch for each model.

    `submit`, `cancel` and `fail` belong to the event loop, everything with a batch to the
    thread; between them go commands one way and parts of answers the other.

    Args:
        engines: the served models by name.
        slots: how many sequences of a model are written at once.
        max_queue: how many more may wait for a place.
    """

    def __init__(self, engines: Mapping[str, Engine], slots: int, max_queue: int) -> None:
        self.engines, self.slots, self.max_queue = engines, slots, max_queue
        self.batches = {name: Batch(engine, slots) for name, engine in engines.items()}
        self.jobs: set[Job] = set()
        self._commands: queue.SimpleQueue[tuple[str, Job | None]] = queue.SimpleQueue()
        self._owners: dict[str, dict[int, tuple[Job, int]]] = {name: {} for name in engines}
        # One thread, because chat templates and tokenizers are not safe to share.
        self._encoder = ThreadPoolExecutor(1, "minigpt-encode")
        self._thread = threading.Thread(target=self._run, name="minigpt-decode", daemon=True)
        self._loop: asyncio.AbstractEventLoop

    def start(self) -> None:
        """Start to compute, for the event loop that runs."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    def stop(self) -> None:
        """End the thread after its current step."""
        self._commands.put(("stop", None))
        self._thread.join()
        self._encoder.shutdown()

    @property
    def alive(self) -> bool:
        """Whether answers are still being computed."""
        return self._thread.is_alive()

    async def encode(self, model: str, prompt: str | Sequence[Message]) -> list[int]:
        """Return the ids of a prompt, computed beside the event loop."""
        engine = self.engines[model]
        return await self._loop.run_in_executor(self._encoder, engine.encode, prompt)

    def submit(self, model: str, sequences: Sequence[tuple[list[int], Sampling]]) -> Job:
        """Queue the sequences of one request.

        Raises:
            QueueFullError: when they find no place.
            ConfigError: when they never could.
        """
        places = self.slots + self.max_queue
        if len(sequences) > places:
            raise ConfigError(f"The request asks for {len(sequences)} answers; {places} is most.")
        if self.load(model) + len(sequences) > places:
            raise QueueFullError
        job = Job(model, sequences)
        self.jobs.add(job)
        self._commands.put(("add", job))
        return job

    def load(self, model: str) -> int:
        """Return how many sequences of a model are being written or wait."""
        return sum(len(job.open) for job in self.jobs if job.model == model)

    def cancel(self, job: Job) -> None:
        """Free what a request holds; nothing happens when it is finished."""
        if job in self.jobs:
            self.jobs.discard(job)
            self._commands.put(("cancel", job))

    def fail(self, reason: str) -> None:
        """End all requests with an error."""
        for job in list(self.jobs):
            self.cancel(job)
            job.inbox.put_nowait(ServingError(reason))

    def _run(self) -> None:
        while True:
            wait = all(batch.idle for batch in self.batches.values())
            while wait or not self._commands.empty():
                what, job = self._commands.get()
                wait = False
                if job is None:
                    return
                self._guarded(job.model, self._admit if what == "add" else self._drop, job)
            for model, batch in self.batches.items():
                if not batch.idle:
                    self._guarded(model, self._step, model)

    def _guarded(self, model: str, action: object, argument: object) -> None:
        """Act on a model's batch; should it break, its requests fail and a new one goes on."""
        try:
            action(argument)  # type: ignore[operator]
        except Exception:
            log.exception("The batch of %s broke; its requests are given up.", model)
            jobs = {job for job, _ in self._owners[model].values()}
            jobs |= {argument} if isinstance(argument, Job) else set()
            self._owners[model].clear()
            self.batches[model] = Batch(self.engines[model], self.slots)
            self._loop.call_soon_threadsafe(self._give_up, jobs)

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
            job, index = owners[delta.request]
            if delta.finish is not None:
                del owners[delta.request]
            parts.append((job, index, delta))
        self._loop.call_soon_threadsafe(self._deliver, parts)

    def _deliver(self, parts: Sequence[tuple[Job, int, Delta]]) -> None:
        for job, index, delta in parts:
            job.inbox.put_nowait((index, delta))
            if delta.finish is not None:
                job.open.discard(index)
                if not job.open:
                    self.jobs.discard(job)

    def _give_up(self, jobs: set[Job]) -> None:
        self.jobs -= jobs
        for job in jobs:
            job.inbox.put_nowait(ServingError("The model failed on this request."))
