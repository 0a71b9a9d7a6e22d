"""The routes of the Videos API over a job store and a dispatcher. Knows neither Ray nor models."""

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib.metadata import version
from typing import Annotated, Any, Literal

from fastapi import APIRouter, Depends, FastAPI, Query, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import FileResponse, JSONResponse
from starlette.datastructures import FormData, UploadFile
from starlette.exceptions import HTTPException

from pipelines.config import Config
from pipelines.jobs import Dispatcher, Job, JobStore
from pipelines.protocol import (
    ApiError,
    DeletedVideo,
    ErrorResponse,
    Health,
    Model,
    ModelList,
    Video,
    VideoList,
    VideoRequest,
    model_name,
)
from pipelines.spec import ShapeLimits

STARTED_AT = int(time.time())
RETRY_AFTER_S = 10


@dataclass(frozen=True)
class VideoService:
    """What the routes act on.

    Attributes:
        config: the operator's defaults and limits.
        limits: the shapes that the model can make.
        store: the jobs.
        dispatcher: makes queued jobs into videos.
        is_ready: whether a request would find what it needs.
    """

    config: Config
    limits: ShapeLimits
    store: JobStore
    dispatcher: Dispatcher
    is_ready: Callable[[], Awaitable[bool]]


def create_app(service: VideoService) -> FastAPI:
    """The application; it takes up unfinished jobs when it starts and puts down its calls when it stops."""

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        await service.dispatcher.start()
        yield
        await service.dispatcher.stop()

    app = FastAPI(title="ProPhy", version=version("prophy-ray"), lifespan=lifespan)
    app.state.service = service
    app.include_router(router)
    for kind in (ApiError, HTTPException, RequestValidationError, Exception):
        app.add_exception_handler(kind, _answer_error)
    return app


def _service(request: Request) -> VideoService:
    return request.app.state.service


Service = Annotated[VideoService, Depends(_service)]
router = APIRouter(responses={422: {"model": ErrorResponse, "description": "A field is wrong"}})
_UNKNOWN: dict[int | str, dict[str, Any]] = {404: {"model": ErrorResponse, "description": "No such video"}}
_BODY = {
    "required": True,
    "content": {
        kind: {"schema": VideoRequest.model_json_schema(ref_template="#/components/schemas/{model}")}
        for kind in ("application/json", "multipart/form-data")
    },
}


@router.post("/v1/videos", openapi_extra={"requestBody": _BODY})
async def create_video(request: Request, service: Service) -> Video:
    """Accepts a video to be made. Poll it until it is `completed`, then fetch its content."""
    fields = VideoRequest.parse(await _read_body(request))
    spec = fields.to_spec(service.config, service.limits)
    max_queued = service.config.serve.max_queued
    if await asyncio.to_thread(service.store.num_queued) >= max_queued:
        message = f"{max_queued} videos are queued already; try again later"
        raise ApiError(429, message, "queue_full", headers={"retry-after": str(RETRY_AFTER_S)})
    job = await asyncio.to_thread(service.store.create, spec)
    service.dispatcher.submit(job)
    return _video(job, service)


@router.get("/v1/videos", responses=_UNKNOWN)
def list_videos(
    service: Service,
    after: str | None = None,
    limit: Annotated[int, Query(ge=1, le=100)] = 20,
    order: Literal["asc", "desc"] = "desc",
) -> VideoList:
    """Lists videos, a page at a time: give the last id of a page as `after` to get the next."""
    cursor = _find(after, service, "after") if after is not None else None
    jobs, has_more = service.store.page(cursor, limit, order)
    return VideoList(
        data=[_video(job, service) for job in jobs],
        first_id=jobs[0].id if jobs else None,
        last_id=jobs[-1].id if jobs else None,
        has_more=has_more,
    )


@router.get("/v1/videos/{video_id}", responses=_UNKNOWN)
def retrieve_video(video_id: str, service: Service) -> Video:
    """State of a video."""
    return _video(_find(video_id, service), service)


@router.get(
    "/v1/videos/{video_id}/content",
    response_class=FileResponse,
    responses={
        200: {"content": {"video/mp4": {}}, "description": "The video"},
        409: {"model": ErrorResponse, "description": "Not there yet, or failed"},
        **_UNKNOWN,
    },
)
def download_content(video_id: str, service: Service, variant: Literal["video"] = "video") -> FileResponse:
    """The mp4 of a completed video; understands range requests."""
    job = _find(video_id, service)
    if job.status == "failed":
        raise ApiError(409, f"video {job.id} was not made: {job.error_message}", "video_failed")
    if job.status != "completed":
        message = f"video {job.id} is {job.status}, {job.progress} % done; poll it until it is completed"
        raise ApiError(409, message, "video_not_ready")
    return FileResponse(service.dispatcher.path(job.id), media_type="video/mp4", filename=f"{job.id}.mp4")


@router.delete("/v1/videos/{video_id}", responses=_UNKNOWN)
async def delete_video(video_id: str, service: Service) -> DeletedVideo:
    """Forgets a video. One that is being made is stopped."""
    if not await service.dispatcher.delete(video_id):
        raise _no_video(video_id, None)
    return DeletedVideo(id=video_id)


@router.get("/v1/models")
def list_models(service: Service) -> ModelList:
    """The model that this server runs."""
    return ModelList(data=[Model(id=model_name(service.config), created=STARTED_AT)])


@router.get("/healthz")
def check_health() -> Health:
    """Answers as long as the process does."""
    return Health(status="ok")


@router.get("/readyz", responses={503: {"model": ErrorResponse, "description": "Not ready"}})
async def check_readiness(service: Service) -> Health:
    """Whether the replicas that the configuration asks for at least have loaded the model."""
    if not await service.is_ready():
        message = "the model is still loading; try again later"
        raise ApiError(503, message, "not_ready", headers={"retry-after": str(RETRY_AFTER_S)})
    return Health(status="ready")


def _find(video_id: str, service: VideoService, param: str | None = None) -> Job:
    job = service.store.get(video_id)
    if job is None:
        raise _no_video(video_id, param)
    return job


def _no_video(video_id: str, param: str | None) -> ApiError:
    return ApiError(404, f"no video {video_id!r}", "video_not_found", param)


def _video(job: Job, service: VideoService) -> Video:
    return Video.from_job(job, model_name(service.config))


async def _read_body(request: Request) -> Any:
    """The fields of a JSON or form body; in a form, `physics` is JSON text."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind not in ("application/json", "multipart/form-data", "application/x-www-form-urlencoded"):
        message = f"content type {kind!r} is not understood; send application/json or multipart/form-data"
        raise ApiError(415, message, "unsupported_media_type")
    try:
        if kind == "application/json":
            return json.loads(await request.body())
        return _form_fields(await request.form())
    except ValueError as error:
        raise ApiError(400, f"the body is not valid JSON: {error}", "invalid_json") from None


def _form_fields(form: FormData) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in form.items():
        if isinstance(value, UploadFile):
            message = f"this model makes videos from text only; leave out the file {name!r}"
            raise ApiError(422, message, "unsupported_parameter", name)
        fields[name] = json.loads(value) if name == "physics" else value
    return fields


def _answer_error(request: Request, error: Exception) -> JSONResponse:
    """Every error in one shape. Of a bug clients learn nothing; the server's log has the traceback."""
    match error:
        case ApiError():
            answer = error
        case HTTPException(status_code=status, detail=detail):  # an unknown path or method, a broken form
            code = {404: "not_found", 405: "method_not_allowed"}.get(status, "bad_request")
            message = f"{request.method} {request.url.path}: {detail}"
            answer = ApiError(status, message, code, headers=error.headers)
        case RequestValidationError():
            first = error.errors()[0]
            param = str(first["loc"][-1])
            answer = ApiError(422, f"bad value for {param!r}: {first['msg']}", "invalid_value", param)
        case _:
            answer = ApiError(500, "the server failed; its log says why", "internal_error")
    return JSONResponse(answer.body.model_dump(), answer.status, answer.headers)
