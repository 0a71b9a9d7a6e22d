"""Offline prior caching."""

from pydantic import Field, PositiveFloat, PositiveInt

from pipelines.config.base import FolderOrS3, Location, PoolConfig, Section
from prophy.places import Place, place_of


class VideoLimits(Section):
    """What a video may be, and what reading it may take; a video beyond these goes to quarantine.

    The defaults admit an hour of 4K video, and stop files that are made to exhaust a decoder.
    """

    max_bytes: PositiveInt = 2_000_000_000
    """Size of the file in bytes. 2 GB holds an hour at 4 Mbit/s."""

    max_pixels: PositiveInt = 4096 * 4096
    """Pixels of a frame, height times width. The default admits what cameras record up to 5.3K."""

    max_frames: PositiveInt = 500_000
    """Frames of the whole video. The default is more than two hours at 60 frames per second."""

    max_duration_s: PositiveFloat = 3600.0
    """Duration of the whole video in seconds. The default is an hour."""

    max_streams: PositiveInt = 16
    """Streams of the file: video, sound, subtitles and others together. Films have fewer."""

    max_seconds: PositiveFloat = 120.0
    """Wall-clock seconds that measuring a video, or decoding one clip, may take.

    The default lets a slow disk or bucket pass, and stops a decoder that hangs.
    """

    max_memory_bytes: int = Field(4_000_000_000, ge=500_000_000)
    """Address space of a decoding process in bytes. Its libraries take about 0.25 GB of it."""


class CacheConfig(Section):
    """Offline prior caching: which videos, into which folder, with which pools of actors."""

    input: Location
    """The videos: a folder, a URL such as s3://bucket/videos, or a list of videos.

    A list is a Parquet, CSV or JSON Lines file with `path` and optional `caption` and `phenomena`, or
    WISA-80K's JSON.
    """

    output: FolderOrS3
    """Folder that the cache is written to, or a place in S3 such as s3://bucket/cache.

    By default `cache` in run_dir. In S3 each file is one PUT, and one run at a time writes there, by a lease:
    that of a killed run is free after 30 seconds.
    """

    clip_duration_s: PositiveFloat
    """Length in seconds of the clips that videos are cut into: (backbone.num_frames - 1) / backbone.fps."""

    shorter_clips_s: list[PositiveFloat] = Field([])
    """Lengths in seconds of clips for what is left at the end, or for a video shorter than a clip.

    By default there are none, and what is left is not used.
    """

    limits: VideoLimits = VideoLimits()
    """What a video may be; a video beyond it goes to quarantine."""

    rows_per_file: PositiveInt = 32
    """Clips in one Parquet file. A crash loses at most the clips of a file that is not full."""

    read: PoolConfig = PoolConfig()
    """Actors that measure and decode videos. They need no GPU."""

    extract: PoolConfig = PoolConfig()
    """Actors that hold the VLM."""

    extract_batch_size: PositiveInt = 1
    """Clips that the VLM is asked about at once. 1 by default, since memory grows with it.

    What a token costs is mostly to read the VLM's weights, once for the whole batch.
    """

    encode: PoolConfig = PoolConfig()
    """Actors that hold the VAE and the text encoder."""

    encode_batch_size: PositiveInt = 1
    """Clips that the VAE encodes at once. 1 by default, since memory grows with it."""

    max_staged_bytes: PositiveInt = 200_000_000_000
    """Bytes that copies of files in S3 may take on each node, in `cache` of PROPHY_HOME.

    Training draws clips at random, and reads whole files of an `output` in S3 once, if all of them fit; the
    least recently used go first. The default, 200 GB, is that of some 15,000 clips of 81 frames at 480x832.
    """

    @property
    def folder(self) -> Place:
        """`output`, as files are read and written there."""
        return place_of(self.output, "cache.output")
