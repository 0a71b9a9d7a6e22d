"""Video files: probe, cut into clips, read frames by time, write. Knows nothing of models or tables.

Times are seconds since the first frame of the file. Frames are picked by their timestamps, so that variable
frame rates are read right. A frame is the picture that is shown, upright and with square pixels, the whole or
its centre cut to an aspect ratio: what is computed from one clip at two resolutions covers the same picture.

What is read may be hostile: only the containers of `SUFFIXES` are opened, only from local files. A file may
still crash or stall FFmpeg; `prophy.decoder` calls this module in a process that may die.
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
from av.video.frame import VideoFrame
from av.video.reformatter import ColorPrimaries, ColorRange, Colorspace, ColorTrc

from prophy.errors import ProPhyError
from prophy.frames import SUFFIXES as SUFFIXES
from prophy.frames import (
    PacketTimes,
    TimedFrame,
    UnorderedError,
    ffmpeg_refusals,
    first_frame,
    frames_from,
    has_guessed_times,
    open_video,
)
from prophy.frames import VideoError as VideoError
from prophy.picture import PictureMaker, shown_size

FRAMES_VERSION = 2
"""Raise it when a file would give other frames or measures; caches made with another are not gone on with."""


WRITING_VERSION = 2
"""Raise it when the same frames would be written as another video; what names videos names it too."""


# A clock of milliseconds rounds the first moment, the last one, and how long the last frame is shown.
_ROUNDED_OFF_S = 0.0025


@dataclass(frozen=True)
class VideoInfo:
    """What `probe` measured, from the packets that are really there.

    Attributes:
        fps: mean frame rate: `num_frames` in `duration_s`.
        num_frames: number of frames.
        height: rows of a frame as it is shown: turned upright, with square pixels.
        width: columns of a frame as it is shown.
    """

    fps: float
    num_frames: int
    height: int
    width: int

    @property
    def duration_s(self) -> float:
        """From the first frame to the end of the last, which counts as long as the mean at most."""
        return self.num_frames / self.fps  # as whoever has only these two computes it


def probe(
    path: str | Path,
    *,
    max_bytes: int | None = None,
    max_pixels: int | None = None,
    max_frames: int | None = None,
    max_duration_s: float | None = None,
    max_streams: int | None = None,
) -> VideoInfo:
    """Measures a video; decodes its first frame alone, for how it is shown.

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
    with open_video(path) as (container, stream):
        height, width = stream.codec_context.height, stream.codec_context.width
        _check_limit(path, "size", container.size, "max_bytes", max_bytes, "bytes")
        _check_limit(path, "number of streams", len(container.streams), "max_streams", max_streams)
        _check_limit(path, "frame", height * width, "max_pixels", max_pixels, f"pixels ({width}x{height})")
        unit, start = float(stream.time_base or 0), stream.start_time
        start_s = (start or 0) * unit
        guessed = container.format.name == "avi"
        shown, num_timeless = list[tuple[int, int]](), 0
        for packet in container.demux(stream):
            stamp = packet.dts if guessed or packet.pts is None else packet.pts
            if stamp is not None and not packet.is_discard:  # what an edit list cuts off is not shown
                shown.append((stamp, packet.duration or 0))
            num_timeless += stamp is None and packet.size > 0
            _check_limit(path, "number of frames", len(shown) + num_timeless, "max_frames", max_frames)
        declared_s = (stream.duration or 0) * unit
    if num_timeless > len(shown):  # as many have none where each field of a frame is a packet
        raise VideoError(f"{path} has no times for {num_timeless} of its packets; convert or remove it")
    if len(shown) < 2:
        raise VideoError(f"{path} has {len(shown)} readable frame(s); a clip needs at least 2")
    (earliest, _), (latest, last_duration) = min(shown), max(shown)
    interval = (latest - earliest) / (len(shown) - 1)
    if interval <= 0:
        raise VideoError(f"{path} gives all of its {len(shown)} frames one timestamp; write it anew")
    end_s = (latest + min(last_duration or interval, interval)) * unit
    # A header promises all the time that a last frame is held.
    held_s = max(end_s, max(stamp + duration for stamp, duration in shown) * unit)
    missing_s = declared_s - (held_s - start_s)
    if missing_s > 1.5 * interval * unit and not _has_packets_after(path, held_s + missing_s / 2):
        raise VideoError(
            f"{path} ends after {held_s - start_s:.2f} s although its header promises {declared_s:.2f} s; "
            f"it was cut short, copy it anew"
        )
    duration_s = end_s - (earliest * unit if guessed or start is None else start_s)
    _check_limit(path, "duration", duration_s, "max_duration_s", max_duration_s, "s")
    with open_video(path) as (container, stream):
        frame = first_frame(container, stream)
        if frame is None:
            raise VideoError(f"{path} has no frame that can be decoded; convert or remove it")
        height, width = shown_size(path, frame, stream.sample_aspect_ratio)
    _check_limit(
        path, "frame", height * width, "max_pixels", max_pixels, f"pixels as shown ({width}x{height})"
    )
    return VideoInfo(len(shown) / duration_s, len(shown), height, width)


def clip_spans(duration_s: float, clip_durations_s: Iterable[float]) -> list[tuple[float, float]]:
    """Cuts a video into clips of the given lengths, as (start, end) in seconds.

    As many of the longest as there is room for; then of the next in what is left at the end. Less than the
    shortest is left out, so there is no clip of a shorter video. What a container's clock may round off is
    not missing.
    """
    spans, start, end = list[tuple[float, float]](), 0.0, duration_s + _ROUNDED_OFF_S
    for length in sorted(clip_durations_s, reverse=True):
        count = max(math.floor((end - start) / length), 0)
        spans += [(start + index * length, start + (index + 1) * length) for index in range(count)]
        start += count * length
    return spans


def nearest_shape(height: int, width: int, shapes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The one of `shapes`, (height, width) each, whose aspect ratio a picture is squeezed least to."""
    return min(shapes, key=lambda shape: abs(math.log(shape[0] / shape[1] * width / height)))


def read_frames(
    path: str | Path,
    start_s: float,
    end_s: float,
    num_frames: int,
    height: int,
    width: int,
    aspect_ratio: float | None = None,
) -> np.ndarray:
    """Decodes the frames nearest to `num_frames` equally spaced moments, from `start_s` to `end_s` inclusive.

    Args:
        path: a local file.
        start_s: the first moment.
        end_s: the last moment.
        num_frames: number of moments.
        height: rows of a frame.
        width: columns of a frame.
        aspect_ratio: width over height of the part at the centre of the picture that is scaled to the frame;
            None is the whole picture.

    Returns:
        RGB frames, uint8 `[num_frames, height, width, 3]`.

    Raises:
        VideoError: the frames near one of these moments cannot be decoded.
    """
    times = np.linspace(start_s, end_s, num_frames)
    with open_video(path) as (container, stream):
        by_decoding_time = has_guessed_times(container, stream)
        make_picture = PictureMaker(path, height, width, stream.sample_aspect_ratio, aspect_ratio)
    with ffmpeg_refusals(path):
        try:
            return _read_frames(path, times, make_picture, by_decoding_time=by_decoding_time)
        except UnorderedError:
            return _read_frames(path, times, make_picture, by_decoding_time=True)


def write_video(path: str | Path, frames: np.ndarray, fps: float, crf: int = 10) -> None:
    """Writes an mp4 that every player opens: h264, yuv420p, index at the front.

    Its colours are BT.709 in a screen's limited range, and it says so: players guess by the size of a frame
    where a file does not. Equal frames give equal bytes.

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
        stream.colorspace, stream.color_range = Colorspace.ITU709, ColorRange.MPEG
        stream.color_primaries, stream.color_trc = ColorPrimaries.BT709, ColorTrc.BT709
        for frame in frames:
            container.mux(stream.encode(_in_bt709(frame)))
        container.mux(stream.encode(None))


def _in_bt709(frame: np.ndarray) -> VideoFrame:
    """A picture of RGB as the encoder takes it."""
    picture = VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
    return picture.reformat(
        format="yuv420p",
        dst_colorspace=Colorspace.ITU709,
        dst_color_range=ColorRange.MPEG,
        dst_color_primaries=ColorPrimaries.BT709,
        dst_color_trc=ColorTrc.BT709,
    )


def _read_frames(
    path: str | Path, times: np.ndarray, make_picture: PictureMaker, *, by_decoding_time: bool
) -> np.ndarray:
    frames, packets = frames_from(path, float(times[0]), by_decoding_time=by_decoding_time)
    pictures: list[np.ndarray] = []
    last = None
    for frame in _nearest_frames(path, frames, packets, times):
        # A slow source gives one frame several times; only small pictures are kept, never all frames.
        pictures.append(pictures[-1] if frame is last else make_picture(frame))
        last = frame
    return np.stack(pictures)


def _nearest_frames(
    path: str | Path, frames: Iterator[TimedFrame], packets: PacketTimes, times: np.ndarray
) -> Iterator[VideoFrame]:
    """The frame nearest to each of the ascending `times`."""
    before = after = next(frames, None)
    for time in times.tolist():
        while after is not None and after[0] < time:
            before, after = after, next(frames, None)
        if before is None:
            raise VideoError(f"{path} has no readable frame at {time:.2f} s; convert or remove it")
        shown_s, frame = min(before, after or before, key=lambda timed: abs(timed[0] - time))
        tolerance_s = 1.5 * packets.interval_s + 1e-6
        if after is None and time - shown_s > max(tolerance_s, 1.5 * _duration(frame)) + _ROUNDED_OFF_S:
            raise VideoError(f"{path} cannot be decoded up to {time:.2f} s; convert or remove it")
        wanted_s = min(packets.seconds, key=lambda packet_s: abs(packet_s - time))
        if abs(shown_s - time) > abs(wanted_s - time) + tolerance_s:
            raise VideoError(
                f"{path} cannot be decoded at {time:.2f} s; the nearest frame that can is at {shown_s:.2f} s"
            )
        yield frame


def _has_packets_after(path: str | Path, time_s: float) -> bool:
    """Whether an ASF file goes on, with its sound: what its header promises is the duration of the whole."""
    with open_video(path) as (container, _):
        return container.format.name == "asf" and any(
            (packet.pts or 0) * packet.time_base > time_s for packet in container.demux()
        )


def _duration(frame: VideoFrame) -> float:
    return float(frame.duration * (frame.time_base or 0))


def _check_limit(
    path: str | Path, what: str, value: float, setting: str, limit: float | None, unit: str = ""
) -> None:
    if limit is not None and value > limit:
        measured = f"{value:,.10g} {unit}".strip()
        raise VideoError(
            f"{path} is over the limit: its {what} is {measured}, allowed are {limit:,.10g} "
            f"(cache.limits.{setting})"
        )
