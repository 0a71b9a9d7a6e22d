"""The HTTP endpoint and its replicas."""

import re
from typing import Annotated, Self
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.base import LocalPath, Location, NonNegativeFloat, NonNegativeInt, Section


def _origin(text: str) -> str:
    refusal = "give a scheme and a host, such as https://studio.example or http://localhost:3000"
    try:
        parts = urlsplit(text)
        is_origin = parts.hostname and text == f"{parts.scheme}://{parts.netloc}" and parts.port != 0
    except ValueError:
        raise ValueError(refusal) from None
    if not is_origin:
        raise ValueError(refusal)
    return text


Origin = Annotated[str, Field(pattern=r"^https?://[^/@\s]+$"), AfterValidator(_origin)]


class ServeConfig(Section):
    """The HTTP endpoint and its replicas."""

    host: str = "127.0.0.1"
    """Address to listen on. The default lets in this machine alone; 0.0.0.0 lets in all, with api_keys."""

    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port to listen on; 0 takes a free one."""

    api_keys: list[str] = Field([])
    """SHA-256 of each key that is let in, as `prophy key` prints it. Without keys, only this machine is.

    With them, /healthz, /readyz, /docs and /openapi.json still need none.
    """

    allowed_origins: list[Origin] = Field([])
    """Pages that may use the server from a browser, such as https://studio.example.

    Without keys their host names are let in too, as that of a proxy before the server.
    """

    output: LocalPath
    """Folder of the job database and the videos. By default `serve` in run_dir."""

    database: str | None = None
    """SQLAlchemy URL of the job database. Null is a SQLite file in `output`.

    Replicas on several nodes need PostgreSQL; its password belongs into PGPASSWORD or ~/.pgpass.
    """

    videos: Location | None = None
    """Folder or fsspec URL of the finished videos. Null is a folder in `output`."""

    expire_after_s: PositiveFloat | None = 7 * 86400.0
    """Seconds that the files of a video are kept, a week by default; null keeps them until it is deleted."""

    max_body_bytes: PositiveInt = 1 << 20
    """Bytes that a request may have, without an image. A prompt with all knobs has a few thousand; 1 MiB."""

    max_image_bytes: Annotated[int, Field(gt=0, le=2**25)] = 1 << 24
    """Bytes that a request's image may have, at most 32 MiB; 16 MiB, since photographs have 2 to 8 MB."""

    examples: list[str] = Field([])
    """Prompts to click on the page at `/`, of the kind that the model was trained on. None by default."""

    max_queued: PositiveInt = 100
    """Videos that may wait; one more request is answered with 429, so that no client waits for days."""

    min_replicas: NonNegativeInt = 0
    """Replicas that stay when there is nothing to do. 0 frees the GPUs, and the next video waits longer."""

    max_replicas: PositiveInt = 1
    """Replicas at most, each with the whole model."""

    sequence_parallel: PositiveInt = 1
    """Processes of a replica that share each video, every one with a part of its tokens, on one node.

    The time of a denoising step is divided by it, for an exchange of tokens in every block; each process
    holds the whole model. It must divide attention heads and the tokens of a video, and with CogVideoX
    backbone.max_sequence_length too; neither step caches nor backbone.compile go with it. 1 by default: as
    many replicas of one GPU make more videos an hour. No GPU has run it yet.
    """

    cfg_parallel: bool = False
    """Whether a replica is twice as many processes, of which each half computes one pass of guidance.

    In a denoising step each process computes half, and predictions are exchanged once, which is less than
    sequence_parallel sends. A video without guidance (a guidance_scale of at most 1) has one pass, which both
    halves compute, and is no faster. Step caches go with it but for CogVideoX's first_block, and so does
    backbone.compile, tried with aot_eager. False by default, as sequence_parallel is 1. No GPU has run it.
    """

    num_cpus: NonNegativeFloat = 1.0
    """CPUs that Ray reserves for each process of a replica."""

    num_gpus: NonNegativeFloat = 0.0
    """GPUs that Ray reserves for each process of a replica; 0 by default: it runs on the CPU."""

    max_pixels: PositiveInt | None = None
    """Pixels of a frame (height times width) that a request may ask for. Null: the backbone's."""

    max_num_frames: PositiveInt | None = None
    """Frames that a request may ask for. Null: the backbone's."""

    drain_timeout_s: PositiveFloat = 3600.0
    """Seconds that a replica which is scaled away may go on with its video. An hour ends any video."""

    upscale_delay_s: NonNegativeFloat = 30.0
    """Seconds that videos must have waited before a replica is added; 30, since a short peak needs none."""

    downscale_delay_s: NonNegativeFloat = 600.0
    """Seconds without work before a replica goes. Loading it again takes minutes, so it stays for ten."""

    @property
    def processes_per_replica(self) -> int:
        """How many make each video."""
        return self.sequence_parallel * (2 if self.cfg_parallel else 1)

    @property
    def database_url(self) -> str:
        """The job database's URL, as SQLAlchemy writes it."""
        return self.database or f"sqlite:///{self.output / 'jobs.sqlite'}"

    @property
    def videos_location(self) -> str:
        """Folder or URL of the finished videos."""
        return self.videos or str(self.output / "videos")

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_replicas > self.max_replicas:
            raise ValueError(
                f"min_replicas ({self.min_replicas}) must not exceed max_replicas ({self.max_replicas})"
            )
        size = self.processes_per_replica
        if size > 1 and (self.num_gpus not in (0, 1) or not self.num_cpus + self.num_gpus):
            raise ValueError(
                f"each of the {size} processes that share a video (sequence_parallel "
                f"{self.sequence_parallel}, cfg_parallel {self.cfg_parallel}) has a GPU of its own or none; "
                f"set num_gpus ({self.num_gpus:g}) to 1, or to 0 and num_cpus ({self.num_cpus:g}) to more"
            )
        if self.database is not None and re.match(r"[^/]*//([^/@:]*:[^@]+@|.*[?&]password=)", self.database):
            raise ValueError("database must not hold a password; put it into PGPASSWORD or ~/.pgpass")
        for number, hashed in enumerate(self.api_keys, 1):
            if not re.fullmatch(r"[0-9a-f]{64}", hashed):  # it may be the key itself: not to be shown
                raise ValueError(
                    f"entry {number} of api_keys is not the SHA-256 of a key, 64 hexadecimal digits; give "
                    "the hash that `prophy key` prints, not the key"
                )
        return self
