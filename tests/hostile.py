"""Videos that nobody should have to read, made here: each as a file that a stranger could upload."""

from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np

from prophy.video import write_video

FPS = 8.0


def moving_square(num_frames: int, height: int = 64, width: int = 64) -> np.ndarray:
    """A white square that moves to the right on grey, dark in its upper left corner: uint8 `[T, H, W, 3]`."""
    frames = np.full((num_frames, height, width, 3), 128, np.uint8)
    frames[:, : height // 4, : width // 4] = 0
    for t, frame in enumerate(frames):
        frame[height // 2 : height // 2 + 8, t : t + 8] = 255
    return frames


def write_stream(
    path: Path,
    frames: np.ndarray,
    *,
    codec: str = "libx264",
    pixel_format: str = "yuv420p",
    times_ms: list[int] | None = None,
    rotation: int | None = None,
    options: dict[str, str] | None = None,
    container_options: dict[str, str] | None = None,
) -> None:
    """Frames with everything that `write_video` fixes left to choose."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=8, options=options or {})
        assert isinstance(stream, av.VideoStream)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixel_format
        if rotation is not None:
            stream.set_display_rotation(rotation)
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[number], Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def huge_frame(path: Path) -> None:
    """16000 x 16000 black and white: 32 MB in memory, 768 MB as RGB. FFmpeg's encoder allows no more."""
    with av.open(str(path), "w", format="mov") as container:
        stream = container.add_stream("png", rate=8)
        stream.height = stream.width = 16000
        stream.pix_fmt = "monob"
        frame = av.VideoFrame(16000, 16000, "monob")
        for plane in frame.planes:
            plane.update(bytes(plane.buffer_size))
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def million_frames(path: Path) -> None:
    """A million frames of 16 x 16: one encoded picture, muxed over and over."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("mpeg4", rate=1000)
        stream.height = stream.width = 16
        stream.pix_fmt = "yuv420p"
        [packet] = stream.encode(av.VideoFrame(16, 16, "yuv420p")) + stream.encode(None)
        content = bytes(packet)
        for number in range(1_000_000):
            copy = av.Packet(content)
            copy.stream, copy.time_base = stream, stream.codec_context.time_base
            copy.pts = copy.dts = number
            copy.is_keyframe = True
            container.mux(copy)


def many_streams(path: Path) -> None:
    """Forty video streams of two frames."""
    with av.open(str(path), "w", format="matroska") as container:
        streams = [container.add_stream("mpeg4", rate=8) for _ in range(40)]
        for stream in streams:
            stream.height = stream.width = 16
            stream.pix_fmt = "yuv420p"
        for _ in range(2):
            for stream in streams:
                container.mux(stream.encode(av.VideoFrame(16, 16, "yuv420p")))
        for stream in streams:
            container.mux(stream.encode(None))


def audio_only(path: Path) -> None:
    """Two seconds of silence."""
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("aac", rate=44100)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 88200), np.float32), format="fltp", layout="mono")
        frame.sample_rate, frame.pts = 44100, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))


def damaged(change: Callable[[bytes], bytes], **options: str) -> Callable[[Path], None]:
    """A good video of four seconds, then its bytes changed."""

    def write(path: Path) -> None:
        write_stream(path, moving_square(33), container_options=options)
        path.write_bytes(change(path.read_bytes()))

    return write


def cut_off_tail(content: bytes) -> bytes:
    """The index is at the front, the last third of the pictures is gone."""
    pictures = content.index(b"mdat")
    return content[: pictures + (len(content) - pictures) * 2 // 3]


def broken_timestamps(path: Path) -> None:
    """Half of the frames claim to be shown ten hours later."""
    write_stream(path, moving_square(33), times_ms=[125 * t + 36_000_000 * (t > 16) for t in range(33)])


PLAYLIST = b"#EXTM3U\n#EXT-X-TARGETDURATION:2\n#EXTINF:2,\nhttp://127.0.0.1:9/a.ts\n#EXT-X-ENDLIST\n"
CONCAT = b"ffconcat version 1.0\nfile /etc/passwd\n"

# What is refused: how it is made, and what the refusal says.
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    "one frame of 16k x 16k": (huge_frame, "its frame is 256,000,000 pixels (16000x16000), allowed are"),
    "a million frames": (
        million_frames,
        "is 500,001, allowed are 500,000 (cache.limits.max_frames)",
    ),
    "forty streams": (many_streams, "its number of streams is 40"),
    "audio only": (audio_only, "has no video stream"),
    "broken timestamps": (broken_timestamps, "its duration is 36,004.125 s, allowed are 3,600"),
    "no index": (damaged(lambda content: content[: content.index(b"moov") - 4]), "cannot be read as a video"),
    "truncated tail": (damaged(cut_off_tail, movflags="+faststart"), "was cut short"),
    "zero bytes": (lambda path: path.write_bytes(b""), "cannot be read as a video"),
    "HLS playlist": (lambda path: path.write_bytes(PLAYLIST), "cannot be read as a video"),
    "concat list": (lambda path: path.write_bytes(CONCAT), "cannot be read as a video"),
}


def variable_rate(path: Path) -> None:
    """From 20 frames per second to 5 and back, 33 frames in 4.1 seconds."""
    gaps = [50 if t % 2 else 200 for t in range(33)]
    write_stream(path, moving_square(34), times_ms=[0, *np.cumsum(gaps).tolist()])


def ten_bit(path: Path) -> None:
    """Ten bits per colour, 4:2:2."""
    write_stream(path, moving_square(33), pixel_format="yuv422p10le")


def rotated(path: Path) -> None:
    """Stored lying on its side, as telephones do, with the flag that turns it upright."""
    write_stream(path, np.rot90(moving_square(33, 96, 64), axes=(1, 2)), rotation=-90)


def index_last(path: Path) -> None:
    """The index at the end, as recorders write it."""
    write_stream(path, moving_square(33))
    content = path.read_bytes()
    assert content.index(b"mdat") < content.index(b"moov")


# What looks odd and is read as it should be: how it is made, height and width as shown.
ACCEPTED: dict[str, tuple[Callable[[Path], None], tuple[int, int]]] = {
    "variable frame rate": (variable_rate, (64, 64)),
    "ten bits": (ten_bit, (64, 64)),
    "rotation flag": (rotated, (96, 64)),
    "index at the end": (index_last, (64, 64)),
    "plain": (lambda path: write_video(path, moving_square(33), FPS), (64, 64)),
}
