"""What a video is asked to be, and which shapes a model can make. Knows no HTTP, no Ray and no torch."""

import math
from typing import Annotated, Any, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from pipelines.config import StepCache
from prophy.backbones.families import Images
from prophy.errors import ProPhyError

VIDEO_FILE, THUMBNAIL_FILE, MAPS_FILE = "video.mp4", "thumbnail.webp", "physics.json"
SPRITESHEET_FILE = "spritesheet.webp"
IMAGE_FILE, PREVIEW_FILE = "input_reference", "input_reference.webp"


def _refuse_bool(value: Any) -> Any:
    if isinstance(value, bool):
        raise ValueError("a number is needed")
    return value


def _refuse_number(value: Any) -> Any:
    if isinstance(value, int | float) and not isinstance(value, bool):
        raise ValueError("true or false is needed")
    return value


Boolean = Annotated[bool, BeforeValidator(_refuse_number)]
# After the bounds of a number, which pydantic leaves out of the JSON schema where it comes before them.
NO_BOOL = BeforeValidator(_refuse_bool)
KnobFactor = Annotated[float, Field(ge=0.0, le=10.0), NO_BOOL]


class PhysicsSpec(BaseModel):
    """The physics knobs of one video; the defaults leave the model as it is."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    scale: KnobFactor = Field(
        1.0, description="factor on all that the Physical Branch adds; 0 switches it off"
    )
    strength: dict[str, KnobFactor] = Field(
        {},
        description="factor per phenomenon, by its name in /v1/settings, on what the refinement experts add "
        "where it acts",
    )
    invert_refinement: Boolean = Field(False, description="route tokens to the experts that fit them least")
    return_maps: Boolean = Field(False, description="keep what the routers said, for /v1/videos/{id}/physics")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.return_maps and self.scale == 0:
            raise ValueError("return_maps needs the Physical Branch, which a scale of 0 switches off")
        return self


class VideoSpec(BaseModel):
    """Everything that decides a video, given the model.

    `image` is the SHA-256 of the file of the image that it begins with; the file itself travels beside it.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    prompt: str
    negative_prompt: str
    seed: int
    num_frames: int
    height: int
    width: int
    fps: float
    num_inference_steps: int
    guidance_scale: float
    guidance_scale_2: float | None = None
    step_cache: StepCache = StepCache()
    physics: PhysicsSpec | None = None
    image: str | None = None

    @property
    def seconds(self) -> str:
        """Length of the video in seconds, as the Videos API writes it: a string, without trailing zeros."""
        return f"{self.num_frames / self.fps:.3f}".rstrip("0").rstrip(".")


class VideoResult(NamedTuple):
    """What comes of a specification.

    Attributes:
        files: contents by name: `VIDEO_FILE`, `THUMBNAIL_FILE`, and `MAPS_FILE` where maps were asked for.
        stage_durations: seconds of `text`, `denoise`, `decode` and `encode`.
    """

    files: dict[str, bytes]
    stage_durations: dict[str, float]


class ShapeLimits(BaseModel):
    """The shapes that a model can make and an operator allows: `k * frame_multiple + 1` frames.

    A token of the transformer is `token_height` x `token_width` pixels of `frame_multiple` frames (the first
    frame has tokens of its own), and `sequence_parallel` processes share them out. `phenomena` are the names
    of its branch, in their order; without a branch, and so without physics knobs, there are none. `images`
    says whether it makes videos of images. `only` is the one shape (frames, height, width) of a model that
    has one.
    """

    model_config = ConfigDict(frozen=True)

    frame_multiple: int
    height_multiple: int
    width_multiple: int
    token_height: int
    token_width: int
    sequence_parallel: int
    max_num_frames: int
    max_pixels: int
    phenomena: tuple[str, ...]
    images: Images
    only: tuple[int, int, int] | None = None

    def num_frames(self, duration_s: float, fps: float) -> int:
        """The number of frames, among those that the model can make, that comes nearest to `duration_s`.

        Raises:
            ProPhyError: longer than allowed, or another length than the only one.
        """
        frames = math.floor(duration_s * fps / self.frame_multiple + 0.5) * self.frame_multiple + 1
        if self.only is not None and frames != self.only[0]:
            raise ProPhyError(
                f"{duration_s:g} s at {fps:g} frames/s are {frames} frames; this model makes {self.only[0]} "
                f"alone, that is {self.only[0] / fps:.3g} s"
            )
        if frames > self.max_num_frames:
            raise ProPhyError(
                f"{duration_s:g} s at {fps:g} frames/s are {frames} frames; this model makes at most "
                f"{self.max_num_frames}, that is {self.max_num_frames / fps:.3g} s"
            )
        return frames

    def check_image(self, given: bool, step_cache: StepCache) -> None:
        """Checks that a video can begin with an image where one is given, and without one where none is.

        Raises:
            ProPhyError: the model takes none, or always one, or not with this step cache.
        """
        if not given:
            if self.images == "always":
                raise ProPhyError("this model makes videos of images alone; give one to begin with")
            return
        if self.images == "never":
            raise ProPhyError("this model makes videos from text alone and takes no image; leave it out")
        if step_cache.sea is not None:
            raise ProPhyError(
                "sampling.step_cache.sea wants to know each step's noise level, which is not told of a video "
                "that begins with an image; leave the image out, or use first_block or taylorseer"
            )

    def check_size(self, height: int, width: int) -> None:
        """Checks a frame.

        Raises:
            ProPhyError: not the only size, not made of whole tokens, or larger than allowed.
        """
        if self.only is not None and (height, width) != self.only[1:]:
            raise ProPhyError(
                f"size {width}x{height} does not fit this model, which makes {self.only[2]}x{self.only[1]} "
                f"alone"
            )
        if height % self.height_multiple or width % self.width_multiple:
            raise ProPhyError(
                f"size {width}x{height} does not fit this model; choose a width that is a multiple of "
                f"{self.width_multiple} and a height that is a multiple of {self.height_multiple}"
            )
        if height * width > self.max_pixels:
            raise ProPhyError(
                f"size {width}x{height} has {height * width} pixels; choose one of at most {self.max_pixels}"
            )

    def num_tokens(self, num_frames: int, height: int, width: int) -> int:
        """How many tokens a video of this length and size has."""
        num_slices = (num_frames - 1) // self.frame_multiple + 1
        return num_slices * (height // self.token_height) * (width // self.token_width)

    def check_sharing(self, num_frames: int, height: int, width: int) -> None:
        """Checks that all processes of a replica get as many tokens of a video.

        Raises:
            ProPhyError: they cannot.
        """
        num_tokens = self.num_tokens(num_frames, height, width)
        if num_tokens % self.sequence_parallel:
            raise ProPhyError(
                f"{num_frames} frames of {width}x{height} have {num_tokens} tokens, which the "
                f"{self.sequence_parallel} processes of a replica (serve.sequence_parallel) cannot share "
                f"out; choose another size or length"
            )
