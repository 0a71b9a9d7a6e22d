"""The dispatcher: turns queued jobs into videos, and alone writes what comes of them.

It holds one call to the generator for each job in the queue, so that whoever scales the generator sees the
queue. How a video is made is a callable that it is given; it knows no HTTP.
"""

import asyncio
import contextvars
import hashlib
import logging
import os
import time
from collections.abc import AsyncGenerator, Callable, Mapping
from contextlib import aclosing, suppress
from dataclasses import dataclass
from typing import ParamSpec, TypeVar

from pipelines.config import ServeConfig
from pipelines.generation.spec import IMAGE_FILE, VideoResult, VideoSpec
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.database import UNANSWERED
from pipelines.serving.jobs import Job, JobStore
from pipelines.serving.metrics import Metrics
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

MAX_REQUEUES = 2
SWEEP_EVERY_S = 30.0
DATABASE_RETRY_S = 1.0
REPLICA_RETRY_S = 1.0  # until Serve knows that a replica is dead

P = ParamSpec("P")
T = TypeVar("T")


class QueueFullError(Exception):
    """As many videos are queued as the operator allows."""


class KeyReusedError(Exception):
    """An idempotency key stands for another request already; the argument is the id of its job."""


class NotStoredError(Exception):
    """The files of a request could not be written; the argument says why."""


class ReplicaDiedError(Exception):
    """A replica died before it had made its video; another one can make it."""


class ReplicasDiedError(Exception):
    """A video's replicas died once too often."""


@dataclass(frozen=True)
class GenerationStep:
    """What the making of a video says as it goes on.

    Attributes:
        progress: 0 at the start, 1 when the last denoising step is done.
        result: in the last one only.
    """

    progress: float
    result: VideoResult | None = None


class Dispatcher:
    """Makes queued jobs into videos. It lives in one event loop; what blocks, it does in threads.

    Args:
        store: the jobs.
        artefacts: the finished videos, and the images that videos begin with.
        generate: makes one video, of an image's file where there is one; waits for a free replica first.
            Cancelling its iterator stops the making. It raises `ReplicaDiedError`, or what is wrong with the
            video.
        metrics: what is counted on the way.
        settings: length of the queue, and how long videos are kept.
    """

    def __init__(
        self,
        store: JobStore,
        artefacts: ArtefactStore,
        generate: Callable[[VideoSpec, bytes | None], AsyncGenerator[GenerationStep, None]],
        metrics: Metrics,
        settings: ServeConfig,
    ) -> None:
        self._store = store
        self._artefacts = artefacts
        self._generate = generate
        self._metrics = metrics
        self._max_queued = settings.max_queued
        self._expire_after_s = settings.expire_after_s
        self._tasks: dict[str, asyncio.Task[None]] = {}
        self._progress: dict[str, int] = {}
        self._num_claims: dict[str, int] = {}
        self._creating = asyncio.Lock()
        self._sweeper: asyncio.Task[None] | None = None

    async def start(self) -> None:
        """Takes up every job that an earlier owner left unfinished."""
        for job in await asyncio.to_thread(self._store.requeue_unfinished):
            self._submit(job)
        self._sweeper = asyncio.create_task(self._sweep_for_ever())

    async def stop(self) -> None:
        """Stops all calls. The jobs stay as they are; the next owner takes them up."""
        assert self._sweeper is not None
        await _cancel([self._sweeper, *self._tasks.values()])

    def num_jobs(self) -> dict[str, int]:
        """How many jobs are `queued` and `in_progress`."""
        return {"queued": len(self._tasks) - len(self._progress), "in_progress": len(self._progress)}

    def queue_position(self, job_id: str) -> int | None:
        """How many jobs wait before this one; None for one that does not wait."""
        waiting = [other for other in list(self._tasks) if other not in self._progress]
        return waiting.index(job_id) if job_id in waiting else None

    def progress(self, job_id: str) -> int:
        """0 to 99 for a job that is being made, 0 for any other."""
        return self._progress.get(job_id, 0)

    async def create(
        self,
        spec: VideoSpec,
        request_id: str | None,
        idempotency_key: str | None = None,
        request_hash: str | None = None,
        files: Mapping[str, bytes] = {},
        *,
        is_waited_for: bool = False,
    ) -> Job:
        """Accepts a job: once this returns, the video will be made, or the job says why not.

        A job that was created with this `idempotency_key` before is returned as it is now.

        Args:
            spec: the video.
            request_id: the HTTP request, for the logs.
            idempotency_key: marks the request, if the client wants that.
            request_hash: what the client asked for, to be compared with the earlier request.
            files: what is kept from the beginning: `IMAGE_FILE`, where the video begins with an image.
            is_waited_for: the client waits for the video: one that goes away meanwhile abandons it.

        Raises:
            KeyReusedError: the earlier request with this key asked for something else.
            NotStoredError: the files could not be written.
            QueueFullError: too many wait already.
        """
        # Shielded: a client that goes away meanwhile must not leave a row that nobody works on.
        marks = (request_id, idempotency_key, request_hash)
        creating = asyncio.create_task(self._create(spec, *marks, files))
        try:
            return await asyncio.shield(creating)
        except asyncio.CancelledError:
            if is_waited_for:
                await asyncio.shield(self._abandon_once_created(creating))
            raise

    async def wait(self, job_id: str) -> None:
        """Returns when the job is completed, failed or deleted."""
        if job_id in self._tasks:
            await asyncio.wait([self._tasks[job_id]])

    async def abandon(self, job_id: str) -> None:
        """A client that waited for its job has gone: deletes it, unless another request asked for it too.

        What is made already stays.
        """
        if job_id not in self._tasks:
            return
        num_others = self._num_claims.get(job_id, 1) - 1
        if num_others:
            self._num_claims[job_id] = num_others
        else:
            await self.delete(job_id)

    async def delete(self, job_id: str) -> bool:
        """Stops the job if it is being made, and forgets it and its files; False if there is none."""
        # Shielded: a client that goes away meanwhile must not leave work on a row that is gone.
        return await asyncio.shield(self._delete(job_id))

    async def _delete(self, job_id: str) -> bool:
        if not await asyncio.to_thread(self._store.delete, job_id):
            return False
        await _cancel([self._tasks[job_id]] if job_id in self._tasks else [])
        await asyncio.to_thread(self._sweep)
        return True

    async def _abandon_once_created(self, creating: asyncio.Task[Job]) -> None:
        with suppress(KeyReusedError, NotStoredError, QueueFullError, *UNANSWERED):
            await self.abandon((await creating).id)

    async def _create(
        self,
        spec: VideoSpec,
        request_id: str | None,
        idempotency_key: str | None,
        request_hash: str | None,
        files: Mapping[str, bytes],
    ) -> Job:
        async with self._creating:
            earlier = None
            if idempotency_key is not None:
                earlier = await asyncio.to_thread(self._store.find, idempotency_key)
            if earlier is not None:
                if earlier.request_hash != request_hash:
                    raise KeyReusedError(earlier.id)
                if earlier.id in self._tasks:
                    self._num_claims[earlier.id] = self._num_claims.get(earlier.id, 1) + 1
                # Else a database that went away has its row, and nobody heard of that.
                if earlier.id in self._tasks or earlier.status in ("completed", "failed"):
                    _log(earlier, f"is asked for again by request {request_id}")
                    return earlier
            if self.num_jobs()["queued"] >= self._max_queued:
                raise QueueFullError
            marks = (request_id, idempotency_key, request_hash)
            job = earlier
            if job is None:
                job = await asyncio.to_thread(self._store.create, spec, *marks)
            if files:
                await self._keep(job.id, files)
            self._submit(job)
        _log(job, "accepted")
        return job

    async def _keep(self, job_id: str, files: Mapping[str, bytes]) -> None:
        """Writes what a new job needs. The row is there already: it leads the sweep to half of a file.

        Raises:
            NotStoredError: that cannot be done; the job is gone.
        """
        try:
            await asyncio.to_thread(self._artefacts.write, job_id, files)
        except OSError as error:
            with suppress(OSError):  # what resists is left to the sweep
                # A full disk must have room for the row.
                await asyncio.to_thread(self._artefacts.remove, job_id)
            await self.delete(job_id)
            raise NotStoredError(error.strerror or str(error)) from error

    def _submit(self, job: Job) -> None:
        # In a context of its own: in that of the HTTP request that created the job, Serve would take the call
        # for a part of that request and end it with it.
        task = asyncio.create_task(self._run(job), context=contextvars.Context())
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._forget(job.id))

    def _forget(self, job_id: str) -> None:
        self._tasks.pop(job_id, None)
        self._num_claims.pop(job_id, None)

    async def _run(self, job: Job) -> None:
        """Makes a job's video, again where a replica died; whatever goes wrong, the job says so."""
        try:
            while not await self._try(job):
                pass
        except Exception as error:
            code, message = _reason(error)
            await asyncio.to_thread(_persist, self._store.fail, job.id, code, message)
            self._metrics.failures.labels(code).inc()
            _log(job, f"failed: {message}", logging.ERROR, error)
            await asyncio.to_thread(self._sweep)

    async def _try(self, job: Job) -> bool:
        """Makes the video once; False if its replica died and the job is queued again."""
        try:
            await self._make(job)
        except ReplicaDiedError as error:
            deaths = await asyncio.to_thread(_persist, self._store.requeue, job.id)
            self._metrics.requeues.inc()
            _log(job, "lost its replica", logging.WARNING, error)
            if deaths is None:  # it had not begun
                await asyncio.sleep(REPLICA_RETRY_S)
            elif deaths > MAX_REQUEUES:
                raise ReplicasDiedError(
                    f"{deaths} replicas died while they made it; the last: {error}"
                ) from error
            return False
        finally:
            self._progress.pop(job.id, None)
        return True

    async def _make(self, job: Job) -> None:
        # Where no file is read, nothing is waited for: videos begin in the order of their jobs.
        image = None if job.spec.image is None else await asyncio.to_thread(self._image, job)
        async with aclosing(self._generate(job.spec, image)) as steps:
            async for step in steps:
                if job.id not in self._progress:
                    if not await asyncio.to_thread(self._begin, job.id):
                        return
                    self._metrics.wait.observe(time.time() - job.created_at)
                    _log(job, "begun")
                self._progress[job.id] = int(99 * step.progress)
                if step.result is not None:
                    done = await asyncio.to_thread(self._finish, job.id, step.result)
                    self._metrics.observe_stages(step.result.stage_durations, job.spec.num_inference_steps)
                    event = "completed" if done else "deleted, yet made,"
                    _log(job, f"{event} {time.time() - job.created_at:.3f} s after it was accepted")
                    return  # what its replica does from here on is of no concern

    def _begin(self, job_id: str) -> bool:
        """Says in the row that a replica makes the video; False if nobody wants that any more."""
        if _persist(self._store.start, job_id):
            return True
        # A database that went away may have done it before it was asked again.
        job = _persist(self._store.get, job_id)
        return job is not None and job.status == "in_progress"

    def _image(self, job: Job) -> bytes:
        """The file that the video begins with.

        Raises:
            ProPhyError: it is not there, or not whole.
        """
        with suppress(FileNotFoundError):
            content = self._artefacts.read(job.id, IMAGE_FILE)
            if hashlib.sha256(content).hexdigest() == job.spec.image:
                return content
        # The server ended while it was written.
        raise ProPhyError("the image that it begins with is not there; send it again")

    def _finish(self, job_id: str, result: VideoResult) -> bool:
        """Puts all files in place before the row says so; False if the job was deleted meanwhile.

        Runs to its end even where the job is cancelled.
        """
        try:
            self._artefacts.write(job_id, result.files)
        except OSError:
            self._artefacts.remove(job_id)  # a full disk must have room for the row that says so
            raise
        _persist(self._store.complete, job_id, result.stage_durations, self._expire_after_s)
        # Not by what `complete` says: a database that went away may have done it before it was asked again.
        wanted = _persist(self._store.get, job_id) is not None
        if not wanted:
            self._artefacts.remove(job_id)
        return wanted

    async def _sweep_for_ever(self) -> None:
        while True:
            try:
                if not await asyncio.to_thread(_persist, self._store.is_owner):
                    logger.critical("another server has taken over the job database; this one gives way")
                    os._exit(1)  # at once: what is finished from here on is no longer ours to write
                await asyncio.to_thread(self._sweep)
            except Exception:  # whatever it is, files expire and the database is asked for as before
                logger.exception("could not look after the job database and old files; trying again")
            await asyncio.sleep(SWEEP_EVERY_S)

    def _sweep(self) -> None:
        """Removes the files of deleted, failed and expired jobs; what resists waits for the next."""
        try:
            outdated = self._store.outdated()
        except UNANSWERED:
            logger.exception("could not look for old files")
            return
        for job_id in outdated:
            try:
                self._artefacts.remove(job_id)
                self._store.purge(job_id)
            except (OSError, *UNANSWERED):
                logger.exception("could not remove the files of video %s", job_id)


async def _cancel(tasks: list[asyncio.Task[None]]) -> None:
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


def _persist(transaction: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Waits for a database that is away: what was made must not be lost."""
    while True:
        try:
            return transaction(*args, **kwargs)
        except UNANSWERED as error:
            logger.warning("the job database does not answer; trying again: %s", error)
            time.sleep(DATABASE_RETRY_S)


def _reason(error: Exception) -> tuple[str, str]:
    """Why a video was not made: for programs, and for people."""
    if isinstance(error, ReplicasDiedError):
        return "replica_died", str(error)
    if isinstance(error, ProPhyError):
        return "invalid_request", str(error)
    return "generation_failed", f"{type(error).__name__}: {error}"


def _log(job: Job, event: str, level: int = logging.INFO, error: Exception | None = None) -> None:
    extra = {"video_id": job.id, "request_id": job.request_id}
    logger.log(level, "video %s %s", job.id, event, extra=extra, exc_info=error)
