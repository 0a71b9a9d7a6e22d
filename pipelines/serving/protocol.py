"""The Videos API as data: requests and answers, in the shapes that the `openai` client speaks.

Knows no routes, no jobs' life and no models.
"""

import hashlib
import reprlib
import secrets
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from pipelines.config import Config, key_advice
from pipelines.generation.spec import NO_BOOL, PhysicsSpec, ShapeLimits, VideoSpec
from pipelines.serving.errors import ApiError
from pipelines.serving.jobs import Job, JobStatus
from pipelines.serving.references import DESCRIPTION, IMAGE_FIELD, SCHEMA, image_of
from prophy.errors import ProPhyError
from prophy.images import FORMATS, MAX_PIXELS
from prophy.taxonomy import parse_phenomenon


class VideoRequest(BaseModel):
    """A video to be made. What is left out comes from the server's configuration."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str = Field(max_length=32_000, pattern=r"\S", examples=["a red ball falls and bounces"])
    model: str | None = Field(None, description="as listed by /v1/models")
    seconds: str | None = Field(
        None, pattern=r"^[0-9]{1,4}(\.[0-9]{1,3})?$", description="length", examples=["2"]
    )
    size: str | None = Field(
        None,
        pattern=r"^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$",
        description="WIDTHxHEIGHT in pixels",
        examples=["64x64"],
    )
    negative_prompt: str | None = Field(None, max_length=32_000)
    # Larger numbers are not exact in JavaScript: what is answered would not make the video again.
    seed: Annotated[int, Field(ge=0, le=2**53 - 1), NO_BOOL] | None = Field(
        None, description="drawn at random if left out"
    )
    num_inference_steps: Annotated[int, Field(ge=1, le=200), NO_BOOL] | None = None
    guidance_scale: Annotated[float, Field(ge=0, le=20), NO_BOOL] | None = None
    fps: Annotated[float, Field(ge=1, le=120), NO_BOOL] | None = None
    physics: PhysicsSpec | None = None
    input_reference: Annotated[bytes, SCHEMA] | None = Field(None, description=DESCRIPTION)

    @classmethod
    def parse(cls, fields: Any, config: Config, limits: ShapeLimits) -> Self:
        """Checks the fields of a request; nobody looks into an image.

        Raises:
            ApiError: 422, about one field that is wrong; names the nearest one where it is unknown. 413, an
                image is too long.
        """
        if isinstance(fields, Mapping) and (given := fields.get(IMAGE_FIELD)) is not None:
            _check_image(True, config, limits)
            fields = {**fields, IMAGE_FIELD: image_of(given, config.serve.max_image_bytes)}
        try:
            return cls.model_validate(fields)
        except ValidationError as error:
            errors = error.errors()
        # A misspelt field explains a missing one.
        first = next((item for item in errors if item["type"] == "extra_forbidden"), errors[0])
        location = first["loc"]
        param = ".".join(str(part) for part in location if part != "[key]")
        if first["type"] == "extra_forbidden":
            message = f"unknown field {param!r}; {key_advice(cls, location)}"
            raise ApiError(422, message, "unknown_parameter", param)
        if first["type"] == "missing":
            raise ApiError(422, f"the field {param!r} is missing; add it", "missing_parameter", param)
        match first["type"]:
            case "value_error":
                reason = str(first["ctx"]["error"])
            case "string_type" | "string_pattern_mismatch" if examples := cls.model_fields[param].examples:
                reason = f"give it as text, such as {examples[0]!r}"
            case _:
                reason = first["msg"]
        message = f"bad value {reprlib.repr(first['input'])} for the field {param!r}: {reason}"
        raise ApiError(422, message, "invalid_value", param or None)

    def to_spec(self, config: Config, limits: ShapeLimits) -> VideoSpec:
        """The video that this asks for, with the operator's defaults.

        Raises:
            ApiError: not this server's model (404), or a shape or knobs that it does not have (422), or it
                always takes an image (422).
        """
        if self.model not in (None, model_name(config)):
            message = f"no model {self.model!r} here; use {model_name(config)!r}, or leave the field out"
            raise ApiError(404, message, "model_not_found", "model")
        if self.physics is not None and not limits.phenomena:
            message = "this server runs the bare backbone, which has no physics knobs; leave the field out"
            raise ApiError(422, message, "unsupported_parameter", "physics")
        image = self.input_reference
        _check_image(image is not None, config, limits)
        backbone, sampling = config.backbone, config.sampling
        fps = self.fps or backbone.fps
        width, height = map(int, self.size.split("x")) if self.size else (backbone.width, backbone.height)
        param = "size"
        try:
            limits.check_size(height, width)
            param = "seconds"
            if self.seconds and not float(self.seconds):
                raise ProPhyError(
                    f"a video of {self.seconds} seconds has no frame; leave the field out, or give more"
                )
            num_frames = limits.num_frames(float(self.seconds), fps) if self.seconds else backbone.num_frames
            param = "size"
            limits.check_sharing(num_frames, height, width)
        except ProPhyError as error:
            raise ApiError(422, str(error), "invalid_value", param) from None
        given = self.model_dump(include=VideoSpec.model_fields.keys() - {"physics"}, exclude_none=True)
        defaults = sampling.model_dump() | {"fps": fps, "seed": secrets.randbelow(2**31)}
        return VideoSpec(
            **(defaults | given),
            num_frames=num_frames,
            height=height,
            width=width,
            physics=self._physics(limits),
            image=None if image is None else hashlib.sha256(image).hexdigest(),
        )

    def _physics(self, limits: ShapeLimits) -> PhysicsSpec | None:
        """The knobs, with strengths by the names that the branch has, whatever their spelling."""
        if self.physics is None:
            return None
        spellings: dict[str, str] = {}
        for spelling in self.physics.strength:
            param = f"physics.strength.{spelling}"
            try:
                name = parse_phenomenon(spelling, limits.phenomena)
            except ProPhyError as error:
                raise ApiError(422, f"bad field {param!r}: {error}", "invalid_value", param) from None
            if name in spellings:
                message = f"{spellings[name]!r} and {spelling!r} are one phenomenon; give it one strength"
                raise ApiError(422, message, "invalid_value", param)
            spellings[name] = spelling
        strength = {name: self.physics.strength[spelling] for name, spelling in spellings.items()}
        return self.physics.model_copy(update={"strength": strength})


def _check_image(given: bool, config: Config, limits: ShapeLimits) -> None:
    """See `ShapeLimits.check_image`."""
    try:
        limits.check_image(given, config.sampling.step_cache)
    except ProPhyError as error:
        code = "unsupported_parameter" if given else "missing_parameter"
        raise ApiError(422, str(error), code, IMAGE_FIELD) from None


class VideoError(BaseModel):
    """Why a video was not made."""

    code: str
    message: str


class Video(BaseModel):
    """A job and its video, as clients see it. The fields after `error` are ours."""

    id: str
    object: Literal["video"] = "video"
    model: str
    status: JobStatus
    progress: int
    created_at: int
    completed_at: int | None
    expires_at: int | None
    seconds: str = Field(description="true length of the video")
    size: str
    prompt: str
    remixed_from_video_id: str | None = None
    error: VideoError | None
    negative_prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    physics: PhysicsSpec | None
    image: str | None = Field(description="SHA-256 of the file of the image that it begins with")
    queue_position: int | None = Field(description="videos that wait before it; null if it does not wait")
    phenomena: list[str] = Field(description="those of the model that the prompt names")
    inference_time_s: float | None
    stage_durations: dict[str, float] | None = Field(description="seconds of text, denoise, decode, encode")

    @classmethod
    def from_job(
        cls, job: Job, model: str, progress: int, queue_position: int | None, phenomena: Sequence[str]
    ) -> Self:
        """What clients see of a job.

        Args:
            job: as the database has it.
            model: what clients call the model.
            progress: per cent that are done, if it is being made.
            queue_position: jobs before it, if it waits.
            phenomena: those of the model that its prompt names.
        """
        spec = job.spec
        error = (
            VideoError(code=job.error_code, message=job.error_message)
            if job.error_code is not None and job.error_message is not None
            else None
        )
        taken = (
            job.completed_at - job.started_at
            if job.completed_at is not None and job.started_at is not None
            else None
        )
        return cls(
            id=job.id,
            model=model,
            status=job.status,
            progress=100 if job.status == "completed" else progress,
            created_at=int(job.created_at),
            completed_at=int(job.completed_at) if job.completed_at is not None else None,
            expires_at=int(job.expires_at) if job.expires_at is not None else None,
            seconds=spec.seconds,
            size=f"{spec.width}x{spec.height}",
            error=error,
            queue_position=queue_position,
            phenomena=[*phenomena],
            inference_time_s=taken,
            stage_durations=job.stage_durations,
            **dict(spec),
        )


class PhysicsMaps(BaseModel):
    """What the routers said while a video was made: means over its denoising steps."""

    object: Literal["video.physics"] = "video.physics"
    semantic_weights: list[float] = Field(description="weight of each semantic expert; they sum to 1")
    token_grid: list[int] = Field(
        min_length=3, max_length=3, description="frames, rows and columns of tokens"
    )
    maps: dict[str, list[list[list[float]]]] = Field(
        description="where each phenomenon acts: 0 to 1 for each token, by frame, row and column"
    )


class VideoList(BaseModel):
    """A page of videos."""

    object: Literal["list"] = "list"
    data: list[Video]
    first_id: str | None
    last_id: str | None
    has_more: bool


class DeletedVideo(BaseModel):
    """A video that is no more."""

    id: str
    object: Literal["video.deleted"] = "video.deleted"
    deleted: Literal[True] = True


class Model(BaseModel):
    """The model that this server runs."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "prophy"


class ModelList(BaseModel):
    """The models of this server: one."""

    object: Literal["list"] = "list"
    data: list[Model]


class Settings(BaseModel):
    """What this server makes where a request does not say, and what it allows."""

    object: Literal["settings"] = "settings"
    model: str
    has_physics: bool = Field(description="whether requests may hold `physics`")
    defaults: dict[str, str | int | float] = Field(description="values of fields that a request leaves out")
    ranges: dict[str, Annotated[list[float], Field(min_length=2, max_length=2)]] = Field(
        description="smallest and largest value of a field; `physics.strength` is that of each phenomenon"
    )
    max_seconds: str = Field(description="length of the longest video at the default rate")
    width_multiple: int
    height_multiple: int
    max_pixels: int = Field(description="per frame")
    phenomena: list[str] = Field(description="what `physics.strength` may name")
    images: Literal["never", "optional", "required"] = Field(
        description="whether requests hold an `input_reference`"
    )
    image_formats: list[str]
    max_image_bytes: int
    max_image_pixels: int
    examples: list[str] = Field(description="prompts of what the model was trained on")

    @classmethod
    def of_run(cls, config: Config, limits: ShapeLimits) -> Self:
        """What holds for the server of a run."""
        backbone, sampling = config.backbone, config.sampling
        schema = VideoRequest.model_json_schema()
        bounds = {name: field.get("anyOf", [{}])[0] for name, field in schema["properties"].items()}
        if limits.phenomena:
            knobs = schema["$defs"]["PhysicsSpec"]["properties"]
            bounds["physics.scale"] = knobs["scale"]
            bounds["physics.strength"] = knobs["strength"]["additionalProperties"]
        return cls(
            model=model_name(config),
            has_physics=bool(limits.phenomena),
            defaults=sampling.model_dump(exclude={"step_cache", "guidance_scale_2"})
            | {
                "seconds": f"{backbone.num_frames / backbone.fps:.3f}".rstrip("0").rstrip("."),
                "size": f"{backbone.width}x{backbone.height}",
                "fps": backbone.fps,
            },
            ranges={
                name: [bound["minimum"], bound["maximum"]]
                for name, bound in bounds.items()
                if "maximum" in bound
            },
            max_seconds=f"{limits.max_num_frames / backbone.fps:.3f}".rstrip("0").rstrip("."),
            width_multiple=limits.width_multiple,
            height_multiple=limits.height_multiple,
            max_pixels=limits.max_pixels,
            phenomena=list(limits.phenomena),
            images=_images(config, limits),
            image_formats=list(FORMATS),
            max_image_bytes=config.serve.max_image_bytes,
            max_image_pixels=MAX_PIXELS,
            examples=config.serve.examples,
        )


def _images(config: Config, limits: ShapeLimits) -> Literal["never", "optional", "required"]:
    if limits.images == "always":
        return "required"
    try:
        limits.check_image(True, config.sampling.step_cache)
    except ProPhyError:
        return "never"
    return "optional"


class Health(BaseModel):
    """State of the server."""

    status: Literal["ok", "ready"]


def model_name(config: Config) -> str:
    """What clients call the model: the backbone's name, with `prophy-` before it if it carries a branch."""
    name = config.backbone.pretrained.rstrip("/").rsplit("/", 1)[-1]
    return f"prophy-{name}" if config.checkpoint is not None else name
