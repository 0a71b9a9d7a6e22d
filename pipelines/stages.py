"""What happens to a video on its way into the cache: cut, read, understood by the VLM, encoded.

Each stage is a callable from Arrow table to Arrow table, as Ray Data calls it, and knows no Ray. A row whose
video cannot be used gets `error` and travels on: later stages pass it by, the sink puts it into quarantine.
Models are imported by the actors that hold them: torch and transformers cost every other process seconds.
"""

import hashlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa

from pipelines.config import BackboneConfig, VideoLimits, VlmConfig
from pipelines.sink import Table, write_file
from prophy.schema import EMPTY_PROMPT, ENCODINGS, PRIORS, QUARANTINE, SOURCE, tensor_columns
from prophy.taxonomy import Phenomenon, multi_hot
from prophy.video import VideoError, clip_spans, probe, read_frames

_ERROR = pa.field("error", pa.struct(list(QUARANTINE)))


def _or_error(fields: list[pa.Field]) -> pa.Schema:
    """A schema whose rows hold either all of `fields` or an error."""
    return pa.schema([*(field.with_nullable(True) for field in fields), _ERROR])


SOURCES = pa.schema(
    [
        pa.field("source", SOURCE, nullable=False),
        pa.field("caption", pa.string()),
        pa.field("labels", pa.list_(pa.string())),  # phenomena, where they are known
        pa.field("done", pa.list_(pa.string()), nullable=False),  # clips that need no work any more
    ]
)

_CLIP = [
    *list(PRIORS)[: PRIORS.get_field_index("vlm_caption")],
    SOURCES.field("labels"),
    QUARANTINE.field("num_clips"),
]
CLIPS = _or_error(_CLIP)
CLIPS_WITH_FRAMES = _or_error([*_CLIP, pa.field("frames", pa.large_binary())])  # raw RGB, uint8
PRIORS_OR_ERROR = _or_error(list(PRIORS))
ENCODINGS_OR_ERROR = _or_error(list(ENCODINGS))


def clip_ids(
    source: dict[str, Any], content_hash: str, duration_s: float, clip_duration_s: float
) -> dict[str, tuple[float, float]]:
    """The clips of a video: `sample_id` -> (start, end) in seconds."""
    video = hashlib.sha256(f"{source['uri']}\n{content_hash}".encode()).hexdigest()[:16]
    return {
        f"{video}-{round(start * 1000):07d}-{round(end * 1000):07d}": (start, end)
        for start, end in clip_spans(duration_s, clip_duration_s)
    }


class CutVideo:
    """`SOURCES` -> `CLIPS`, one table per clip: measures a video, checks the limits, lists its clips."""

    def __init__(self, clip_duration_s: float, limits: VideoLimits) -> None:
        self.clip_duration_s = clip_duration_s
        self.limits = limits.model_dump()

    def __call__(self, sources: pa.Table) -> Iterator[pa.Table]:
        """Yields the clips of each video that are not done yet, or its error."""
        for row in sources.to_pylist():
            try:
                clips = self._cut(row)
            except (VideoError, OSError) as error:
                clips = [_failed(row, "CutVideo", error)]
            for clip in clips:
                yield pa.Table.from_pylist([clip], CLIPS)

    def _cut(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        path = row["source"]["uri"]
        info = probe(path, **self.limits)
        with open(path, "rb") as file:
            content_hash = hashlib.file_digest(file, "sha256").hexdigest()
        clips = clip_ids(row["source"], content_hash, info.duration_s, self.clip_duration_s)
        if not clips:
            raise VideoError(
                f"{path} lasts {info.duration_s:.2f} s, less than one clip of {self.clip_duration_s:g} s; "
                f"lower cache.clip_duration_s or remove it"
            )
        video = row | vars(info) | {"content_hash": content_hash, "num_clips": len(clips)}
        return [
            video | {"sample_id": key, "start_s": start, "end_s": end}
            for key, (start, end) in clips.items()
            if key not in row["done"]
        ]


class ReadClip:
    """`CLIPS` -> `CLIPS_WITH_FRAMES`: decodes the clip's frames, from its start to its end inclusive."""

    def __init__(self, num_frames: int, height: int, width: int) -> None:
        self.size = (num_frames, height, width)

    def __call__(self, clips: pa.Table) -> pa.Table:
        """Adds the frames to each clip."""
        return pa.Table.from_pylist([self._read(clip) for clip in clips.to_pylist()], CLIPS_WITH_FRAMES)

    def _read(self, clip: dict[str, Any]) -> dict[str, Any]:
        if clip["error"]:
            return clip
        try:
            frames = read_frames(clip["source"]["uri"], clip["start_s"], clip["end_s"], *self.size)
        except VideoError as error:
            return _failed(clip, "ReadClip", error)
        return {**clip, "frames": frames.tobytes()}


class ExtractPriors:
    """`CLIPS_WITH_FRAMES` -> `PRIORS_OR_ERROR`: holds the VLM and asks it about each clip."""

    def __init__(self, vlm: VlmConfig) -> None:
        from prophy.priors.extractor import PriorExtractor

        self.size = (vlm.num_frames, vlm.height, vlm.width)
        self.extractor = PriorExtractor(
            vlm.pretrained, vlm.revision, vlm.dtype, vlm.device_map, vlm.layers, vlm.max_new_tokens
        )

    def __call__(self, clips: pa.Table) -> pa.Table:
        """The priors of each clip."""
        return pa.Table.from_pylist([self._extract(clip) for clip in clips.to_pylist()], PRIORS_OR_ERROR)

    def _extract(self, clip: dict[str, Any]) -> dict[str, Any]:
        if clip["error"]:
            return clip
        fps = (self.size[0] - 1) / (clip["end_s"] - clip["start_s"])
        labels = None if clip["labels"] is None else tuple(map(Phenomenon, clip["labels"]))
        priors = self.extractor(_frames(clip, self.size), fps, labels)
        return {
            **clip,
            "vlm_caption": priors.vlm_caption,
            "answers": priors.answers,
            "phenomena": multi_hot(priors.phenomena),
            "map_phenomena": priors.map_phenomena,
            "maps": priors.maps.ravel(),
            "maps_shape": priors.maps.shape,
        }


class EncodeClip:
    """`CLIPS_WITH_FRAMES` -> `ENCODINGS_OR_ERROR`: holds the VAE and the text encoder of the backbone.

    Before its first clip it writes the embedding of the empty prompt beside the table, if it is not there.
    """

    def __init__(self, backbone: BackboneConfig, table: Table) -> None:
        from prophy.encoding import VideoEncoder

        self.size = (backbone.num_frames, backbone.height, backbone.width)
        self.encoder = VideoEncoder(
            backbone.pretrained,
            backbone.revision,
            backbone.dtype,
            backbone.autocast,
            backbone.max_sequence_length,
            backbone.family,
        )
        if not (table.folder / EMPTY_PROMPT).exists():
            empty = tensor_columns("text_embeds", self.encoder.encode_text([""])[0])
            write_file(table.folder, pa.Table.from_pylist([empty]), table.footer, name=EMPTY_PROMPT)

    def __call__(self, clips: pa.Table) -> pa.Table:
        """The latents and the text embeddings of all clips at once."""
        rows = clips.to_pylist()
        good = [row for row in rows if not row["error"]]
        if good:
            latents = self.encoder.encode_video(np.stack([_frames(row, self.size) for row in good]))
            text_embeds = self.encoder.encode_text([row["caption"] for row in good])
            for row, *tensors in zip(good, latents, text_embeds, strict=True):
                row |= tensor_columns("latents", tensors[0]) | tensor_columns("text_embeds", tensors[1])
        return pa.Table.from_pylist(rows, ENCODINGS_OR_ERROR)


def _frames(clip: dict[str, Any], size: tuple[int, int, int]) -> np.ndarray:
    """The clip's frames, writable as torch wants them."""
    return np.frombuffer(bytearray(clip["frames"]), np.uint8).reshape(*size, 3)


def _failed(row: dict[str, Any], stage: str, error: Exception) -> dict[str, Any]:
    """The row with its error, as it goes into quarantine."""
    return {
        "error": {
            "source": row["source"],
            "sample_id": row.get("sample_id"),
            "num_clips": row.get("num_clips"),
            "stage": stage,
            "error_type": type(error).__name__,
            "message": str(error),
            "attempts": 1,
        }
    }
