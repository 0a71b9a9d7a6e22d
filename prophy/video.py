"""Video files: probe, cut into clips, read frames by time, write. Knows nothing of models or tables.

Times are seconds since the first frame of the file. Frames are picked by their timestamps, so that variable
frame rates are read right. A frame is always the whole picture, scaled: what is computed from one clip at two
resolutions covers the same picture, turned as its rotation flag says.

What is read may be hostile: only the containers of `SUFFIXES` are opened, only from local files. A file may
still crash or stall FFmpeg; `prophy.decoder` calls this module in a process that may die.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
from av.container import InputContainer
from av.video.reformatter import Interpolation
from av.video.stream import VideoStream

from prophy.errors import ProPhyError

SUFFIXES = (".mp4", ".m4v", ".mov", ".mkv", ".webm", ".avi")

# Demuxers of the suffixes above. Playlists and network protocols, which open other files, are not among them.
_OPEN_OPTIONS = {
    "format_whitelist": "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi",
    "protocol_whitelist": "file",
}


class VideoError(ProPhyError):
    """A video that cannot be used; the message names the file."""


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` measured, from the packets that are really there.

    Attributes:
        fps: mean frame rate, by timestamps.
        num_frames: number of frames.
        height: rows of a frame, as shown.
        width: columns of a frame, as shown.
    """

    fps: float
    num_frames: int
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        """How long the frames last; the last one counts as long as the mean."""
        return self.num_frames / self.fps


def probe(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_duration_s: float | None = None,
    max_streams: int | None = None,
) -> VideoInfo:
    """Measures a video; decodes its first frame alone, for the rotation.

    Args:
        path: a local file.
        max_bytes: limit of the file's size.
        max_pixels: limit of height times width.
        max_frames: limit of the number of frames.
        max_duration_s: limit of the duration.
        max_streams: limit of the number of streams: video, sound, subtitles and others.

    Raises:
        VideoError: not a video, cut short, fewer than two frames, or over a limit.
    """
    with _open(path) as (container, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        _check_limit(path, "size", container.size, max_bytes, "bytes")
        _check_limit(path, "number of streams", len(container.streams), max_streams)
        _check_limit(path, "frame", height * width, max_pixels, "pixels")
        unit, start = _clock(stream)
        spans = []
        for packet in _packets(container, stream):
            spans.append((packet.pts, packet.pts + packet.duration))
            _check_limit(path, "number of frames", len(spans), max_frames)
        declared_s = (stream.duration or 0) * unit
    times = [shown * unit - start for shown, _ in spans]
    if len(times) < 2:
        raise VideoError(f"{path} has {len(times)} readable frame(s); a clip needs at least 2")
    interval = (max(times) - min(times)) / (len(times) - 1)
    if interval <= 0:
        raise VideoError(f"{path} gives all of its {len(times)} frames one timestamp; write it anew")
    end_s = max(end for _, end in spans) * unit - start
    if declared_s > end_s + 1.5 * interval:
        raise VideoError(
            f"{path} ends after {end_s:.2f} s although its header promises {declared_s:.2f} s; "
            f"it was cut short, copy it anew"
        )
    _check_limit(path, "duration", len(times) * interval, max_duration_s, "s")
    if _lies_on_its_side(path):
        height, width = width, height
    return VideoInfo(1 / interval, len(times), height, width)


def clip_spans(duration_s: float, clip_durations_s: Iterable[float]) -> list[tuple[float, float]]:
    """Cuts a video into clips of the given lengths, as (start, end) in seconds.

    As many of the longest as there is room for; then of the next in what is left at the end. Less than the
    shortest is left out, so there is no clip of a shorter video.
    """
    spans, start = list[tuple[float, float]](), 0.0
    for length in sorted(clip_durations_s, reverse=True):
        count = math.floor((duration_s - start) / length + 1e-6)
        spans += [(start + index * length, start + (index + 1) * length) for index in range(count)]
        start += count * length
    return spans


def nearest_shape(height: int, width: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `shapes`, (height, width) each, whose aspect ratio a picture is squeezed least to."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1] * width / height)))


def read_frames(
    path: str | Path, start_s: float, end_s: float, num_frames: int, height: int, width: int
) -> np.ndarray:
    """Decodes the frames nearest to `num_frames` equally spaced moments, from `start_s` to `end_s` inclusive.

    Returns:
        RGB frames, uint8 `[num_frames, height, width, 3]`: the whole picture, scaled.

    Raises:
        VideoError: the file cannot be decoded up to `end_s`.
    """
    times = np.linspace(start_s, end_s, num_frames)
    with _open(path) as (container, stream):
        pictures: list[np.ndarray] = []
        last = None
        for frame in _nearest_frames(path, container, stream, times):
            # A slow source gives one frame several times; only small pictures are kept, never all frames.
            pictures.append(pictures[-1] if frame is last else _upright(frame, height, width))
            last = frame
    return np.stack(pictures)


def write_video(path: str | Path, frames: np.ndarray, fps: float, crf: int = 10) -> None:
    """Writes an mp4 that every player opens: h264, yuv420p, index at the front.

    Equal frames give equal bytes.

    Args:
        path: the file to write.
        frames: RGB, uint8 `[T, H, W, 3]`; H and W even, since colour is stored at half resolution.
        fps: frame rate.
        crf: quality of x264, lower is better; 10 keeps frames of 64 pixels clean.

    Raises:
        ProPhyError: odd height or width.
    """
    _, height, width, _ = frames.shape
    if height % 2 or width % 2:
        raise ProPhyError(f"cannot write {height}x{width} frames as yuv420p; choose an even height and width")
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=Fraction(fps).limit_denominator(1001))
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # On AVX-512 the macroblock tree reads memory that nobody wrote: bytes would differ by chance.
        stream.options = {"crf": str(crf), "mbtree": "0"}
        for frame in frames:
            container.mux(
                stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24"))
            )
        container.mux(stream.encode(None))


@contextmanager
def _open(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container and its first video stream; whatever FFmpeg refuses becomes a VideoError."""
    try:
        with av.open(str(path), options=_OPEN_OPTIONS) as container:
            if not container.streams.video:
                raise VideoError(f"{path} has no video stream; remove it")
            yield container, container.streams.video[0]
    except MemoryError:  # FFmpeg's is a FFmpegError too, but says nothing about the file
        raise
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be read as a video ({error.strerror}); convert or remove it"
        ) from None


def _clock(stream: VideoStream) -> tuple[float, float]:
    """Seconds per tick of the stream's timestamps, and the second at which it starts."""
    unit = float(stream.time_base or 0)
    return unit, (stream.start_time or 0) * unit


def _packets(container: InputContainer, stream: VideoStream) -> Iterator[Any]:
    """The packets of frames that are shown; a flush packet and what an edit list cuts off are not."""
    return (packet for packet in container.demux(stream) if packet.pts is not None and not packet.is_discard)


def _nearest_frames(
    path: str | Path, container: InputContainer, stream: VideoStream, times: np.ndarray
) -> Iterator[av.VideoFrame]:
    """The frame nearest to each of the ascending `times`, decoding from the key frame before the first."""
    unit, start = _clock(stream)
    container.seek(int((times[0] + start) / unit), stream=stream)
    timed = ((frame.pts * unit - start, frame) for frame in container.decode(stream) if frame.pts is not None)
    before = after = next(timed, None)
    for time in times:
        while after is not None and after[0] < time:
            before, after = after, next(timed, None)
        if before is None:
            raise VideoError(f"{path} has no readable frame at {time:.2f} s; convert or remove it")
        if after is None and time > before[0] + 1.5 * before[1].duration * unit + 1e-6:
            raise VideoError(f"{path} cannot be decoded up to {time:.2f} s; convert or remove it")
        yield min(before, after or before, key=lambda timed_frame: abs(timed_frame[0] - time))[1]


def _upright(frame: av.VideoFrame, height: int, width: int) -> np.ndarray:
    """The picture scaled to `[height, width, 3]`, turned as its rotation flag says."""
    turns = round(frame.rotation / 90)  # counterclockwise
    if turns % 2:
        height, width = width, height
    picture = frame.to_ndarray(
        width=width, height=height, format="rgb24", interpolation=Interpolation.BICUBIC
    )
    return np.rot90(picture, turns)


def _lies_on_its_side(path: str | Path) -> bool:
    """Whether a rotation flag swaps height and width; PyAV gives it with frames only."""
    with _open(path) as (container, stream):
        first = next(container.decode(stream), None)
    return first is not None and round(first.rotation / 90) % 2 == 1


def _check_limit(path: str | Path, what: str, value: float, limit: float | None, unit: str = "") -> None:
    if limit is not None and value > limit:
        measured = f"{value:g} {unit}".strip()
        raise VideoError(f"{path} is over the limit: its {what} is {measured}, allowed are {limit:g}")
