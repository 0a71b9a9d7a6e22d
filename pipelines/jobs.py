"""Jobs as rows of a database, and the dispatcher that turns queued rows into videos.

One process owns both, and all that it owns can be lost but the database and the videos: a new owner takes up
every job that was not finished. Neither knows HTTP; how a video is made is a callable that the dispatcher is
given.
"""

import asyncio
import contextvars
import logging
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import RayServeException
from sqlalchemy import Dialect, Text, TypeDecorator, create_engine, delete, func, select, update
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column, sessionmaker

from pipelines.runtime import find_user_error
from pipelines.spec import VideoSpec
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

JobStatus = Literal["queued", "in_progress", "completed", "failed"]


class _SpecColumn(TypeDecorator[VideoSpec]):
    """A `VideoSpec` as JSON text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: VideoSpec | None, dialect: Dialect) -> str | None:
        return value.model_dump_json() if value is not None else None

    def process_result_value(self, value: str | None, dialect: Dialect) -> VideoSpec | None:
        return VideoSpec.model_validate_json(value) if value is not None else None


class _Base(DeclarativeBase):
    pass


class Job(_Base):
    """One accepted request for a video.

    Attributes:
        sequence: order of arrival.
        id: what clients know the job by.
        spec: the video that was asked for.
        status: `queued` until a replica has begun it.
        progress: 0 to 100.
        created_at: seconds since the epoch, as are the two below.
        started_at: when a replica began it, the last time.
        completed_at: when it was completed.
        error_code: why it failed, for programs.
        error_message: why it failed, for people.
    """

    __tablename__ = "jobs"

    sequence: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    spec: Mapped[VideoSpec] = mapped_column(_SpecColumn)
    status: Mapped[JobStatus] = mapped_column(index=True)
    progress: Mapped[int]
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)


class JobStore:
    """The table of jobs. Its methods are short transactions, may be called from any thread, and block.

    A job's status only moves along `queued -> in_progress -> completed | failed`, and back to `queued` by
    `requeue_unfinished`. A method that moves it says whether the job was still there to be moved.

    Args:
        url: of the database, as SQLAlchemy writes it.
    """

    def __init__(self, url: str) -> None:
        engine = create_engine(url)
        if engine.dialect.name == "sqlite":  # readers do not wait for the writer
            with engine.connect() as connection:
                connection.exec_driver_sql("PRAGMA journal_mode=WAL")
        _Base.metadata.create_all(engine)
        self._sessions = sessionmaker(engine, expire_on_commit=False)

    def create(self, spec: VideoSpec) -> Job:
        """Adds a queued job."""
        job = Job(
            id=f"video_{uuid.uuid4().hex}", spec=spec, status="queued", progress=0, created_at=time.time()
        )
        with self._sessions.begin() as session:
            session.add(job)
        return job

    def get(self, job_id: str) -> Job | None:
        """The job, if it exists."""
        with self._sessions() as session:
            return session.scalar(select(Job).where(Job.id == job_id))

    def page(self, after: Job | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that follow `after`, oldest first for `asc`, and whether more follow."""
        query = select(Job).order_by(getattr(Job.sequence, order)()).limit(limit + 1)
        if after is not None:
            follows = Job.sequence > after.sequence if order == "asc" else Job.sequence < after.sequence
            query = query.where(follows)
        with self._sessions() as session:
            jobs = list(session.scalars(query))
        return jobs[:limit], len(jobs) > limit

    def num_queued(self) -> int:
        """How many jobs wait for a replica."""
        with self._sessions() as session:
            return session.scalars(select(func.count()).where(Job.status == "queued")).one()

    def requeue_unfinished(self) -> list[Job]:
        """Puts what an earlier owner had in progress back into the queue; returns the queue, oldest first."""
        with self._sessions.begin() as session:
            session.execute(
                update(Job).where(Job.status == "in_progress").values(status="queued", progress=0)
            )
            return list(session.scalars(select(Job).where(Job.status == "queued").order_by(Job.sequence)))

    def start(self, job_id: str) -> bool:
        """A replica has begun the job."""
        return self._move(job_id, ("queued",), status="in_progress", started_at=time.time())

    def set_progress(self, job_id: str, progress: int) -> bool:
        """Notes the progress, 0 to 100, of a job that is being made."""
        return self._move(job_id, ("in_progress",), progress=progress)

    def complete(self, job_id: str) -> bool:
        """The video is there."""
        return self._move(
            job_id, ("in_progress",), status="completed", progress=100, completed_at=time.time()
        )

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """The video will not be made."""
        return self._move(
            job_id, ("queued", "in_progress"), status="failed", error_code=code, error_message=message
        )

    def delete(self, job_id: str) -> bool:
        """Forgets the job."""
        with self._sessions.begin() as session:
            return session.scalar(delete(Job).where(Job.id == job_id).returning(Job.id)) is not None

    def _move(self, job_id: str, before: tuple[JobStatus, ...], **values: Any) -> bool:
        job = update(Job).where(Job.id == job_id, Job.status.in_(before))
        with self._sessions.begin() as session:
            return session.scalar(job.values(**values).returning(Job.id)) is not None


@dataclass(frozen=True)
class GenerationStep:
    """What the making of a video says as it goes on.

    Attributes:
        progress: 0 at the start, 1 when the last denoising step is done.
        video: the mp4, in the last one only.
    """

    progress: float
    video: bytes | None = None


class Dispatcher:
    """Holds one call to the generator for each job in the queue, and alone writes what comes of it.

    Since every queued job is a call that waits, whoever scales the generator sees the queue. It lives in one
    event loop; what blocks, it does in threads.

    Args:
        store: the jobs.
        videos: folder of the finished videos.
        generate: makes one video; waits for a free replica first. Cancelling its iterator stops the making.
    """

    def __init__(
        self, store: JobStore, videos: Path, generate: Callable[[VideoSpec], AsyncIterator[GenerationStep]]
    ) -> None:
        self._store = store
        self._videos = videos
        self._generate = generate
        self._tasks: dict[str, asyncio.Task[None]] = {}

    def path(self, job_id: str) -> Path:
        """Where the video of a completed job lies."""
        return self._videos / f"{job_id}.mp4"

    async def start(self) -> None:
        """Takes up every job that an earlier owner left unfinished."""
        self._videos.mkdir(parents=True, exist_ok=True)
        for partial in self._videos.glob("*.partial"):
            partial.unlink()
        for job in await asyncio.to_thread(self._store.requeue_unfinished):
            self.submit(job)

    def submit(self, job: Job) -> None:
        """Begins to wait for a replica for `job`; must be called in the event loop."""
        # In a context of its own: in that of the HTTP request that created the job, Serve would take the call
        # for a part of that request and end it with it.
        task = asyncio.create_task(self._run(job), context=contextvars.Context())
        self._tasks[job.id] = task
        task.add_done_callback(lambda _: self._tasks.pop(job.id, None))

    async def delete(self, job_id: str) -> bool:
        """Stops the job if it is being made, and forgets it and its video; False if there is none."""
        found = await asyncio.to_thread(self._store.delete, job_id)
        await self._cancel([self._tasks[job_id]] if job_id in self._tasks else [])
        await asyncio.to_thread(self.path(job_id).unlink, missing_ok=True)
        return found

    async def stop(self) -> None:
        """Stops all calls. The jobs stay as they are; the next owner takes them up."""
        await self._cancel(list(self._tasks.values()))

    async def _cancel(self, tasks: list[asyncio.Task[None]]) -> None:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _run(self, job: Job) -> None:
        started = False
        try:
            async for step in self._generate(job.spec):
                if not started:
                    started = await asyncio.to_thread(self._store.start, job.id)
                if step.video is not None:
                    await asyncio.to_thread(self._finish, job.id, step.video)
                else:
                    await asyncio.to_thread(self._store.set_progress, job.id, int(99 * step.progress))
        except (RayError, RayServeException, OSError) as error:
            logger.exception("video %s could not be made", job.id)
            cause = find_user_error(error) or (error.cause if isinstance(error, RayTaskError) else error)
            if isinstance(cause, ProPhyError):
                code, message = "invalid_request", str(cause)
            else:
                code, message = "generation_failed", f"{type(cause).__name__}: {cause}"
            await asyncio.to_thread(self._store.fail, job.id, code, message)

    def _finish(self, job_id: str, video: bytes) -> None:
        """Puts the whole file in place before the row says so."""
        partial = self._videos / f"{job_id}.partial"
        partial.write_bytes(video)
        partial.rename(self.path(job_id))
        if not self._store.complete(job_id):  # deleted meanwhile
            self.path(job_id).unlink(missing_ok=True)
