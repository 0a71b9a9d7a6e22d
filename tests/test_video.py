"""Real files, written and damaged here."""

import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from prophy.errors import ProPhyError
from prophy.video import VideoError, clip_spans, nearest_shape, probe, read_frames, write_video

FPS = 8.0


def counting_frames(num_frames: int, size: int = 64) -> np.ndarray:
    """Frame `t` has brightness `6 t` and a red bar at column `t`."""
    frames = np.empty((num_frames, size, size, 3), np.uint8)
    for t, frame in enumerate(frames):
        frame[:] = 6 * t
        frame[:, t : t + 8] = (255, 60, 20)
    return frames


def number_of(frames: np.ndarray) -> list[int]:
    """Which of the counting frames each frame is."""
    return np.rint(frames[:, 40, -8].astype(float).mean(-1) / 6).astype(int).tolist()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("video") / "a.mp4"
    write_video(path, counting_frames(34), FPS)
    return path


def test_a_written_video_is_playable_and_keeps_its_pictures(video: Path) -> None:
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
    content = video.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")  # the index comes first: players start at once
    frames = read_frames(video, 0.0, 33 / FPS, 34, 64, 64)
    assert np.abs(frames.astype(float) - counting_frames(34)).mean() < 3


@pytest.mark.parametrize(("height", "width"), [(64, 64), (720, 1280)])
def test_a_written_video_says_which_colours_its_numbers_are(tmp_path: Path, height: int, width: int) -> None:
    """BT.709 in limited range, whatever the size: players guess another matrix from 720 rows on."""
    path, red = tmp_path / "red.mp4", np.array([220, 30, 60], np.uint8)
    write_video(path, np.broadcast_to(red, (2, height, width, 3)), FPS)
    with av.open(str(path)) as container:
        context = container.streams.video[0].codec_context
        tags = context.colorspace, context.color_primaries, context.color_trc, context.color_range
        assert tags == (1, 1, 1, 1)
        frame = next(container.decode(video=0))
        luma, blue, red_difference = (int(np.asarray(plane)[0]) for plane in frame.planes)
    exact = 0.2126 * 220 + 0.7152 * 30 + 0.0722 * 60
    assert luma == pytest.approx(16 + 219 / 255 * exact, abs=1)
    assert blue == pytest.approx(128 + 224 / 255 * (60 - exact) / 1.8556, abs=1)
    assert red_difference == pytest.approx(128 + 224 / 255 * (220 - exact) / 1.5748, abs=1)
    assert np.abs(read_frames(path, 0.0, 1 / FPS, 2, height, width).astype(int) - red).max() <= 2


def test_equal_frames_give_equal_bytes_whatever_lies_in_memory(tmp_path: Path) -> None:
    t, y, x = np.mgrid[:5, :32, :32]
    picture = np.stack([5 * x + 9 * t, 6 * y + 3 * t, x * y // 4], axis=-1) % 256
    noise = np.random.default_rng(0).integers(0, 20, picture.shape)
    np.save(tmp_path / "frames.npy", (picture + noise).clip(0, 255).astype(np.uint8))
    code = (
        "import sys, numpy; from prophy.video import write_video;"
        "write_video(sys.argv[2], numpy.load(sys.argv[1]), 8)"
    )
    written = []
    for filling in ("0", "77", "165"):  # glibc fills what it hands out with this byte
        path = tmp_path / f"{filling}.mp4"
        command = [sys.executable, "-c", code, str(tmp_path / "frames.npy"), str(path)]
        subprocess.run(command, check=True, env=os.environ | {"MALLOC_PERTURB_": filling})
        written.append(path.read_bytes())
    assert written[0] == written[1] == written[2]


def test_probe_measures(video: Path) -> None:
    info = probe(video)
    assert (info.fps, info.num_frames, info.height, info.width) == (FPS, 34, 64, 64)
    assert info.duration_s == 34 / FPS


def test_clips_have_one_length_and_leave_the_rest_out() -> None:
    assert clip_spans(4.25, [2.0]) == [(0.0, 2.0), (2.0, 4.0)]
    assert clip_spans(59 / 29.5, [2.0]) == [(0.0, 2.0)]
    assert clip_spans(1.9, [2.0]) == []
    assert clip_spans(2.0 - 1e-9, [2.0, 0.5, 0.25]) == [(0.0, 2.0)]
    assert clip_spans(5.75, [0.5, 2.0, 1.0]) == [(0.0, 2.0), (2.0, 4.0), (4.0, 5.0), (5.0, 5.5)]


@pytest.mark.parametrize("suffix", [".mkv", ".flv"])
@pytest.mark.parametrize("fps", [24, 60])
def test_a_clock_of_milliseconds_takes_no_clip_away(tmp_path: Path, suffix: str, fps: int) -> None:
    path = tmp_path / f"a{suffix}"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=fps, width=64, height=64)
        blank = av.VideoFrame.from_ndarray(np.zeros((64, 64, 3), np.uint8), format="rgb24")
        for _ in range(fps):
            container.mux(stream.encode(blank))
        container.mux(stream.encode(None))
    duration_s = probe(path).duration_s
    assert duration_s < 1.0
    assert clip_spans(duration_s, [1.0]) == [(0.0, 1.0)]
    assert len(read_frames(path, 0.0, 1.0, 5, 64, 64)) == 5


def test_the_nearest_shape_is_the_one_with_the_nearest_aspect_ratio() -> None:
    shapes = [(480, 832), (832, 480), (640, 640)]
    assert nearest_shape(1080, 1920, shapes) == (480, 832)
    assert nearest_shape(1920, 1080, shapes) == (832, 480)
    assert nearest_shape(90, 100, shapes) == nearest_shape(100, 90, shapes) == (640, 640)


@pytest.mark.parametrize(
    ("start_s", "end_s", "expected"),
    [
        (0.0, 2.0, list(range(17))),
        (2.0, 4.0, list(range(16, 33))),  # from within the file: seeking must land right
        (0.0, 4.0, list(range(0, 33, 2))),
        (0.0, 1.0, [t // 2 for t in range(17)]),  # slower than sampled: the nearest frame, several times
    ],
)
def test_frames_are_those_of_their_moments(
    video: Path, start_s: float, end_s: float, expected: list[int]
) -> None:
    found = number_of(read_frames(video, start_s, end_s, 17, 64, 64))
    assert found == expected


def write_moments(path: Path, times_ms: Sequence[int], last_ms: int) -> None:
    """The counting frames, each shown at its moment, and the last for `last_ms`."""
    options = {"crf": "10", "bf": "0"}
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=30, width=64, height=64, options=options)
        stream.codec_context.time_base = Fraction(1, 1000)
        packets = list[av.Packet]()
        for time_ms, pixels in zip(times_ms, counting_frames(len(times_ms)), strict=True):
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts, frame.time_base = time_ms, Fraction(1, 1000)
            packets += stream.encode(frame)
        packets += stream.encode(None)
        packets[-1].duration = int(last_ms / (1000 * packets[-1].time_base))
        for packet in packets:
            container.mux(packet)


def test_variable_frame_rates_are_read_by_time(tmp_path: Path) -> None:
    path = tmp_path / "variable.mp4"
    times_ms = np.cumsum([0, *(50 if t % 2 else 200 for t in range(33))])
    write_moments(path, times_ms.tolist(), 50)
    nearest = [int(np.abs(times_ms - 1000 * time).argmin()) for time in np.linspace(0.11, 4.01, 14)]
    assert number_of(read_frames(path, 0.11, 4.01, 14, 64, 64)) == nearest


@pytest.mark.parametrize("last_ms", [100, 1000, 3000])
def test_a_last_frame_that_is_held_counts_as_long_as_the_others(tmp_path: Path, last_ms: int) -> None:
    write_moments(tmp_path / "a.mp4", range(0, 1000, 40), last_ms)
    assert probe(tmp_path / "a.mp4").duration_s == pytest.approx(1.0)
    (tmp_path / "cut.mp4").write_bytes(_cut((tmp_path / "a.mp4").read_bytes()))
    with pytest.raises(VideoError, match=f"promises {0.96 + last_ms / 1000:.2f} s; it was cut short"):
        probe(tmp_path / "cut.mp4")


def test_the_rate_is_the_number_of_frames_in_the_duration(tmp_path: Path) -> None:
    """So that the same clips are in a video for whoever knows the rate, and for whoever measures it."""
    write_moments(tmp_path / "a.mp4", range(0, 1000, 40), 1)
    info = probe(tmp_path / "a.mp4")
    assert (info.num_frames, info.duration_s) == (25, pytest.approx(0.961))
    assert info.fps == pytest.approx(25 / 0.961)


def test_scales_the_whole_picture(tmp_path: Path) -> None:
    frames = np.zeros((4, 48, 96, 3), np.uint8)
    frames[:, :, 48:] = 255
    write_video(tmp_path / "wide.mp4", frames, FPS)
    read = read_frames(tmp_path / "wide.mp4", 0.0, 3 / FPS, 4, 32, 32)
    assert read.shape == (4, 32, 32, 3)
    assert read[:, :, :14].max() < 20 and read[:, :, 18:].min() > 235


def _cut(content: bytes) -> bytes:
    return content[: len(content) * 2 // 3]


def _index_last_and_lost(content: bytes) -> bytes:
    return content[: content.index(b"moov") + 40]


BROKEN: dict[str, tuple[Callable[[bytes], bytes], str]] = {
    "empty": (lambda content: b"", "cannot be read as a video"),
    "text": (lambda content: b"not a video\n" * 100, "cannot be read as a video"),
    "playlist": (
        lambda content: b"#EXTM3U\n#EXTINF:2,\na.mp4\n#EXT-X-ENDLIST\n",
        "cannot be read as a video",
    ),
    "cut short": (_cut, "cut short"),
    "no index": (_index_last_and_lost, "a.mp4"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_what_is_no_video_is_refused_in_one_sentence(video: Path, tmp_path: Path, kind: str) -> None:
    damage, message = BROKEN[kind]
    (tmp_path / "a.mp4").write_bytes(damage(video.read_bytes()))
    with pytest.raises(VideoError, match=message) as refusal:
        probe(tmp_path / "a.mp4")
    assert "\n" not in str(refusal.value)
    with pytest.raises(VideoError):
        read_frames(tmp_path / "a.mp4", 0.0, 4.0, 17, 64, 64)


def test_a_single_frame_is_no_clip(tmp_path: Path) -> None:
    write_video(tmp_path / "one.mp4", counting_frames(1), FPS)
    with pytest.raises(VideoError, match=r"one.mp4 has 1 readable frame"):
        probe(tmp_path / "one.mp4")


def test_missing_file_and_missing_end(video: Path) -> None:
    with pytest.raises(VideoError, match="No such file"):
        probe(video.with_name("none.mp4"))
    with pytest.raises(VideoError, match=r"cannot be decoded up to"):
        read_frames(video, 3.0, 5.0, 17, 64, 64)


@pytest.mark.parametrize(
    ("limit", "what"), [("max_bytes", "size"), ("max_pixels", "frame"), ("max_duration_s", "duration")]
)
def test_limits(video: Path, limit: str, what: str) -> None:
    with pytest.raises(VideoError, match=f"over the limit: its {what}"):
        probe(video, **{limit: 3})
    assert probe(video, max_bytes=10**6, max_pixels=64 * 64, max_duration_s=5.0).num_frames == 34


def test_odd_sizes_cannot_be_written(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="33x64"):
        write_video(tmp_path / "odd.mp4", np.zeros((2, 33, 64, 3), np.uint8), FPS)
