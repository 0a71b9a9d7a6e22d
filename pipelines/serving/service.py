"""What the routes of the Videos API act on. What is not there to be had is an `ApiError`."""

import asyncio
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import Any, TypeVar

from fastapi import Request, Response

from pipelines.config import Config
from pipelines.generation.spec import IMAGE_FILE, PREVIEW_FILE, ShapeLimits, VideoSpec
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.byte_ranges import partial_content
from pipelines.serving.dispatcher import Dispatcher
from pipelines.serving.errors import RETRY_AFTER_S, ApiError
from pipelines.serving.jobs import Job, JobStore
from pipelines.serving.metrics import Metrics
from pipelines.serving.references import IMAGE_FIELD
from prophy.errors import ProPhyError
from prophy.taxonomy import Taxonomy, load_taxonomy

MAX_LONG_BODIES = 4
LONG_BODY_TURN_WITHIN_S = 30.0  # half of what a body may take: so much is left for it
_VIDEO_ID = re.compile(r"video_[0-9a-f]{32}")

T = TypeVar("T")


@dataclass(frozen=True)
class GeneratorStatus:
    """The model behind the API.

    Attributes:
        is_ready: a replica can make videos; those that were scaled away come back with a job.
        num_replicas: how many hold it now.
    """

    is_ready: bool
    num_replicas: int


@dataclass(frozen=True)
class VideoService:
    """What the routes act on.

    Attributes:
        config: the operator's defaults and limits.
        limits: the shapes that the model can make.
        store: the jobs.
        artefacts: the files of videos.
        dispatcher: makes queued jobs into videos.
        metrics: what is counted.
        generator_status: how the model is.
        draw: name and arguments of a function of `pipelines.serving.drawing` -> what that draws.
        drawing: held while it is at work: it takes a processor.
        long_bodies: see `reading_long_body`.
    """

    config: Config
    limits: ShapeLimits
    store: JobStore
    artefacts: ArtefactStore
    dispatcher: Dispatcher
    metrics: Metrics
    generator_status: Callable[[], Awaitable[GeneratorStatus]]
    draw: Callable[..., Awaitable[bytes]]
    drawing: asyncio.Lock = field(default_factory=asyncio.Lock)
    long_bodies: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_LONG_BODIES))

    @cached_property
    def taxonomy(self) -> Taxonomy:
        """What phenomena are called in prompts."""
        return load_taxonomy(self.config.taxonomy)

    @property
    def max_body_bytes(self) -> int:
        """What a request may have; an image grows by a third where it is written as text."""
        settings = self.config.serve
        is_text = self.limits.images == "never"
        return settings.max_body_bytes + (0 if is_text else 4 * (settings.max_image_bytes // 3 + 1))

    @property
    def longest_field(self) -> str | None:
        """The field that a body so long has; None where there is none."""
        return None if self.limits.images == "never" else IMAGE_FIELD

    def find(self, video_id: str, param: str | None = None) -> Job:
        """The job of a video; `param` is the field of the request that names it, where one does.

        Raises:
            ApiError: there is none.
        """
        job = self.store.get(video_id) if _VIDEO_ID.fullmatch(video_id) else None
        if job is None:
            raise no_video(video_id, param)
        return job

    def find_completed(self, video_id: str) -> Job:
        """A job whose files are there.

        Raises:
            ApiError: there is no such video, or no files of it yet, or any more.
        """
        job = self.find(video_id)
        if job.status == "failed":
            raise _failed(job)
        if job.status != "completed":
            done = self.dispatcher.progress(job.id)
            message = f"video {job.id} is {job.status}, {done} % done; poll it until it is completed"
            raise ApiError(409, message, "video_not_ready")
        if job.expires_at is not None and job.expires_at <= time.time():
            raise _expired(job)
        return job

    def find_with_maps(self, video_id: str) -> Job:
        """As `find_completed`, of a video that was made with maps."""
        job = self.find_completed(video_id)
        if job.spec.physics is None or not job.spec.physics.return_maps:
            message = f"video {job.id} was made without `physics.return_maps`; make it again with it"
            raise ApiError(409, message, "no_maps")
        return job

    def find_with_image(self, video_id: str) -> Job:
        """A job that begins with an image, whether or not it is completed.

        Raises:
            ApiError: there is no such video, or it begins with none, or failed.
        """
        job = self.find(video_id)
        if job.spec.image is None:
            raise ApiError(409, f"video {job.id} is made from text alone", "no_image")
        if job.status == "failed":
            raise _failed(job)
        return job

    @asynccontextmanager
    async def reading_long_body(self) -> AsyncIterator[None]:
        """While a body with an image is read, and looked at: few at a time, since each takes memory.

        Raises:
            ApiError: 503, others take too long.
        """
        try:
            async with asyncio.timeout(LONG_BODY_TURN_WITHIN_S):
                await self.long_bodies.acquire()
        except TimeoutError:
            message = f"{MAX_LONG_BODIES} images are being sent already, slowly; try again later"
            headers = {"retry-after": str(RETRY_AFTER_S)}
            raise ApiError(503, message, "too_many_uploads", IMAGE_FIELD, headers) from None
        try:
            yield
        finally:
            self.long_bodies.release()

    async def look_at(self, image: bytes, spec: VideoSpec) -> dict[str, bytes]:
        """Has the image of a request looked at, by whom a hostile one does no harm.

        Returns:
            The files that are kept of it.

        Raises:
            ApiError: it is none that is taken.
        """
        try:
            preview = await self._alone(lambda: self.draw("draw_preview", image, spec.height, spec.width))
        except ProPhyError as error:
            raise ApiError(422, str(error), "invalid_image", IMAGE_FIELD) from None
        return {IMAGE_FILE: image, PREVIEW_FILE: preview}

    def file(self, request: Request, job: Job, name: str, media_type: str) -> Response:
        """A file of a video, or the range of it that the request asks for.

        Raises:
            ApiError: it has expired.
        """
        size = self.artefacts.size(job.id, name)
        if size is None:
            raise _expired(job)
        read = partial(self.artefacts.chunks, job.id, name)
        return partial_content(request, read, size, f"{job.id}-{name}", media_type)

    async def draw_once(self, job: Job, name: str, kind: str, files: list[str], *further: Any) -> None:
        """Has the file `name` drawn, unless it was before.

        Args:
            job: the video's.
            name: the file's.
            kind: name of a function of `pipelines.serving.drawing`.
            files: names of the video's files that it is drawn from.
            further: its other arguments.

        Raises:
            ApiError: one of the files has expired, or the video was deleted meanwhile.
            ProPhyError: they cannot be drawn as asked.
        """
        await self._alone(lambda: self._draw(job, name, kind, files, *further))

    async def _alone(self, work: Callable[[], Awaitable[T]]) -> T:
        """Does what takes a processor while nothing else does.

        Once begun it goes on to its end, though its client leaves: the process that draws does so too.
        """

        async def to_its_end() -> T:
            try:
                return await work()
            finally:
                self.drawing.release()

        await self.drawing.acquire()
        return await asyncio.shield(to_its_end())

    async def _draw(self, job: Job, name: str, kind: str, files: list[str], *further: Any) -> None:
        if await asyncio.to_thread(self.artefacts.size, job.id, name) is not None:
            return
        try:
            contents = await asyncio.to_thread(lambda: [self.artefacts.read(job.id, file) for file in files])
        except FileNotFoundError:
            raise _expired(job) from None
        drawn = await self.draw(kind, *contents, *further)
        await asyncio.to_thread(self._keep, job, name, drawn)

    def _keep(self, job: Job, name: str, content: bytes) -> None:
        """Adds a file to those of a video, unless that was deleted meanwhile."""
        self.artefacts.add(job.id, name, content)
        if self.store.get(job.id) is None:
            self.artefacts.remove(job.id)
            raise no_video(job.id)


def no_video(video_id: str, param: str | None = None) -> ApiError:
    """What is said of a video that there is not; `param` as in `VideoService.find`."""
    return ApiError(404, f"no video {video_id[:64]!r}", "video_not_found", param)


def _failed(job: Job) -> ApiError:
    return ApiError(409, f"video {job.id} was not made: {job.error_message}", "video_failed")


def _expired(job: Job) -> ApiError:
    return ApiError(410, f"the files of video {job.id} have expired; make it again", "video_expired")
