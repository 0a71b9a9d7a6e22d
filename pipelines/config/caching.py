"""Offline prior caching."""

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.base import Location, PoolConfig, Section


class VideoLimits(Section):
    """What a video may be, and what reading it may take, before it goes to quarantine."""

    max_bytes: PositiveInt = 2_000_000_000
    max_pixels: PositiveInt = Field(3840 * 2160, description="per frame")
    max_frames: PositiveInt = 500_000
    max_duration_s: PositiveFloat = 3600.0
    max_streams: PositiveInt = Field(16, description="video, sound, subtitles and others together")
    max_seconds: PositiveFloat = Field(120.0, description="to measure a video, or to decode one clip")
    max_memory_bytes: PositiveInt = Field(4_000_000_000, description="address space of a decoding process")


class CacheConfig(Section):
    """Offline prior caching: which videos, into which folder, with which pools."""

    input: Location = Field(
        description="folder or URL of videos, or a list of them: Parquet, CSV or JSON Lines with `path` and "
        "optional `caption` and `phenomena`, or WISA-80K's JSON"
    )
    output: Location
    clip_duration_s: PositiveFloat = Field(description="videos are cut into clips of this length")
    shorter_clips_s: list[PositiveFloat] = Field(
        [], description="lengths of clips for what is left at the end, or of a video shorter than a clip"
    )
    limits: VideoLimits = VideoLimits()
    rows_per_file: PositiveInt = 32
    read: PoolConfig = PoolConfig()
    extract: PoolConfig = PoolConfig()
    encode: PoolConfig = PoolConfig()
    encode_batch_size: PositiveInt = Field(1, description="clips that the VAE encodes at once")
