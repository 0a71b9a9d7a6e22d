"""Jobs as rows of a database. Knows neither HTTP, nor Ray, nor how a video is made.

All that the owner of the database holds in memory can be lost: a new one finds every accepted job.
"""

import logging
import time
import uuid
from collections.abc import Sequence
from typing import Any, Literal

from sqlalchemy import JSON, Dialect, Select, Text, TypeDecorator, and_, delete, or_, select, update
from sqlalchemy.exc import DatabaseError
from sqlalchemy.orm import Mapped, Session, mapped_column

from pipelines.generation.spec import VideoSpec
from pipelines.serving.database import Base, OwnDatabase

logger = logging.getLogger(__name__)

JobStatus = Literal["queued", "in_progress", "completed", "failed"]

UNREADABLE = (ValueError, LookupError)  # what a row raises that this version did not write


class _SpecColumn(TypeDecorator[VideoSpec]):
    """A `VideoSpec` as JSON text."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: VideoSpec | None, dialect: Dialect) -> str | None:
        return value.model_dump_json() if value is not None else None

    def process_result_value(self, value: str | None, dialect: Dialect) -> VideoSpec | None:
        return VideoSpec.model_validate_json(value) if value is not None else None


class Job(Base):
    """One accepted request for a video.

    Attributes:
        sequence: order of arrival.
        id: what clients know the job by.
        request_id: id of the HTTP request that created it, for the logs.
        idempotency_key: marks a request, so that sending it again makes no second video.
        request_hash: SHA-256 of the fields of the request.
        spec: the video that was asked for.
        status: `queued` until a replica has begun it.
        num_deaths: replicas that died while they made it.
        created_at: seconds since the epoch, as are the three below.
        started_at: when a replica began it, the last time.
        completed_at: when it was completed.
        expires_at: when its files go; never if None.
        stage_durations: seconds per stage of a completed video.
        error_code: why it failed, for programs.
        error_message: why it failed, for people.
        is_deleted: clients see it no more; its files are on their way out.
        has_files: whether files of it may exist.
    """

    __tablename__ = "videos"

    sequence: Mapped[int] = mapped_column(primary_key=True)
    id: Mapped[str] = mapped_column(unique=True)
    request_id: Mapped[str | None]
    idempotency_key: Mapped[str | None] = mapped_column(unique=True)
    request_hash: Mapped[str | None]
    spec: Mapped[VideoSpec] = mapped_column(_SpecColumn)
    status: Mapped[JobStatus] = mapped_column(index=True)
    num_deaths: Mapped[int] = mapped_column(default=0)
    created_at: Mapped[float]
    started_at: Mapped[float | None]
    completed_at: Mapped[float | None]
    expires_at: Mapped[float | None]
    stage_durations: Mapped[dict[str, float] | None] = mapped_column(JSON)
    error_code: Mapped[str | None]
    error_message: Mapped[str | None] = mapped_column(Text)
    is_deleted: Mapped[bool] = mapped_column(default=False)
    has_files: Mapped[bool] = mapped_column(default=False, index=True)


class JobStore(OwnDatabase):
    """The table of jobs. Methods are short transactions, thread-safe, and block.

    A job's status only moves along `queued -> in_progress -> completed | failed`, and back to `queued` by
    `requeue`. A method that moves it says whether the job was still there to be moved.

    A row that this version cannot read is left out of what the methods return, and named in the log.

    Args:
        url: see `OwnDatabase`.

    Raises:
        ProPhyError: as `OwnDatabase`.
    """

    def check(self) -> None:
        """Reads every row.

        Raises:
            ProPhyError: a page is damaged, or a row is not of this version.
        """
        read = "none"
        try:
            with self.sessions() as session:
                self.check_pages(session)
                rows = select(Job).order_by(Job.sequence).execution_options(yield_per=1000)
                for job in session.scalars(rows):
                    _check_types(job)
                    read = job.id
        except UNREADABLE:
            reason = ValueError(f"another version made one of its rows; the last that can be read is {read}")
            raise self.refusal("read", reason) from None
        except (DatabaseError, OSError) as error:
            raise self.refusal("read", error) from None

    def create(
        self,
        spec: VideoSpec,
        request_id: str | None = None,
        idempotency_key: str | None = None,
        request_hash: str | None = None,
    ) -> Job:
        """Adds a queued job; one that begins with an image may have files from now on."""
        job = Job(
            id=f"video_{uuid.uuid4().hex}",
            request_id=request_id,
            idempotency_key=idempotency_key,
            request_hash=request_hash,
            spec=spec,
            status="queued",
            created_at=time.time(),
            has_files=spec.image is not None,
        )
        with self.sessions.begin() as session:
            session.add(job)
        return job

    def get(self, job_id: str) -> Job | None:
        """The job, if it exists."""
        with self.sessions() as session:
            return _first(session, select(Job.sequence).where(Job.id == job_id, ~Job.is_deleted))

    def find(self, idempotency_key: str) -> Job | None:
        """The job of the request that was marked with this key, if it exists."""
        key = select(Job.sequence).where(Job.idempotency_key == idempotency_key, ~Job.is_deleted)
        with self.sessions() as session:
            return _first(session, key)

    def page(self, after: Job | None, limit: int, order: Literal["asc", "desc"]) -> tuple[list[Job], bool]:
        """Up to `limit` jobs that follow `after`, oldest first for `asc`, and whether more follow."""
        keys = select(Job.sequence).where(~Job.is_deleted).order_by(getattr(Job.sequence, order)())
        if after is not None:
            follows = Job.sequence > after.sequence if order == "asc" else Job.sequence < after.sequence
            keys = keys.where(follows)
        with self.sessions() as session:
            found = session.scalars(keys.limit(limit + 1)).all()
            return _read(session, found[:limit]), len(found) > limit

    def requeue_unfinished(self) -> list[Job]:
        """Puts what an earlier owner had in progress back into the queue; returns the queue, oldest first."""
        queued = select(Job.sequence).where(Job.status == "queued", ~Job.is_deleted).order_by(Job.sequence)
        with self.sessions.begin() as session:
            session.execute(update(Job).where(Job.status == "in_progress").values(status="queued"))
            return _read(session, session.scalars(queued).all())

    def start(self, job_id: str) -> bool:
        """A replica has begun the job; from now on there may be files of it."""
        return self._move(job_id, ("queued",), status="in_progress", started_at=time.time(), has_files=True)

    def requeue(self, job_id: str) -> int | None:
        """The job's replica has died. Returns how many have by now, or None if the job is not wanted."""
        lost = (
            update(Job)
            .where(Job.id == job_id, Job.status == "in_progress", ~Job.is_deleted)
            .values(status="queued", num_deaths=Job.num_deaths + 1)
        )
        with self.sessions.begin() as session:
            return session.scalar(lost.returning(Job.num_deaths))

    def complete(
        self, job_id: str, stage_durations: dict[str, float], expire_after_s: float | None = None
    ) -> bool:
        """All files of the video are there."""
        now = time.time()
        return self._move(
            job_id,
            ("in_progress",),
            status="completed",
            completed_at=now,
            expires_at=now + expire_after_s if expire_after_s is not None else None,
            stage_durations=stage_durations,
        )

    def fail(self, job_id: str, code: str, message: str) -> bool:
        """The video will not be made."""
        return self._move(
            job_id, ("queued", "in_progress"), status="failed", error_code=code, error_message=message
        )

    def delete(self, job_id: str) -> bool:
        """Hides the job from clients; `purge` forgets it, once its files are gone."""
        every: tuple[JobStatus, ...] = ("queued", "in_progress", "completed", "failed")
        return self._move(job_id, every, is_deleted=True, idempotency_key=None)

    def outdated(self) -> list[str]:
        """The jobs whose files must go: deleted, failed or expired."""
        expired = and_(Job.status == "completed", Job.expires_at <= time.time())
        unwanted = or_(Job.is_deleted, and_(Job.has_files, or_(Job.status == "failed", expired)))
        with self.sessions() as session:
            return list(session.scalars(select(Job.id).where(unwanted)))

    def purge(self, job_id: str) -> None:
        """The files of an outdated job are gone: forgets it if it is deleted, else notes that."""
        with self.sessions.begin() as session:
            session.execute(delete(Job).where(Job.id == job_id, Job.is_deleted))
            session.execute(update(Job).where(Job.id == job_id).values(has_files=False))

    def _move(self, job_id: str, before: tuple[JobStatus, ...], **values: Any) -> bool:
        job = update(Job).where(Job.id == job_id, Job.status.in_(before), ~Job.is_deleted)
        with self.sessions.begin() as session:
            return session.scalar(job.values(**values).returning(Job.id)) is not None


def _read(session: Session, keys: Sequence[int]) -> list[Job]:
    """Jobs by `sequence`, one query each, so that a row that cannot be read keeps none of the others."""
    jobs = []
    for key in keys:
        try:
            if (job := session.get(Job, key)) is not None:
                _check_types(job)
                jobs.append(job)
        except UNREADABLE as error:
            reason = str(error).splitlines()[0]
            logger.error("left out row %d of the job database, which cannot be read: %s", key, reason)
    return jobs


def _check_types(job: Job) -> None:
    """SQLite keeps anything in any column, and JSON text may hold anything.

    Raises:
        ValueError: a value is not of its column's type.
    """
    for column in Job.__table__.columns:
        value = getattr(job, column.name)
        expected = dict if isinstance(column.type, JSON) else column.type.python_type
        if value is not None and not isinstance(value, expected):
            raise ValueError(f"{column.name} is {value!r}")


def _first(session: Session, keys: Select[int]) -> Job | None:
    return next(iter(_read(session, session.scalars(keys).all())), None)
