"""The routes of the Videos API over a job store, a dispatcher and files. Knows neither Ray nor models."""

import asyncio
import hashlib
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, nullcontext
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Header, Query, Request, Response
from fastapi_offline import FastAPIOffline

from pipelines.generation.spec import (
    IMAGE_FILE,
    MAPS_FILE,
    PREVIEW_FILE,
    SPRITESHEET_FILE,
    THUMBNAIL_FILE,
    VIDEO_FILE,
)
from pipelines.serving import pages
from pipelines.serving.database import UNANSWERED
from pipelines.serving.dispatcher import KeyReusedError, NotStoredError, QueueFullError
from pipelines.serving.errors import RETRY_AFTER_S, ApiError, ErrorResponse
from pipelines.serving.jobs import Job
from pipelines.serving.middleware import KeyCheck, PageCheck, guard, read_fields
from pipelines.serving.protocol import (
    DeletedVideo,
    Health,
    Model,
    ModelList,
    PhysicsMaps,
    Settings,
    Video,
    VideoList,
    VideoRequest,
    model_name,
)
from pipelines.serving.references import IMAGE_FIELD
from pipelines.serving.service import VideoService, no_video
from prophy.errors import ProPhyError
from prophy.taxonomy import spelled

STARTED_AT = int(time.time())
MIN_POLL_MS, MAX_POLL_MS = 250, 10_000


def create_app(service: VideoService) -> FastAPI:
    """The application; it takes up unfinished jobs when it starts and puts down its calls when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.dispatcher.start()
        yield
        await service.dispatcher.stop()
        service.store.close()

    # Its pages bring their scripts along; ReDoc's would load a picture from elsewhere.
    app = FastAPIOffline(redoc_url=None, title="ProPhy", version=version("prophy-ray"), lifespan=lifespan)
    app.state.service = service
    settings = service.config.serve
    origins = settings.allowed_origins
    check = Depends(KeyCheck(settings.api_keys) if settings.api_keys else PageCheck(origins))
    app.include_router(router, dependencies=[check])
    app.include_router(probes)
    app.include_router(pages.router)
    routes = [*router.routes, *probes.routes, *pages.router.routes]
    translations = dict.fromkeys(UNANSWERED, _unanswered)
    length = (service.max_body_bytes, service.longest_field)
    guard(app, routes, *length, service.metrics, origins, translations)
    return app


def _unanswered(error: Exception) -> ApiError:
    full = "full" in str(error).lower() or "no space left" in str(error).lower()
    reason = "the disk of the job database is full" if full else "the job database does not answer"
    headers = {"retry-after": str(RETRY_AFTER_S)}
    return ApiError(503, f"{reason}; try again later", "database_unavailable", headers=headers)


async def _service(request: Request) -> VideoService:  # FastAPI would give a plain function a thread
    return request.app.state.service


def _errors(**descriptions: str) -> dict[int | str, dict[str, Any]]:
    """Statuses, as `_404="No such video"`, for the description of the API."""
    return {
        int(status[1:]): {"model": ErrorResponse, "description": text}
        for status, text in descriptions.items()
    }


Service = Annotated[VideoService, Depends(_service)]
IdempotencyKey = Annotated[
    str | None,
    Header(
        min_length=1,
        max_length=1000,
        description="any text; a request with the same one makes no second video",
    ),
]
PhenomenonName = Annotated[str, Query(description="one that `physics` has a map of")]
probes = APIRouter()
router = APIRouter(
    responses=_errors(
        _401="No valid API key, where the server asks for one",
        _403="A page of another site, or another host name, where it does not",
        _422="A field is wrong",
        _503="The job database does not answer, or an image cannot be taken or stored now",
    )
)
_UNKNOWN = _errors(_404="No such video")
_NO_FILE = _errors(
    _404="No such video",
    _409="Not there yet, failed, or made without it",
    _410="Expired",
    _416="No such bytes",
)
_VARIANTS = {
    "video": (VIDEO_FILE, "video/mp4"),
    "thumbnail": (THUMBNAIL_FILE, "image/webp"),
    "spritesheet": (SPRITESHEET_FILE, "image/webp"),
}
_IMAGES = {
    # Whatever it says that it is: no browser shows what a stranger has sent.
    "file": (IMAGE_FILE, "application/octet-stream"),
    "preview": (PREVIEW_FILE, "image/webp"),
}
_OVERLAYS = {
    "video": ("draw_overlay", [VIDEO_FILE, MAPS_FILE], "overlay {}.mp4", "video/mp4"),
    "layer": ("draw_layer", [MAPS_FILE], "layer {}.png", "image/png"),
}
_NOT_ACCEPTED = _errors(
    _400="The body cannot be read",
    _404="No such model",
    _408="The body does not come to its end",
    _413="The body, or the image in it, is too long",
    _415="Neither JSON nor a form",
    _429="Too many videos are queued",
)
_BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "content": {
            kind: {"schema": VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")}
            for kind in ("application/json", "multipart/form-data")
        },
    }
}


@router.post("/v1/videos", responses=_NOT_ACCEPTED, openapi_extra=_BODY)
async def create_video(
    request: Request, service: Service, response: Response, idempotency_key: IdempotencyKey = None
) -> Video:
    """Accepts a video to be made. Poll it until it is `completed`, then fetch its content."""
    return _video(await _accept(request, service, idempotency_key), service, response)


@router.post(
    "/v1/videos/sync",
    response_class=Response,
    responses={
        200: {"content": {"video/mp4": {}}, "description": "The video"},
        **_NOT_ACCEPTED,
        **_errors(_500="The video could not be made"),
    },
    openapi_extra=_BODY,
)
async def make_video(request: Request, service: Service, idempotency_key: IdempotencyKey = None) -> Response:
    """Makes a video and answers with its mp4. A client that goes away stops it."""
    job = await _accept(request, service, idempotency_key, is_waited_for=True)
    try:
        await service.dispatcher.wait(job.id)
    except asyncio.CancelledError:
        await service.dispatcher.abandon(job.id)
        raise
    made = await asyncio.to_thread(service.find, job.id)
    if made.status == "failed":
        raise ApiError(500, f"the video was not made: {made.error_message}", str(made.error_code))
    return await asyncio.to_thread(service.file, request, made, VIDEO_FILE, "video/mp4")


@router.get("/v1/videos", responses=_UNKNOWN)
def list_videos(
    service: Service,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Lists videos, a page at a time: give the last id of a page as `after` to get the next."""
    cursor = service.find(after, "after") if after is not None else None
    jobs, has_more = service.store.page(cursor, limit, order)
    return VideoList(
        data=[_video(job, service) for job in jobs],
        first_id=jobs[0].id if jobs else None,
        last_id=jobs[-1].id if jobs else None,
        has_more=has_more,
    )


@router.get("/v1/videos/{video_id}", responses=_UNKNOWN)
def retrieve_video(video_id: str, service: Service, response: Response) -> Video:
    """State of a video. The header `openai-poll-after-ms` says when to ask again."""
    return _video(service.find(video_id), service, response)


@router.head("/v1/videos/{video_id}/content", include_in_schema=False)
@router.get(
    "/v1/videos/{video_id}/content",
    response_class=Response,
    responses={
        200: {"content": {"video/mp4": {}, "image/webp": {}}, "description": "The video"},
        206: {"content": {"video/mp4": {}, "image/webp": {}}, "description": "A part of it"},
        **_NO_FILE,
    },
)
async def download_content(
    video_id: str,
    request: Request,
    service: Service,
    variant: Literal["video", "thumbnail", "spritesheet"] = "video",
) -> Response:
    """The mp4 of a completed video, or one frame of it, or all frames in one picture, as WebP.

    The picture has `ceil(sqrt(num_frames))` columns. Understands requests for one range.
    """
    job = await asyncio.to_thread(service.find_completed, video_id)
    name, media_type = _VARIANTS[variant]
    if variant == "spritesheet":
        await service.draw_once(job, name, "draw_spritesheet", [VIDEO_FILE], job.spec)
    return await asyncio.to_thread(service.file, request, job, name, media_type)


@router.get(
    "/v1/videos/{video_id}/input_reference",
    response_class=Response,
    responses={
        200: {"content": {"application/octet-stream": {}, "image/webp": {}}, "description": "The image"},
        206: {"content": {"application/octet-stream": {}, "image/webp": {}}, "description": "A part of it"},
        **_errors(
            _404="No such video", _409="Made from text alone, or failed", _410="Expired", _416="No such bytes"
        ),
    },
)
def retrieve_image(
    video_id: str, request: Request, service: Service, variant: Literal["file", "preview"] = "file"
) -> Response:
    """The file of the image that a video begins with, as it was sent.

    `preview` is a WebP of what the video begins with: cut at its centre, scaled, and at most 512 pixels wide
    and high.
    """
    name, media_type = _IMAGES[variant]
    return service.file(request, service.find_with_image(video_id), name, media_type)


@router.get(
    "/v1/videos/{video_id}/physics",
    response_class=Response,
    responses={
        200: {"model": PhysicsMaps, "description": "What the routers said"},
        206: {"content": {"application/json": {}}, "description": "A part of it"},
        **_NO_FILE,
    },
)
def retrieve_physics(video_id: str, request: Request, service: Service) -> Response:
    """Where each phenomenon acts in a video that was made with `physics.return_maps`."""
    return service.file(request, service.find_with_maps(video_id), MAPS_FILE, "application/json")


@router.get(
    "/v1/videos/{video_id}/physics/overlay",
    response_class=Response,
    responses={
        200: {"content": {"video/mp4": {}, "image/png": {}}, "description": "The video"},
        206: {"content": {"video/mp4": {}, "image/png": {}}, "description": "A part of it"},
        **_NO_FILE,
    },
)
async def download_overlay(
    video_id: str,
    phenomenon: PhenomenonName,
    request: Request,
    service: Service,
    variant: Literal["video", "layer"] = "video",
) -> Response:
    """The mp4 with the map of one phenomenon laid over it; drawn when it is asked for, and then kept.

    `layer` is the map alone: a PNG of all frames as in the video's spritesheet, each as small as the grid of
    tokens and as opaque as the map is hot.
    """
    job = await asyncio.to_thread(service.find_with_maps, video_id)
    kind, files, name, media_type = _OVERLAYS[variant]
    try:
        # Which there are, the video's own maps say: it may be of another branch than this server's.
        wanted = spelled(phenomenon)
        name = name.format(wanted).replace(" ", "-")
        await service.draw_once(job, name, kind, files, job.spec, wanted)
    except ProPhyError as error:
        raise ApiError(422, str(error), "invalid_value", "phenomenon") from None
    return await asyncio.to_thread(service.file, request, job, name, media_type)


@router.post("/v1/videos/edits", include_in_schema=False)
@router.post("/v1/videos/extensions", include_in_schema=False)
@router.post("/v1/videos/characters", include_in_schema=False)
@router.post("/v1/videos/{video_id}/remix", include_in_schema=False)
async def refuse_operation(request: Request) -> None:
    """What others make of videos; here they come from text and images alone."""
    operation = request.url.path.rpartition("/")[2]
    message = f"{operation!r} is not offered: no video is made of another one here; POST /v1/videos"
    # OpenAI's client would ask twice more.
    raise ApiError(501, message, "not_implemented", headers={"x-should-retry": "false"})


@router.delete("/v1/videos/{video_id}", responses=_UNKNOWN)
async def delete_video(video_id: str, service: Service) -> DeletedVideo:
    """Forgets a video. One that is being made is stopped."""
    if not await service.dispatcher.delete(video_id):
        raise no_video(video_id)
    return DeletedVideo(id=video_id)


@router.get("/v1/models")
def list_models(service: Service) -> ModelList:
    """The model that this server runs."""
    return ModelList(data=[Model(id=model_name(service.config), created=STARTED_AT)])


@router.get("/v1/models/{model}", responses=_errors(_404="No such model"))
def retrieve_model(model: str, service: Service) -> Model:
    """The model that this server runs, if it is this one."""
    name = model_name(service.config)
    if model != name:
        raise ApiError(404, f"no model {model[:64]!r} here; there is {name!r}", "model_not_found", "model")
    return Model(id=name, created=STARTED_AT)


@router.get("/v1/settings")
def retrieve_settings(service: Service) -> Settings:
    """What is made where a request does not say, and what is allowed."""
    return Settings.of_run(service.config, service.limits)


@router.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
async def scrape(service: Service) -> Response:
    """Metrics for Prometheus."""
    status = await service.generator_status()
    text = service.metrics.render(service.dispatcher.num_jobs(), status.num_replicas)
    return Response(text, media_type="text/plain; version=0.0.4; charset=utf-8")


@probes.get("/health", include_in_schema=False)  # where clients of other servers look
@probes.get("/healthz")
def check_health() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@probes.get("/readyz", responses=_errors(_503="Not ready"))
async def check_readiness(service: Service) -> Health:
    """Whether a replica can make videos, or comes with the next request for one."""
    if not (await service.generator_status()).is_ready:
        message = "the model is loading or fails; try again later"
        raise ApiError(503, message, "not_ready", headers={"retry-after": str(RETRY_AFTER_S)})
    return Health(status="ready")


async def _accept(
    request: Request, service: VideoService, idempotency_key: str | None, *, is_waited_for: bool = False
) -> Job:
    length = int(request.headers.get("content-length", service.max_body_bytes))
    is_long = length > service.config.serve.max_body_bytes
    async with service.reading_long_body() if is_long else nullcontext():
        return await _read_and_create(request, service, idempotency_key, is_waited_for)


async def _read_and_create(
    request: Request, service: VideoService, idempotency_key: str | None, is_waited_for: bool
) -> Job:
    body = await read_fields(request, may_be_blank={"negative_prompt"}, may_be_file={IMAGE_FIELD})
    fields = VideoRequest.parse(body, service.config, service.limits)
    spec = fields.to_spec(service.config, service.limits)
    image = fields.input_reference
    files = {} if image is None else await service.look_at(image, spec)
    marks: tuple[str | None, str | None] = (None, None)
    if idempotency_key is not None:
        # Each client has its own keys; one whose API key is not asked for is any.
        client = getattr(request.state, "client", "")
        asked = fields.model_dump_json(exclude={IMAGE_FIELD}) + (spec.image or "")
        marks = (_sha256(f"{client} {idempotency_key}"), _sha256(asked))
    try:
        return await service.dispatcher.create(
            spec, request.headers.get("x-request-id"), *marks, files, is_waited_for=is_waited_for
        )
    except KeyReusedError as error:
        message = f"this idempotency key stands for video {error}, and that is another one; send a new key"
        # Not 409, which OpenAI's client would send again.
        raise ApiError(422, message, "idempotency_key_reused", "idempotency-key") from None
    except NotStoredError as error:
        headers = {"retry-after": str(RETRY_AFTER_S)}
        message = f"the image cannot be stored: {error}; try again later"
        raise ApiError(503, message, "storage_unavailable", IMAGE_FIELD, headers) from None
    except QueueFullError:
        message = f"{service.config.serve.max_queued} videos are queued already; try again later"
        headers = {"retry-after": str(RETRY_AFTER_S)}
        raise ApiError(429, message, "queue_full", headers=headers) from None


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _video(job: Job, service: VideoService, response: Response | None = None) -> Video:
    """What clients see of a job; sets the header that says when to poll again."""
    progress = service.dispatcher.progress(job.id)
    if response is not None and job.status in ("queued", "in_progress"):
        elapsed_s = time.time() - (job.started_at or job.created_at)
        # A tenth of the time that is left.
        poll_ms = int(100 * elapsed_s * (100 - progress) / progress) if progress else 1000
        response.headers["openai-poll-after-ms"] = str(min(max(poll_ms, MIN_POLL_MS), MAX_POLL_MS))
    phenomena = service.taxonomy.named_in(job.spec.prompt, service.limits.phenomena)
    position = service.dispatcher.queue_position(job.id)
    return Video.from_job(job, model_name(service.config), progress, position, phenomena)
