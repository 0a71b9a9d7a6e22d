"""Every frame at its moment, as ffmpeg itself shows it, in files of many kinds that ffmpeg writes here.

Each frame carries its number, in blocks of black and white. Compared are the pictures, with those that ffmpeg
decodes from the whole file.
"""

import shutil
import struct
import subprocess
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import av
import numpy as np
import pytest

from prophy.video import VideoError, probe, read_frames

pytestmark = pytest.mark.skipif(shutil.which("ffmpeg") is None, reason="ffmpeg is not installed")

FPS, NUM_FRAMES, HEIGHT, WIDTH = 25, 100, 48, 64
FIRST = 12  # packet with which a recording begins that has no key frame there
KEY_INTERVAL = 30  # frames from one key frame to the next

Change = Callable[[Path], None]


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


def shown(path: Path, height: int, width: int) -> np.ndarray:
    """All frames that ffmpeg shows, scaled: float `[T, height, width, 3]`."""
    options = f"-vsync passthrough -vf scale={width}:{height}:flags=bicubic -f rawvideo -pix_fmt rgb24 -"
    pixels = ffmpeg("-i", str(path), *options.split())
    return np.frombuffer(pixels, np.uint8).reshape(-1, height, width, 3).astype(float)


def copied(suffix: str, options: str = "") -> Change:
    """The packets go into another container, whatever the name says then."""

    def change(path: Path) -> None:
        other = path.with_name(f"copied{suffix}")
        ffmpeg(*options.split(), "-i", str(path), "-c", "copy", str(other))
        other.replace(path)

    return change


def with_matrix(*matrix: int) -> Change:
    """An mp4 with the display matrix `a, b, c, d`."""

    def change(path: Path) -> None:
        content = bytearray(path.read_bytes())
        a, b, c, d = (number << 16 for number in matrix)
        place = content.index(b"tkhd") + 4 + 40
        content[place : place + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
        path.write_bytes(content)

    return change


def begins_late(path: Path) -> None:
    """Takes away the packets before `FIRST`."""
    other = path.with_name(f"late{path.suffix}")
    with av.open(str(path)) as old, av.open(str(other), "w") as new:
        stream = old.streams.video[0]
        copy = new.add_stream_from_template(stream)
        for number, packet in enumerate(old.demux(stream)):
            if packet.dts is not None and number >= FIRST:
                packet.stream = copy
                new.mux(packet)
    other.replace(path)


@dataclass(frozen=True)
class Kind:
    """A kind of file.

    Attributes:
        suffix: of the file.
        options: with which ffmpeg encodes the numbered frames.
        change: what is done to the file afterwards.
        shape: height and width as shown.
    """

    suffix: str
    options: str
    change: Change = lambda path: None
    shape: tuple[int, int] = (HEIGHT, WIDTH)


H264 = f"-c:v libx264 -pix_fmt yuv420p -crf 12 -bf 3 -g {KEY_INTERVAL}"
OPEN_GOP = "-c:v libx264 -pix_fmt yuv420p -crf 12 -x264-params bframes=3:open-gop=1:keyint=20"
H265 = "-c:v libx265 -pix_fmt yuv420p -crf 12 -x265-params log-level=none:keyint=20:bframes=4"
VP9 = f"-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 2M -g {KEY_INTERVAL} -deadline realtime -cpu-used 8"
MPEG4 = "-c:v mpeg4 -bf 2 -q:v 2 -g 30"
MPEG2 = "-c:v mpeg2video -bf 2 -q:v 2 -g 15"
FRAGMENTED = "-movflags frag_keyframe+empty_moov"

KINDS = {
    "h264 in mp4": Kind(".mp4", H264),
    "h264 in mp4, fragmented": Kind(".mp4", f"{H264} {FRAGMENTED}"),
    "h264 in mp4, no edit list": Kind(".mp4", f"{H264} -use_editlist 0"),
    "h264 in mp4, an edit list that cuts": Kind(".mp4", H264, copied(".mp4", "-ss 0.5")),
    "h264 in mov": Kind(".mov", H264),
    "h264 in mkv": Kind(".mkv", H264),
    "h264 in mkv, no index": Kind(".mkv", f"{H264} -live 1"),
    "h264 in avi": Kind(".avi", H264),
    "h264 out of avi": Kind(".avi", H264, copied(".mp4")),
    "h264, open groups": Kind(".mp4", OPEN_GOP),
    "h264, open groups, fragmented": Kind(".mp4", f"{OPEN_GOP} {FRAGMENTED}"),
    "h264, open groups, in avi": Kind(".avi", OPEN_GOP),
    "h265 in mp4": Kind(".mp4", H265),
    "h265 in mkv": Kind(".mkv", H265),
    "vp8 in webm": Kind(".webm", "-c:v libvpx -b:v 2M -g 30 -auto-alt-ref 1 -lag-in-frames 10"),
    "vp9 in webm": Kind(".webm", VP9),
    "mpeg4 in avi": Kind(".avi", MPEG4),
    "mpeg4 in mp4": Kind(".mp4", MPEG4),
    "mpeg4 out of avi": Kind(".avi", MPEG4, copied(".mp4")),
    "mpeg2 in avi": Kind(".avi", MPEG2),
    "mpeg2 in mkv": Kind(".mkv", MPEG2),
    "mjpeg in avi": Kind(".avi", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
    "prores in mov": Kind(".mov", "-c:v prores"),
    "wide pixels": Kind(".mp4", f"{H264} -vf setsar=4/3", shape=(48, 85)),
    "narrow pixels in mkv": Kind(".mkv", f"{MPEG2} -vf setsar=8/9", shape=(48, 57)),
    "wide pixels, on end": Kind(".mp4", f"{H264} -vf setsar=4/3", with_matrix(0, 1, -1, 0), (85, 48)),
}


def write(path: Path, kind: Kind) -> None:
    try:
        encode(path, kind.options)
    except subprocess.CalledProcessError as error:
        if b"Unknown encoder" in error.stderr:
            pytest.skip(f"this ffmpeg cannot encode: {kind.options}")
        raise
    kind.change(path)


def assert_frames(path: Path, expected: np.ndarray, times_s: np.ndarray, starts_s: np.ndarray) -> None:
    """Whether clips that start anywhere show what is expected at `times_s`."""
    for start_s in starts_s.tolist():
        moments = np.linspace(start_s, start_s + 0.4, 6)
        frames = read_frames(path, start_s, start_s + 0.4, 6, *expected.shape[1:3])
        for moment, frame in zip(moments, frames.astype(float), strict=True):
            differences = np.abs(expected - frame).mean((1, 2, 3))
            nearest = np.abs(times_s - moment)
            found = differences.argmin()
            assert nearest[found] <= nearest.min() + 1e-6, f"{moment:.2f} s shows frame {found}"
            assert differences[found] < 3


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_ffmpeg_shows(tmp_path: Path, name: str) -> None:
    kind = KINDS[name]
    path = tmp_path / f"a{kind.suffix}"
    write(path, kind)
    info = probe(path)
    expected = shown(path, *kind.shape)
    assert (info.height, info.width) == kind.shape
    assert info.num_frames == len(expected)
    assert info.duration_s == pytest.approx(len(expected) / FPS, abs=1.1 / FPS)
    starts_s = np.arange(0, len(expected) - 11, 7) / FPS
    assert_frames(path, expected, np.arange(len(expected)) / FPS, starts_s)


@pytest.mark.parametrize("suffix", [".mp4", ".mkv"])
def test_a_variable_rate_is_read_by_time(tmp_path: Path, suffix: str) -> None:
    """A pause of six frames after each ten."""
    path = tmp_path / f"a{suffix}"
    encode(path, f"{H264} -vf setpts=(N+6*floor(N/10)+0.1)/{FPS}/TB -vsync passthrough")
    times_s = (np.arange(NUM_FRAMES) + 6 * (np.arange(NUM_FRAMES) // 10)) / FPS
    assert probe(path).duration_s == pytest.approx(times_s[-1] + 1 / FPS, abs=1 / FPS)
    assert_frames(path, shown(path, HEIGHT, WIDTH), times_s, np.arange(0, times_s[-1] - 0.4, 0.27))


@pytest.mark.parametrize("matrix", [(a, 0, 0, d) for a in (1, -1) for d in (1, -1)])
@pytest.mark.parametrize("transposed", [False, True])
def test_pictures_are_upright_and_not_mirrored(
    tmp_path: Path, matrix: tuple[int, int, int, int], transposed: bool
) -> None:
    a, _, _, d = matrix
    path = tmp_path / "a.mp4"
    write(path, Kind(".mp4", H264, with_matrix(*((0, a, d, 0) if transposed else matrix))))
    info = probe(path)
    assert (info.height, info.width) == ((WIDTH, HEIGHT) if transposed else (HEIGHT, WIDTH))
    expected = shown(path, info.height, info.width)
    assert_frames(path, expected, np.arange(NUM_FRAMES) / FPS, np.array([1.0]))


def test_what_is_turned_by_no_quarter_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "a.mp4", Kind(".mp4", H264, with_matrix(1, 1, -1, 1)))
    with pytest.raises(VideoError, match=r"a\.mp4 is to be shown turned by no quarter of a circle"):
        probe(tmp_path / "a.mp4")


@pytest.mark.parametrize("suffix", [".mp4", ".mkv", ".mov"])
def test_what_lies_before_the_first_key_frame_is_an_error_and_no_frozen_picture(
    tmp_path: Path, suffix: str
) -> None:
    path = tmp_path / f"a{suffix}"
    write(path, Kind(suffix, H264, begins_late))
    expected = shown(path, HEIGHT, WIDTH)
    assert len(expected) == NUM_FRAMES - KEY_INTERVAL
    with pytest.raises(VideoError, match=r"cannot be decoded at 0.00 s; the nearest frame that can is at"):
        read_frames(path, 0.0, 1.0, 17, HEIGHT, WIDTH)
    missing_s = probe(path).duration_s - len(expected) / FPS
    times_s = missing_s + np.arange(len(expected)) / FPS
    assert_frames(path, expected, times_s, np.arange(missing_s, times_s[-1] - 0.4, 0.31))


def test_cover_art_is_not_the_video(tmp_path: Path) -> None:
    cover, path = tmp_path / "cover.png", tmp_path / "a.mp4"
    encode(tmp_path / "plain.mp4", H264)
    ffmpeg("-f", "lavfi", "-i", "color=red:s=640x480", "-frames:v", "1", str(cover))
    inputs = ["-i", str(cover), "-i", str(tmp_path / "plain.mp4"), "-map", "0", "-map", "1"]
    ffmpeg(*inputs, "-c", "copy", "-disposition:v:0", "attached_pic", str(path))
    assert (probe(path).num_frames, probe(path).width) == (NUM_FRAMES, WIDTH)
    expected = shown(tmp_path / "plain.mp4", HEIGHT, WIDTH)
    assert_frames(path, expected, np.arange(NUM_FRAMES) / FPS, np.array([0.0, 2.0]))


@pytest.mark.parametrize("transfer", ["smpte2084", "arib-std-b67"])
def test_high_dynamic_range_is_mapped_to_a_screen(tmp_path: Path, transfer: str) -> None:
    """A grey ramp stays grey and rising, dark stays dark, and full signal is nearly white."""
    path = tmp_path / "a.mp4"
    ramp = "nullsrc=s=256x64:r=10:d=1,format=yuv420p10le,geq=lum='64+X*876/255':cb=512:cr=512"
    tags = f"-color_trc {transfer} -color_primaries bt2020 -colorspace bt2020nc"
    ffmpeg("-f", "lavfi", "-i", ramp, *f"-c:v ffv1 {tags} -f matroska".split(), str(path))
    [first, *_] = read_frames(path, 0.0, 0.5, 6, 64, 256).astype(int)
    row = first[32]
    assert np.ptp(row, axis=-1).max() <= 2
    assert (np.diff(row[:, 0]) >= -1).all()
    # The bare signal is a line; a screen shows its middle darker (PQ) or less bright (HLG).
    assert row[8, 0] < 10 and row[128, 0] < 128 and row[255, 0] > 230


def test_interlaced_fields_become_whole_pictures(tmp_path: Path) -> None:
    """A bar that moves 8 pixels from field to field leaves a comb where the fields are woven."""
    path = tmp_path / "a.mkv"
    bar = "nullsrc=s=128x64:r=50:d=1,format=yuv420p,geq=lum='if(between(X-8*N,0,24),235,16)':cb=128:cr=128"
    ffmpeg(
        "-f",
        "lavfi",
        "-i",
        bar,
        *["-vf", "tinterlace=4", "-c:v", "mpeg2video", "-flags", "+ilme+ildct", "-q:v", "1"],
        str(path),
    )

    def comb(frames: np.ndarray) -> float:
        light = frames[..., 1].astype(float)
        return float(np.abs(light[:, 1:-1] * 2 - light[:, :-2] - light[:, 2:]).mean())

    woven = comb(shown(path, 64, 128)[:10])
    assert woven > 5
    assert comb(read_frames(path, 0.0, 0.36, 10, 64, 128)) < woven / 4
