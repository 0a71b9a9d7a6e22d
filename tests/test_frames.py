"""Every frame at its moment, as ffmpeg itself shows it: in files of many kinds that ffmpeg writes here.

Each frame carries its number, in blocks of black and white; compared are the pictures, with those that ffmpeg
decodes from the whole file.
"""

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import av
import numpy as np
import pytest

from prophy.video import VideoError, probe, read_frames

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")

FPS, NUM_FRAMES, HEIGHT, WIDTH = 25, 100, 48, 64


def numbered_frames() -> np.ndarray:
    """Frame `n` shows the bits of `n` as 8 blocks, under a red corner that no mirroring leaves in place."""
    frames = np.full((NUM_FRAMES, HEIGHT, WIDTH, 3), 90, np.uint8)
    frames[:, :16, :16] = (220, 30, 30)
    for number, frame in enumerate(frames):
        for bit in range(8):
            top, left = 16 + 16 * (bit // 4), 16 * (bit % 4)
            frame[top : top + 16, left : left + 16] = 235 if number >> bit & 1 else 20
    return frames


def ffmpeg(*arguments: str, content: bytes | None = None) -> bytes:
    command = ["ffmpeg", "-v", "error", "-y", *arguments]
    return subprocess.run(command, input=content, check=True, capture_output=True).stdout


def encode(path: Path, options: str) -> None:
    """The numbered frames in a file, as `options` of ffmpeg say."""
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()
    ffmpeg(*source, *options.split(), str(path), content=numbered_frames().tobytes())


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        suffix: of the file.
        options: with which ffmpeg encodes the numbered frames.
        change: what is done to the file afterwards.
        times_s: when ffmpeg's k-th frame is shown.
        shape: height and width as shown.
    """

    suffix: str
    options: str
    change: Callable[[Path], None] = lambda path: None
    times_s: np.ndarray = field(default_factory=lambda: np.arange(NUM_FRAMES) / FPS)
    shape: tuple[int, int] = (HEIGHT, WIDTH)


def copied(suffix: str, options: str = "") -> Callable[[Path], None]:
    """The packets go into another container, and back into a file of the old name."""

    def change(path: Path) -> None:
        other = path.with_name(f"copied{suffix}")
        ffmpeg("-i", str(path), "-c", "copy", *options.split(), str(other))
        other.replace(path)

    return change


def with_matrix(*matrix: int) -> Callable[[Path], None]:
    """An mp4 with the display matrix `a, b, c, d`."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        a, b, c, d = (number << 16 for number in matrix)
        place = content.index(b"tkhd") + 4 + 40
        content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)

    return change


def without_first_packets(count: int) -> Callable[[Path], None]:
    """The recording begins `count` packets later, between two key frames."""

    def change(path: Path) -> None:
        other = path.with_name(f"later{path.suffix}")
        with av.open(str(path)) as old, av.open(str(other), "w") as new:
            stream = old.streams.video[0]
            copy = new.add_stream_from_template(stream)
            for number, packet in enumerate(old.demux(stream)):
                if packet.dts is not None and number >= count:
                    packet.stream = copy
                    new.mux(packet)
        other.replace(path)

    return change


H264 = "-c:v libx264 -pix_fmt yuv420p -crf 12 -bf 3 -g 30"
H265 = "-c:v libx265 -pix_fmt yuv420p -crf 12 -g 30 -x265-params log-level=none"
VP9 = "-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 2M -g 30 -deadline realtime -cpu-used 8"
MPEG4 = "-c:v mpeg4 -bf 2 -q:v 2 -g 30"
VARIABLE = "-vf setpts='(N+floor(N/10)*7)/25/TB' -fps_mode passthrough"

KINDS = {
    "h264 mp4": Kind(".mp4", H264),
    "h264 mp4, fragmented": Kind(".mp4", f"{H264} -movflags frag_keyframe+empty_moov"),
    "h264 mp4, no edit list": Kind(".mp4", f"{H264} -use_editlist 0"),
}
