"""Every frame at its moment, as ffmpeg itself shows it, in files of many kinds that ffmpeg writes here.

Each frame carries its number, in blocks of black and white. Compared are the pictures, with those that ffmpeg
decodes from the whole file.
"""

import itertools
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

FPS, NUM_FRAMES, HEIGHT, WIDTH = 25, 64, 48, 64
KEY_INTERVAL = 20  # frames from one key frame to the next
FIRST = 12  # packet with which a recording begins that has no key frame there
STARTS = [0, 11, 18, 19, 20, 38, 39, 41]  # frames with which clips begin: those around key frames, and others

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


def encode(outputs: dict[Path, str]) -> None:
    """The numbered frames in files, each as its options of ffmpeg say."""
    source = f"-f rawvideo -pix_fmt rgb24 -s {WIDTH}x{HEIGHT} -r {FPS} -i -".split()
    written = [["-threads", "1", *options.split(), str(path)] for path, options in outputs.items()]
    ffmpeg(*source, *itertools.chain(*written), content=numbered_frames().tobytes())


def shown(shapes: dict[Path, tuple[int, int]]) -> list[np.ndarray]:
    """All frames that ffmpeg shows of each file, in this height and width: float `[T, height, width, 3]`."""
    inputs, outputs = list[str](), list[str]()
    for number, (path, (height, width)) in enumerate(shapes.items()):
        scaled = f"-map {number}:V:0 -vsync passthrough -vf scale={width}:{height}:flags=bicubic"
        inputs += ["-i", str(path)]
        outputs += [*scaled.split(), *["-f", "rawvideo", "-pix_fmt", "rgb24"], f"{path}.rgb"]
    ffmpeg(*inputs, *outputs)
    return [
        np.fromfile(f"{path}.rgb", np.uint8).reshape(-1, *shape, 3).astype(float)
        for path, shape in shapes.items()
    ]


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
        suffix: the file's.
        options: with which ffmpeg encodes the numbered frames.
        change: what is done to the file afterwards.
        shape: height and width as shown.
        times: the moment of each frame that is shown, in frames since the first.
    """

    suffix: str
    options: str
    change: Change = lambda path: None
    shape: tuple[int, int] = (HEIGHT, WIDTH)
    times: Callable[[np.ndarray], np.ndarray] = lambda numbers: numbers


H264 = f"-c:v libx264 -pix_fmt yuv420p -crf 12 -bf 3 -g {KEY_INTERVAL}"
OPEN_GOP = f"-c:v libx264 -pix_fmt yuv420p -crf 12 -x264-params bframes=3:open-gop=1:keyint={KEY_INTERVAL}"
H265 = f"-c:v libx265 -pix_fmt yuv420p -crf 12 -x265-params log-level=none:keyint={KEY_INTERVAL}:bframes=4"
VP9 = f"-c:v libvpx-vp9 -pix_fmt yuv420p -b:v 2M -g {KEY_INTERVAL} -deadline realtime -cpu-used 8"
VP8 = f"-c:v libvpx -b:v 2M -g {KEY_INTERVAL} -auto-alt-ref 1 -lag-in-frames 10"
MPEG4 = f"-c:v mpeg4 -bf 2 -q:v 2 -g {KEY_INTERVAL}"
MPEG2 = f"-c:v mpeg2video -bf 2 -q:v 2 -g {KEY_INTERVAL}"
FRAGMENTED = "-movflags frag_keyframe+empty_moov"
PAUSES = f"-vf setpts=(N+6*floor(N/10)+0.1)/{FPS}/TB -vsync passthrough"  # six frames long, after each ten


def with_pauses(numbers: np.ndarray) -> np.ndarray:
    return numbers + 6 * (numbers // 10)


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
    "h264, open groups, in ts": Kind(".ts", OPEN_GOP),
    "h264 in mts": Kind(".mts", f"{H264} -mpegts_m2ts_mode 1"),
    "h264 in ts, its clock runs over": Kind(".ts", f"{H264} -output_ts_offset 95442"),
    "h264 in flv": Kind(".flv", H264),
    "h264 in asf": Kind(".asf", H264),
    "h264 in 3gp": Kind(".3gp", H264),
    "h265 in mp4": Kind(".mp4", H265),
    "h265 in mkv": Kind(".mkv", H265),
    "vp8 in webm": Kind(".webm", VP8),
    "vp8 in ogv": Kind(".ogv", VP8),
    "vp9 in webm": Kind(".webm", VP9),
    "theora in ogv": Kind(".ogv", f"-c:v libtheora -q:v 10 -g {KEY_INTERVAL}"),
    "mpeg4 in avi": Kind(".avi", MPEG4),
    "mpeg4 in mp4": Kind(".mp4", MPEG4),
    "mpeg4 out of avi": Kind(".avi", MPEG4, copied(".mp4")),
    "mpeg4 in asf": Kind(".asf", MPEG4),
    "mpeg2 in avi": Kind(".avi", MPEG2),
    "mpeg2 in mkv": Kind(".mkv", MPEG2),
    "mpeg2 in ts": Kind(".ts", MPEG2),
    "mpeg2 in vob": Kind(".vob", "-c:v mpeg2video -bf 2 -q:v 1 -g 8"),
    "mpeg2 in mxf": Kind(".mxf", MPEG2),
    "mpeg1 in mpg": Kind(".mpg", f"-c:v mpeg1video -bf 2 -q:v 2 -g {KEY_INTERVAL}"),
    "wmv2 in wmv": Kind(".wmv", f"-c:v wmv2 -q:v 2 -g {KEY_INTERVAL}"),
    "sorenson in flv": Kind(".flv", f"-c:v flv -q:v 2 -g {KEY_INTERVAL}"),
    "mjpeg in avi": Kind(".avi", "-c:v mjpeg -q:v 2 -pix_fmt yuvj420p"),
    "prores in mov": Kind(".mov", "-c:v prores"),
    "wide pixels": Kind(".mp4", f"{H264} -vf setsar=4/3", shape=(48, 85)),
    "narrow pixels in mkv": Kind(".mkv", f"{MPEG2} -vf setsar=8/9", shape=(48, 57)),
    "wide pixels, on end": Kind(".mp4", f"{H264} -vf setsar=4/3", with_matrix(0, 1, -1, 0), (85, 48)),
    "pauses in mp4": Kind(".mp4", f"{H264} {PAUSES}", times=with_pauses),
    "pauses in mkv": Kind(".mkv", f"{H264} {PAUSES}", times=with_pauses),
    "pauses in ts": Kind(".ts", f"{H264} {PAUSES}", times=with_pauses),
}
KINDS |= {
    f"shown by {a}, {b}, {c}, {d}": Kind(
        ".mp4", H264, with_matrix(a, b, c, d), (HEIGHT, WIDTH) if a else (WIDTH, HEIGHT)
    )
    for p, q in itertools.product((1, -1), (1, -1))
    for a, b, c, d in ((p, 0, 0, q), (0, p, q, 0))
}
LATE = {suffix: Kind(suffix, H264, begins_late) for suffix in (".mp4", ".mkv", ".mov", ".ts", ".flv")}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, np.ndarray]]:
    """A file of each kind that this ffmpeg can encode, and the frames that ffmpeg shows of it."""
    folder = tmp_path_factory.mktemp("files")
    known = ffmpeg("-encoders").decode().split()
    kinds = {
        name: kind
        for name, kind in {**KINDS, **LATE}.items()
        if kind.options.partition("-c:v ")[2].split()[0] in known
    }
    paths = {name: folder / f"{number}{kind.suffix}" for number, (name, kind) in enumerate(kinds.items())}
    encode({paths[name]: kind.options for name, kind in kinds.items()})
    for name, kind in kinds.items():
        kind.change(paths[name])
    expected = shown({paths[name]: kind.shape for name, kind in kinds.items()})
    return dict(zip(kinds, zip(paths.values(), expected, strict=True), strict=True))


def assert_frames(path: Path, expected: np.ndarray, times_s: np.ndarray, starts_s: np.ndarray) -> None:
    """Whether clips that start anywhere show what is expected at `times_s`."""
    for start_s in starts_s.tolist():
        moments = np.linspace(start_s, start_s + 0.4, 6)
        frames = read_frames(path, start_s, start_s + 0.4, 6, *expected.shape[1:3])
        for moment, frame in zip(moments, frames.astype(float), strict=True):
            differences = np.abs(expected - frame).mean((1, 2, 3))
            nearest = np.abs(times_s - moment)
            found = differences.argmin()
            assert nearest[found] <= nearest.min() + 1e-3, f"{moment:.2f} s shows frame {found}"
            assert differences[found] < 3


@pytest.mark.parametrize("name", KINDS)
def test_frames_are_those_that_ffmpeg_shows(files: dict[str, tuple[Path, np.ndarray]], name: str) -> None:
    if name not in files:
        pytest.skip(f"this ffmpeg cannot encode: {KINDS[name].options}")
    path, expected = files[name]
    times_s = KINDS[name].times(np.arange(len(expected))) / FPS
    info = probe(path)
    assert (info.height, info.width) == KINDS[name].shape
    assert info.num_frames == len(expected)
    assert info.duration_s == pytest.approx(times_s[-1] + 1 / FPS, abs=1.1 / FPS)
    starts_s = np.array(STARTS) / FPS
    assert_frames(path, expected, times_s, starts_s[starts_s <= times_s[-1] - 0.4])


def test_what_is_turned_by_no_quarter_is_refused(
    files: dict[str, tuple[Path, np.ndarray]], tmp_path: Path
) -> None:
    path = tmp_path / "a.mp4"
    shutil.copy(files["h264 in mp4"][0], path)
    with_matrix(1, 1, -1, 1)(path)
    with pytest.raises(VideoError, match=r"a\.mp4 is to be shown turned by no quarter of a circle"):
        probe(path)


@pytest.mark.parametrize("suffix", LATE)
def test_what_lies_before_the_first_key_frame_is_an_error_and_no_frozen_picture(
    files: dict[str, tuple[Path, np.ndarray]], suffix: str
) -> None:
    path, expected = files[suffix]
    assert len(expected) == NUM_FRAMES - KEY_INTERVAL
    with pytest.raises(VideoError, match=r"cannot be decoded at 0.00 s; the nearest frame that can is at"):
        read_frames(path, 0.0, 1.0, 17, HEIGHT, WIDTH)
    missing_s = probe(path).duration_s - len(expected) / FPS
    times_s = missing_s + np.arange(len(expected)) / FPS
    assert_frames(path, expected, times_s, np.arange(missing_s, times_s[-1] - 0.4, 0.31))


@pytest.mark.parametrize("suffix", [".wmv", ".mp4", ".ts"])
def test_sound_may_last_longer_but_what_was_cut_off_is_told(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a{suffix}"
    picture, sound = (["-f", "lavfi", "-i", source] for source in ("testsrc=s=64x48:r=25:d=2", "sine=d=4"))
    ffmpeg(*picture, *sound, *["-pix_fmt", "yuv420p", "-g", "20"], str(path))
    assert (probe(path).num_frames, probe(path).duration_s) == (50, pytest.approx(2.0, abs=0.05))
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 3])
    if suffix != ".mp4":  # no header promises anything, or FFmpeg does not believe it
        assert probe(path).duration_s < 1.5
    else:
        with pytest.raises(VideoError, match="was cut short|cannot be read as a video"):
            probe(path)


def test_pictures_without_times_are_refused(tmp_path: Path) -> None:
    """So small ones that a packet of the program stream, which has one time, holds many."""
    encode({tmp_path / "a.mpg": f"{H264} -f vob"})
    with pytest.raises(VideoError, match=r"a\.mpg has no times for \d+ of its packets; convert or remove it"):
        probe(tmp_path / "a.mpg")


def test_cover_art_is_not_the_video(files: dict[str, tuple[Path, np.ndarray]], tmp_path: Path) -> None:
    plain, expected = files["h264 in mp4"]
    path = tmp_path / "a.mp4"
    inputs = ["-f", "lavfi", "-i", "color=red:s=640x480:d=0.04", "-i", str(plain), "-map", "0", "-map", "1"]
    ffmpeg(*inputs, *["-c:v:0", "png", "-c:v:1", "copy", "-disposition:v:0", "attached_pic"], str(path))
    assert (probe(path).num_frames, probe(path).width) == (NUM_FRAMES, WIDTH)
    assert_frames(path, expected, np.arange(NUM_FRAMES) / FPS, np.array([0.0, 1.6]))


@pytest.mark.heavy
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

    woven = comb(shown({path: (64, 128)})[0][:10])
    assert woven > 5
    assert comb(read_frames(path, 0.0, 0.36, 10, 64, 128)) < woven / 4
