"""What happens to a video on its way into the cache: cut, read, understood by the VLM, encoded.

Each stage is a callable from Arrow table to Arrow table, as Ray Data calls it, and knows no Ray. A row whose
video cannot be used gets `error` and travels on: later stages pass it by, the sink puts it into quarantine.
Each row also carries `share`, its part of one row of the work list, for the progress. Videos are decoded in
processes that may die (`prophy.decoder`); a clip that ends the process of a model twice is given up.
Models are imported by the actors that hold them: torch and transformers cost every other process seconds.
"""

import hashlib
import os
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from pipelines.actors import told_by_the_first_call
from pipelines.caching.manifests import VIDEOS
from pipelines.caching.tables import Table, write_file, writing
from pipelines.caching.video_files import UNREADABLE, LocalFiles
from pipelines.config import BackboneConfig, VideoLimits, VlmConfig
from prophy.decoder import ATTEMPTS, Decoder, DecoderError
from prophy.errors import ProPhyError
from prophy.places import Place, append
from prophy.schema import EMPTY_PROMPT, ENCODINGS, PRIORS, QUARANTINE, latents_columns, text_column
from prophy.taxonomy import Taxonomy, multi_hot
from prophy.video import VideoError, clip_spans, nearest_shape

if TYPE_CHECKING:
    import torch

    from prophy.backbones.encoding import VideoEncoder
    from prophy.priors.extractor import PriorExtractor

_ERROR = pa.field("error", pa.struct(list(QUARANTINE)))
_SHARE = pa.field("share", pa.float64(), nullable=False)


def _or_error(fields: list[pa.Field]) -> pa.Schema:
    """A schema whose rows hold either all of `fields` or an error."""
    return pa.schema([*(field.with_nullable(True) for field in fields), _SHARE, _ERROR])


SOURCES = pa.schema(
    [
        *VIDEOS,
        pa.field("done", pa.list_(pa.string()), nullable=False),  # clips that need no work any more
    ]
)

_CLIP = [*list(PRIORS)[: PRIORS.get_field_index("vlm_caption")], QUARANTINE.field("num_clips")]
CLIPS = _or_error(_CLIP)
# Raw RGB, uint8 `[T, H, W, 3]`.
CLIPS_WITH_FRAMES = _or_error(
    [*_CLIP, pa.field("frames", pa.large_binary()), pa.field("frames_shape", pa.list_(pa.int32()))]
)
PRIORS_OR_ERROR = _or_error(list(PRIORS))
ENCODINGS_OR_ERROR = _or_error(list(ENCODINGS))


def clip_ids(
    source: dict[str, Any], content_hash: str, duration_s: float, clip_durations_s: list[float]
) -> dict[str, tuple[float, float]]:
    """The clips of a video: `sample_id` -> (start, end) in seconds."""
    video = hashlib.sha256(f"{source['uri']}\n{content_hash}".encode()).hexdigest()[:16]
    return {
        f"{video}-{round(start * 1000):07d}-{round(end * 1000):07d}": (start, end)
        for start, end in clip_spans(duration_s, clip_durations_s)
    }


def decoder(limits: VideoLimits) -> Decoder:
    """A decoder with the limits of a process; the others are those of `Decoder.probe`."""
    return Decoder(limits.max_memory_bytes, limits.max_seconds)


def video_encoder(backbone: BackboneConfig) -> "VideoEncoder":
    """VAE and text encoder of a configuration's backbone."""
    from prophy.backbones.encoding import VideoEncoder

    return VideoEncoder(
        backbone.pretrained,
        backbone.revision,
        backbone.dtype,
        backbone.autocast,
        backbone.max_sequence_length,
        backbone.family,
        backbone.offload,
    )


class CutVideo:
    """`SOURCES` -> `CLIPS`, one table per clip: measures a video, checks the limits, lists its clips."""

    def __init__(self, clip_durations_s: list[float], limits: VideoLimits) -> None:
        self.clip_durations_s = clip_durations_s
        self.limits = limits.model_dump(exclude={"max_seconds", "max_memory_bytes"})
        self.files = LocalFiles(limits.max_bytes)
        self.decoder = decoder(limits)

    def __call__(self, sources: pa.Table) -> Iterator[pa.Table]:
        """Yields the clips of each video that are not done yet, or its error."""
        for row in sources.to_pylist():
            try:
                clips = self._cut(row)
            except (VideoError, OSError) as error:
                clips = [_failed(row, "CutVideo", error)]
            for clip in clips:
                yield pa.Table.from_pylist([{"share": 1 / len(clips), **clip}], CLIPS)

    def _cut(self, row: dict[str, Any]) -> list[dict[str, Any]]:
        uri = row["source"]["uri"]
        with self.files.open(uri) as path, open(path, "rb") as file:
            info = self.decoder.probe(path, **self.limits)
            content_hash = hashlib.file_digest(file, "sha256").hexdigest()
        clips = clip_ids(row["source"], content_hash, info.duration_s, self.clip_durations_s)
        if not clips:
            raise VideoError(
                f"{uri} lasts {info.duration_s:.3f} s, less than one clip of "
                f"{min(self.clip_durations_s):g} s; remove it, or take another cache.output, and its length "
                f"into cache.shorter_clips_s"
            )
        video = row | vars(info) | {"content_hash": content_hash, "num_clips": len(clips)}
        return [
            video | {"sample_id": key, "start_s": start, "end_s": end}
            for key, (start, end) in clips.items()
            if key not in row["done"]
        ]


class ReadClip:
    """`CLIPS` -> `CLIPS_WITH_FRAMES`: decodes the clip's frames, from its start to its end inclusive.

    Args:
        lengths: (seconds, frames) each; a clip gets as many frames as the nearest says.
        seen: (height, width) each of what the VLM sees; the picture is cut at its centre to the aspect ratio
            of the nearest.
        shapes: (height, width) each; what is left gets the nearest.
        limits: what decoding a video may take.
    """

    def __init__(
        self,
        lengths: list[tuple[float, int]],
        seen: list[tuple[int, int]],
        shapes: list[tuple[int, int]],
        limits: VideoLimits,
    ) -> None:
        self.lengths, self.seen, self.shapes = lengths, seen, shapes
        self.files = LocalFiles(limits.max_bytes)
        self.decoder = decoder(limits)

    def __call__(self, clips: pa.Table) -> pa.Table:
        """Adds the frames to each clip."""
        return pa.Table.from_pylist([self._read(clip) for clip in clips.to_pylist()], CLIPS_WITH_FRAMES)

    def _read(self, clip: dict[str, Any]) -> dict[str, Any]:
        if clip["error"]:
            return clip
        seen = nearest_shape(clip["height"], clip["width"], self.seen)
        shape = nearest_shape(*seen, self.shapes)
        duration_s = clip["end_s"] - clip["start_s"]
        _, num_frames = min(self.lengths, key=lambda length: abs(length[0] - duration_s))
        try:
            with self.files.open(clip["source"]["uri"]) as path:
                frames = self.decoder.read_frames(
                    path, clip["start_s"], clip["end_s"], num_frames, *shape, aspect_ratio=seen[1] / seen[0]
                )
        except (VideoError, OSError) as error:
            return _failed(clip, "ReadClip", error)
        return {**clip, "frames": frames.tobytes(), "frames_shape": frames.shape}


class DeadlyClipError(ProPhyError):
    """A clip whose processing ended the process, `ATTEMPTS` times."""


class Attempts:
    """Remembers which clips are being worked on: whoever finds one begun follows a process that died.

    A file per clip holds the ids of the processes that began it, and goes when one ends it.

    Args:
        folder: seen by all nodes; whoever starts a run makes it, empty.
        stage: name of the stage.
    """

    def __init__(self, folder: Place, stage: str) -> None:
        self.folder, self.stage = folder, stage

    def __call__(self, rows: list[dict[str, Any]], work: Callable[[list[dict[str, Any]]], None]) -> None:
        """Has the rows worked on, all at once; after a death one by one, so that only the guilty one fails.

        Args:
            rows: clips; each without an error gets the columns that `work` adds, or an error.
            work: adds columns to the rows that it is given.
        """
        for row in rows:
            if not row["error"] and self._count(row) >= ATTEMPTS:
                span = f"{row['source']['uri']} from {row['start_s']:g} to {row['end_s']:g} s"
                died = DeadlyClipError(
                    f"{span} ended the process of {self.stage} {ATTEMPTS} times; remove it"
                )
                row |= _failed(row, self.stage, died)
        good = [row for row in rows if not row["error"]]
        size = 1 if any(map(self._count, good)) else max(len(good), 1)
        for group in (good[start : start + size] for start in range(0, len(good), size)):
            for row in group:
                self._begin(row)
            work(group)
            with writing(self.folder):
                for row in group:
                    self._file(row).unlink(missing_ok=True)  # so does a worker that outlives its run

    def _begin(self, row: dict[str, Any]) -> None:
        with writing(self.folder):
            append(self._file(row), f"{os.getpid()}\n".encode())

    def _count(self, row: dict[str, Any]) -> int:
        file = self._file(row)
        return len(file.read_bytes().splitlines()) if file.exists() else 0

    def _file(self, row: dict[str, Any]) -> Place:
        return self.folder / f"{self.stage}-{row['sample_id']}"


def prior_extractor(vlm: VlmConfig, taxonomy: Taxonomy) -> "PriorExtractor":
    """The VLM of a configuration, loaded."""
    from prophy.priors.extractor import PriorExtractor

    return PriorExtractor(
        vlm.pretrained,
        taxonomy,
        vlm.revision,
        vlm.dtype,
        vlm.device_map,
        vlm.layers,
        vlm.max_new_tokens,
        vlm.heads,
    )


@told_by_the_first_call
class ExtractPriors:
    """`CLIPS_WITH_FRAMES` -> `PRIORS_OR_ERROR`: holds the VLM and asks it about the clips of a batch."""

    def __init__(self, vlm: VlmConfig, taxonomy: Taxonomy, attempts: Place) -> None:
        self.num_frames = vlm.num_frames
        self.names = taxonomy.names
        self.extractor = prior_extractor(vlm, taxonomy)
        self.attempts = Attempts(attempts, "ExtractPriors")

    def __call__(self, clips: pa.Table) -> pa.Table:
        """The priors of each clip."""
        rows = clips.to_pylist()
        with _enough_memory("VLM", len(rows), "cache.extract_batch_size"):
            self.attempts(rows, self._extract)
        return pa.Table.from_pylist(rows, PRIORS_OR_ERROR)

    def _extract(self, clips: list[dict[str, Any]]) -> None:
        from prophy.priors.extractor import Clip

        shown = [
            Clip(
                _frames(clip),
                (self.num_frames - 1) / (clip["end_s"] - clip["start_s"]),
                None if clip["labels"] is None else tuple(clip["labels"]),
            )
            for clip in clips
        ]
        for clip, priors in zip(clips, self.extractor(shown), strict=True):
            clip |= {
                "vlm_caption": priors.vlm_caption,
                "answers": [{"question": key, "answer": said} for key, said in priors.answers.items()],
                "unparsed": priors.unparsed,
                "phenomena": multi_hot(priors.phenomena, self.names),
                "map_phenomena": priors.map_phenomena,
                "maps": priors.maps.ravel(),
                "maps_shape": priors.maps.shape,
                "slice_times": [{"start_s": start, "end_s": end} for start, end in priors.slice_times],
            }


@told_by_the_first_call
class EncodeClip:
    """`CLIPS_WITH_FRAMES` -> `ENCODINGS_OR_ERROR`: holds the VAE and the text encoder of the backbone.

    Before its first clip it writes the text of the empty prompt beside the table, if it is not there.
    """

    def __init__(self, backbone: BackboneConfig, table: Table, attempts: Place) -> None:
        self.encoder = video_encoder(backbone)
        if not (table.folder / EMPTY_PROMPT).exists():
            empty = text_column(_row_of(self.encoder.encode_text([""]), 0))
            write_file(table.folder, pa.Table.from_pylist([empty]), table.footer, name=EMPTY_PROMPT)

        self.attempts = Attempts(attempts, "EncodeClip")

    def __call__(self, clips: pa.Table) -> pa.Table:
        """The latents and the encoded text, all clips of one shape at once."""
        rows = clips.to_pylist()
        with _enough_memory("VAE", len(rows), "cache.encode_batch_size"):
            self.attempts(rows, self._encode)
        return pa.Table.from_pylist(rows, ENCODINGS_OR_ERROR)

    def _encode(self, clips: list[dict[str, Any]]) -> None:
        groups = defaultdict(list)
        for clip in clips:
            groups[tuple(clip["frames_shape"])].append(clip)
        for group in groups.values():
            frames = np.stack([_frames(clip) for clip in group])
            latents = self.encoder.encode_video(frames)
            text = self.encoder.encode_text([clip["caption"] for clip in group])
            text |= self.encoder.encode_image(frames)
            for index, clip in enumerate(group):
                clip |= latents_columns(latents[index]) | text_column(_row_of(text, index))


@contextmanager
def _enough_memory(model: str, num_clips: int, key: str) -> Iterator[None]:
    """Turns what a batch without enough memory does to a block into one sentence."""
    from prophy.device import is_out_of_memory

    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        if num_clips > 1:
            wanted, change = f"{num_clips} clips at once", f"set {key} below {num_clips}"
        else:
            wanted, change = "1 clip", "take smaller shapes or a smaller model"
        raise ProPhyError(f"the {model} has not enough memory for {wanted}; {change}") from None


def _row_of(text: "dict[str, torch.Tensor]", index: int) -> "dict[str, torch.Tensor]":
    """One text of a batch."""
    return {name: value[index] for name, value in text.items()}


def _frames(clip: dict[str, Any]) -> np.ndarray:
    """The clip's frames, writable as torch wants them."""
    return np.frombuffer(bytearray(clip["frames"]), np.uint8).reshape(clip["frames_shape"])


def _failed(row: dict[str, Any], stage: str, error: Exception) -> dict[str, Any]:
    """The row with its error, as it goes into quarantine.

    A file that cannot be had is quarantined as `UNREADABLE`: once it can be, it is a version never tried.
    """
    uri, source, sample_id, message = row["source"]["uri"], row["source"], row.get("sample_id"), str(error)
    if isinstance(error, OSError):
        source, sample_id = {"uri": uri, **UNREADABLE}, None
        message = f"{uri} cannot be opened ({error.strerror or error})"
    return {
        "share": row.get("share", 1.0),
        "error": {
            "source": source,
            "sample_id": sample_id,
            "num_clips": row.get("num_clips"),
            "stage": stage,
            "error_type": type(error).__name__,
            "message": message,
            "attempts": ATTEMPTS if isinstance(error, DecoderError | DeadlyClipError) else 1,
        },
    }
