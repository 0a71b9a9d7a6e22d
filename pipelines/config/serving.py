"""The HTTP endpoint and its replicas."""

import re
from typing import Annotated, Self

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    model_validator,
)

from pipelines.config.base import (
    LocalPath,
    Location,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
)


class ServeConfig(Section):
    """The HTTP endpoint and its replicas."""

    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: list[Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]] = Field(
        [],
        description="SHA-256 of each key that is let in, as `prophy key` prints it; none: only on loopback",
    )
    output: LocalPath = Field(description="folder of the job database and the videos")
    database: str | None = Field(
        None,
        description="SQLAlchemy URL; null: SQLite in `output`. Several nodes need PostgreSQL; its "
        "password belongs in PGPASSWORD or ~/.pgpass",
    )
    videos: Location | None = Field(
        None, description="folder or fsspec URL of the finished videos; null: in `output`"
    )
    expire_after_s: PositiveFloat | None = Field(
        7 * 86400.0, description="how long the files of a video are kept; null: until it is deleted"
    )
    max_body_bytes: PositiveInt = 1 << 20
    max_queued: PositiveInt = 100
    min_replicas: NonNegativeInt = 0
    max_replicas: PositiveInt = 1
    num_cpus: NonNegativeFloat = 1.0
    num_gpus: NonNegativeFloat = 0.0
    max_pixels: PositiveInt | None = Field(
        None, description="per frame; null: as many as the backbone's clips"
    )
    max_num_frames: PositiveInt | None = Field(None, description="null: as many as the backbone's clips")
    drain_timeout_s: PositiveFloat = Field(
        3600.0, description="how long a replica that is scaled away may go on with its video"
    )
    upscale_delay_s: NonNegativeFloat = 30.0
    downscale_delay_s: NonNegativeFloat = 600.0

    @property
    def database_url(self) -> str:
        """Of the job database, as SQLAlchemy writes it."""
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
        if self.database is not None and re.match(r"[^/]*//([^/@:]*:[^@]+@|.*[?&]password=)", self.database):
            raise ValueError("database must not hold a password; put it into PGPASSWORD or ~/.pgpass")
        return self
