"""The frames of a video file, each with the moment at which it is shown.

Most containers give each packet the moment at which its frame is shown (pts). AVI gives only the order of
decoding (dts), and what FFmpeg guesses from it runs to and fro around B-frames; the same guesses stand in
files that were copied out of an AVI. There a frame is shown when the packet is decoded that lets it go, and
the first frame at zero.

Frames are pictures that were decoded from a key frame on. What a decoder makes of packets without one, a grey
or frozen picture, is left out.
"""

import itertools
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import av
from av.container import InputContainer
from av.filter import Graph
from av.filter.context import FilterContext
from av.packet import Packet
from av.stream import Disposition
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from prophy.errors import ProPhyError

_SUFFIXES = {
    "mov,mp4,m4a,3gp,3g2,mj2": (".mp4", ".m4v", ".mov", ".qt", ".3gp", ".3g2", ".f4v"),
    "matroska,webm": (".mkv", ".webm"),
    "avi": (".avi", ".divx"),
    "mpegts": (".ts", ".mts", ".m2ts", ".m2t"),
    "mpeg": (".mpg", ".mpeg", ".vob"),
    "asf": (".wmv", ".asf"),
    "flv": (".flv",),
    "ogg": (".ogv",),
    "mxf": (".mxf",),
}
SUFFIXES = tuple(suffix for suffixes in _SUFFIXES.values() for suffix in suffixes)
"""Endings of the names of videos. What else FFmpeg reads is no container of times, or opens other files."""

# Demuxers of the suffixes above. Playlists and network protocols, which open other files, are not among them.
_OPEN_OPTIONS = {"format_whitelist": ",".join(_SUFFIXES), "protocol_whitelist": "file"}
_READ_THROUGH = ("mpeg",)  # demuxers whose times are wrong after a seek: most packets have none of their own
_MOST_BYTES_OF_A_PIXEL = 8
_MOST_COMPARED = 64  # packets from the beginning of a file; B-frames come every few
_DEFAULT_TRACK = 5_000_000  # pixels that FFmpeg counts a track as larger for being the default one

TimedFrame = tuple[float, VideoFrame]
"""A frame and its moment, in seconds since the video begins."""


class VideoError(ProPhyError):
    """A video that cannot be used; the message names the file."""


class UnorderedError(VideoError):
    """Frames whose presentation times are missing, or go back: only the order of decoding can be trusted."""


class Layout(NamedTuple):
    """What a filter must know of the frames that it is given."""

    width: int
    height: int
    pixel_format: str
    colorspace: int
    color_range: int

    @classmethod
    def of(cls, frame: VideoFrame) -> "Layout":
        """That of a frame."""
        return cls(frame.width, frame.height, frame.format.name, frame.colorspace, frame.color_range)


class PacketTimes:
    """The moments at which a file wants frames shown, decodable or not, as far as it was read.

    Attributes:
        seconds: the moment of each packet, in the order of the file.
    """

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self._earliest, self._latest = math.inf, -math.inf

    @property
    def interval_s(self) -> float:
        """The mean time from one to the next."""
        return (self._latest - self._earliest) / max(len(self.seconds) - 1, 1)

    def add(self, packet_s: float) -> None:
        """Notes the moment of another packet."""
        self.seconds.append(packet_s)
        self._earliest, self._latest = min(self._earliest, packet_s), max(self._latest, packet_s)


@contextmanager
def ffmpeg_refusals(path: str | Path) -> Iterator[None]:
    """Turns whatever FFmpeg refuses about a file into a VideoError."""
    try:
        yield
    except MemoryError:  # FFmpeg's is a FFmpegError too, but says nothing about the file
        raise
    except av.FFmpegError as error:
        raise VideoError(
            f"{path} cannot be read as a video ({error.strerror}); convert or remove it"
        ) from None


@contextmanager
def open_video(path: str | Path) -> Iterator[tuple[InputContainer, VideoStream]]:
    """The container, and the video stream that FFmpeg would show: never cover art.

    Raises:
        VideoError: no such stream, or whatever else FFmpeg refuses.
    """
    with ffmpeg_refusals(path), av.open(str(path), options=_OPEN_OPTIONS) as container:
        streams = [
            stream for stream in container.streams.video if not stream.disposition & Disposition.attached_pic
        ]
        if not streams:
            raise VideoError(f"{path} has no video stream; remove it")
        yield container, max(streams, key=_prominence)


def has_guessed_times(container: InputContainer, stream: VideoStream) -> bool:
    """Whether presentation times are FFmpeg's guesses: in AVI, and where they are copied out of one.

    A copy says that frames are shown in the order of decoding, and its decoder gives them in another. Reads
    the file on from where it stands, no further than the first packet that is shown later than decoded.
    """
    if container.format.name == "avi":
        return True
    last = None
    for packet, frames in itertools.islice(_decoded(container.demux(stream)), _MOST_COMPARED):
        if packet.pts != packet.dts or not stream.codec_context.reorder_depth:
            return False
        for frame in frames:
            if last is not None and frame.pts is not None and frame.pts < last:
                return True
            last = frame.pts
    return False


def frames_from(
    path: str | Path, time_s: float, *, by_decoding_time: bool
) -> tuple[Iterator[TimedFrame], PacketTimes]:
    """All frames from the last key frame before `time_s` on, or from the first that can be decoded.

    A seek may land too late: on a key frame that is shown after the moment asked for, or whose first
    followers need what lies before it. It is then repeated from earlier, in the end from the beginning.

    Args:
        path: a local file.
        time_s: since the video begins.
        by_decoding_time: trust no presentation time.

    Returns:
        The frames, and the packets read so far: at any time those of all frames that were taken.

    Raises:
        UnorderedError: presentation times go back, or are missing.
        VideoError: the file cannot be read.
    """
    start_s = _first_decoding_time(path) if by_decoding_time else _first_presentation_time(path)
    for earlier_s in itertools.chain([0.0], (0.5 * 2**n for n in itertools.count())):
        seek_s = time_s - earlier_s if earlier_s < time_s else None
        packets = PacketTimes()
        frames = _decode_from(path, seek_s, start_s, packets, by_decoding_time=by_decoding_time)
        first = next(frames, None)
        if seek_s is None or (first is not None and first[0] <= time_s + 1e-6):
            return deinterlaced(itertools.chain([first] if first else [], frames)), packets
    raise AssertionError("the last attempt is without a seek")


def first_frame(container: InputContainer, stream: VideoStream) -> VideoFrame | None:
    """The first frame that can be decoded, if any; reads the file on from where it stands."""
    return next((frame for _, frames in _decoded(container.demux(stream)) for frame in frames), None)


def deinterlaced(frames: Iterator[TimedFrame]) -> Iterator[TimedFrame]:
    """Frames that are flagged as interlaced become whole pictures (bwdif); others stay as they are."""
    graph: Graph | None = None
    layout = None
    waiting: list[float] = []  # moments of the frames that the filter holds
    for time_s, frame in frames:
        if graph is None and not frame.interlaced_frame:
            yield time_s, frame
            continue
        if graph is None or layout != Layout.of(frame):
            yield from _flushed(graph, waiting)
            layout = Layout.of(frame)
            graph = _bwdif(layout)
        waiting.append(time_s)
        graph.vpush(frame)
        yield from _pulled(graph, waiting)
    yield from _flushed(graph, waiting)


def _prominence(stream: VideoStream) -> int:
    is_default = bool(stream.disposition & Disposition.default)
    return stream.width * stream.height + _DEFAULT_TRACK * is_default


def _decode_from(
    path: str | Path, seek_s: float | None, start_s: float, times: PacketTimes, *, by_decoding_time: bool
) -> Iterator[TimedFrame]:
    """Frames from about `seek_s` on, none where the container cannot seek there; None is the beginning.

    `start_s` is the time, by the stream's clock, at which the first frame is shown.
    """
    with open_video(path) as (container, stream):
        unit = float(stream.time_base or 0)
        packets = container.demux(stream)
        if seek_s is not None:
            target = int((seek_s + start_s) / unit)
            if container.format.name in _READ_THROUGH:
                packets = _from_key_frame(packets, target)
            else:
                try:
                    container.seek(target, stream=stream)
                except av.FFmpegError:  # no key frame before it
                    return
        last: int | None = None
        for packet, frames in _decoded(packets):
            stamp = packet.dts if by_decoding_time else packet.pts
            if stamp is not None and not packet.is_discard:
                times.add(stamp * unit - start_s)
            for frame in frames:
                stamp = frame.dts if by_decoding_time else frame.pts
                if stamp is None and by_decoding_time:  # a decoder that is emptied at the end names no packet
                    stamp = 0 if last is None else last + max(frame.duration, 1)
                if stamp is None or (last is not None and stamp < last):
                    after_s = (last or 0) * unit - start_s
                    raise UnorderedError(f"{path} goes back in time after {after_s:.2f} s; write it anew")
                last = stamp
                yield stamp * unit - start_s, frame


def _from_key_frame(packets: Iterator[Packet], stamp: int) -> Iterator[Packet]:
    """Packets from the last key frame on that is shown no later than `stamp`."""
    kept = list[Packet]()
    for packet in packets:
        if packet.is_keyframe and packet.pts is not None and packet.pts <= stamp:
            kept.clear()
        kept.append(packet)
        if packet.dts is not None and packet.dts > stamp:
            break
    yield from kept
    yield from packets


def _first_presentation_time(path: str | Path) -> float:
    """The second, by the stream's clock, at which the first packet is shown; ASF does not say it."""
    with open_video(path) as (container, stream):
        start = stream.start_time
        if start is None:
            stamps = (packet.pts for packet in itertools.islice(container.demux(stream), _MOST_COMPARED))
            start = min((stamp for stamp in stamps if stamp is not None), default=0)
        return float(start * (stream.time_base or 0))


def _first_decoding_time(path: str | Path) -> float:
    """The second, by decoding times, at which the first frame would be shown, were it decodable.

    A decoder that reorders frames lets the first go when it was given some more. That much later than its
    packet's decoding time is every frame shown.
    """
    first = key = None
    with open_video(path) as (container, stream):
        for packet, frames in _decoded(container.demux(stream)):
            first = packet.dts if first is None else first
            key = packet.dts if key is None and packet.is_keyframe else key
            if frames:
                delay = (frames[0].dts or 0) - (key or 0) if frames[0].dts is not None else 0
                return float(((first or 0) + delay) * (stream.time_base or 0))
        return float((first or 0) * (stream.time_base or 0))


def _decoded(packets: Iterable[Packet]) -> Iterator[tuple[Packet, list[VideoFrame]]]:
    """Each packet, and the frames that the decoder lets go when given it.

    There are none before the first key frame, nor for a packet that the decoder refuses.

    Raises:
        MemoryError: a packet was refused for want of memory.
    """
    has_begun = False
    for packet in packets:
        has_begun = has_begun or packet.is_keyframe
        frames: list[VideoFrame] = []
        if has_begun:
            try:
                frames = packet.decode()
            except MemoryError:
                raise
            except av.FFmpegError:
                _check_memory(packet)
        yield packet, frames


def _check_memory(packet: Packet) -> None:
    """A decoder calls a packet invalid too where there is no room for its frame."""
    context = packet.stream.codec_context
    bytes(_MOST_BYTES_OF_A_PIXEL * context.width * context.height)  # raises; gives back at once what it takes


def _bwdif(layout: Layout) -> Graph:
    """A filter that gives one picture for each frame, two fields of which are interlaced."""
    graph = Graph()
    graph.link_nodes(
        source_of(graph, layout),
        graph.add("bwdif", "mode=send_frame:deint=interlaced"),
        graph.add("buffersink"),
    ).configure()
    return graph


def source_of(graph: Graph, layout: Layout) -> FilterContext:
    """The place where frames of a layout enter a graph."""
    return graph.add(
        "buffer",
        video_size=f"{layout.width}x{layout.height}",
        pix_fmt=layout.pixel_format,
        time_base="1/1000",  # nothing goes by the filter's clock
        pixel_aspect="1/1",
        colorspace=str(layout.colorspace),
        range=str(layout.color_range),
    )


def _pulled(graph: Graph, waiting: list[float]) -> Iterator[TimedFrame]:
    while waiting:
        try:
            frame = graph.vpull()
        except (av.BlockingIOError, av.EOFError):
            return
        yield waiting.pop(0), frame


def _flushed(graph: Graph | None, waiting: list[float]) -> Iterator[TimedFrame]:
    if graph is not None:
        graph.vpush(None)
        yield from _pulled(graph, waiting)
