"""Hostile videos, and decoders that die of them."""

import os
import re
import signal
import threading
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from pipelines.config import VideoLimits
from prophy.decoder import Decoder, DecoderError
from prophy.video import VideoError, probe, read_frames, write_video
from tests.hostile import ACCEPTED, FPS, REFUSED, moving_square

PROBE_LIMITS = VideoLimits().model_dump(exclude={"max_seconds", "max_memory_bytes"})


@pytest.fixture
def decoder() -> Decoder:
    limits = VideoLimits()
    return Decoder(limits.max_memory_bytes, limits.max_seconds)


@pytest.mark.parametrize(
    "kind",
    [pytest.param(kind, marks=[pytest.mark.heavy] * (kind == "a million frames")) for kind in REFUSED],
)
def test_hostile_videos_are_refused_in_one_sentence(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    write, message = REFUSED[kind]
    path = tmp_path / "upload.mp4"
    write(path)
    with pytest.raises(VideoError) as refusal:
        decoder.probe(path, **PROBE_LIMITS)
    assert message in str(refusal.value)
    assert str(path) in str(refusal.value) and "\n" not in str(refusal.value)
    assert not isinstance(refusal.value, DecoderError)


@pytest.mark.parametrize("kind", ACCEPTED)
def test_odd_videos_are_read_as_they_are_shown(decoder: Decoder, tmp_path: Path, kind: str) -> None:
    write, (height, width) = ACCEPTED[kind]
    path = tmp_path / "upload.mp4"
    write(path)
    info = decoder.probe(path, **PROBE_LIMITS)
    assert (info.height, info.width) == (height, width)
    assert info.duration_s == pytest.approx(33 / FPS, rel=0.05)
    frames = decoder.read_frames(path, 0.0, 4.0, 17, height, width)
    assert np.abs(frames[0].astype(float) - moving_square(1, height, width)[0]).mean() < 3


def test_a_decoder_gives_what_its_module_gives(decoder: Decoder, tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_square(33), FPS)
    assert decoder.probe(tmp_path / "a.mp4") == probe(tmp_path / "a.mp4")
    expected = read_frames(tmp_path / "a.mp4", 1.0, 3.0, 9, 32, 48)
    assert np.array_equal(decoder.read_frames(tmp_path / "a.mp4", 1.0, 3.0, 9, 32, 48), expected)


@pytest.mark.heavy
def test_no_frame_is_lost_for_want_of_memory(tmp_path: Path) -> None:
    """Whatever is missing, a plane of a frame or the whole picture: all frames are read, or it is said."""
    levels = np.array([40, 120, 200], np.uint8)
    frames = np.broadcast_to(levels[:, None, None, None], (3, 2160, 3840, 3))
    write_video(tmp_path / "large.mp4", frames, FPS)
    write_video(tmp_path / "small.mp4", moving_square(17), FPS)
    before = children()
    decoder = Decoder(4_000_000_000, 60.0)
    decoder.read_frames(tmp_path / "small.mp4", 0.0, 2.0, 17, 64, 64)
    [child] = children() - before
    needed = child.memory_info().vms  # of the libraries, mostly
    decoder.close()
    refused = []
    for spare in range(10_000_000, 190_000_000, 12_000_000):
        decoder = Decoder(needed + spare, 60.0)
        try:
            read = decoder.read_frames(tmp_path / "large.mp4", 0.0, 2 / FPS, 3, 64, 64)
            assert np.abs(read.mean((1, 2, 3)) - levels).max() < 3
        except DecoderError as error:
            refused.append(spare)
            assert re.search(rf"large.mp4 needs more than {needed + spare:,} bytes .* 2 times", str(error))
        small = decoder.read_frames(tmp_path / "small.mp4", 0.0, 2.0, 17, 64, 64)
        assert small.shape == (17, 64, 64, 3)
        decoder.close()
    assert 3 < len(refused) < 15, "the limits tried reach from too little to enough"


def test_a_video_over_the_time_limit_is_given_up_after_two_attempts(tmp_path: Path) -> None:
    write_video(tmp_path / "a.mp4", moving_square(33), FPS)
    decoder = Decoder(4_000_000_000, 0.0001)
    with pytest.raises(DecoderError, match=r"a.mp4 takes the decoder longer than 0.0001 s .*, 2 times"):
        decoder.read_frames(tmp_path / "a.mp4", 0.0, 4.0, 33, 1080, 1920)


def children() -> set[psutil.Process]:
    return set(psutil.Process().children())


def test_a_crash_is_survived_once_and_given_up_twice(tmp_path: Path) -> None:
    """A signal from outside stands for a defect of FFmpeg: real death of a real process, in mid-call."""
    os.mkfifo(tmp_path / "a.mp4")  # opening it waits for a writer that never comes
    before = children()
    killed: list[psutil.Process] = []

    def kill() -> None:
        while len(killed) < 2:
            for child in children() - before - set(killed):
                if child.num_threads() and child.status() == psutil.STATUS_SLEEPING:
                    child.send_signal(signal.SIGSEGV)
                    killed.append(child)
            time.sleep(0.01)

    threading.Thread(target=kill, daemon=True).start()
    with pytest.raises(DecoderError, match=r"a.mp4 crashed the decoder \(SIGSEGV\), 2 times"):
        Decoder(4_000_000_000, 60.0).probe(tmp_path / "a.mp4")


def test_the_child_sees_no_environment_and_ends_with_its_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    before = children()
    write_video(tmp_path / "a.mp4", moving_square(17), FPS)
    decoder = Decoder(4_000_000_000, 60.0)
    decoder.probe(tmp_path / "a.mp4")
    [child] = children() - before
    assert "AWS_SECRET_ACCESS_KEY" not in child.environ()
    decoder.close()
    assert not child.is_running()
