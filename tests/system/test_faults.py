"""Clips that kill processes, disks that are full, files that vanish: each for real."""

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pytest

from pipelines.caching import cache
from pipelines.caching.sources import clips_left, find_videos, videos_left
from pipelines.caching.stages import CLIPS, SOURCES, CutVideo, ReadClip
from pipelines.caching.tables import ATTEMPTS_FOLDER, file_names, read_quarantine, update_index
from pipelines.caching.verify import verify
from pipelines.config import Config, VideoLimits
from prophy.schema import INDEX
from prophy.video import write_video
from tests.caches import encodings_folder, priors_folder
from tests.conftest import tiny_config
from tests.disks import remount, small_disk
from tests.hostile import FPS, REFUSED, moving_square
from tests.pipelines.test_cli import CommandLine, in_folder
from tests.wisa import PHENOMENA, WISA

WORK = """
import json, os, signal, sys
from pathlib import Path
from pipelines.caching.stages import Attempts

rows = [
    {"sample_id": name, "error": None, "share": 1.0, "start_s": 0.0, "end_s": 2.0, "num_clips": 1,
     "source": {"uri": f"/videos/{name}.mp4", "size": 1, "modified": 1.0}}
    for name in "abc"
]

def work(group):
    for row in group:
        if row["sample_id"] == "b":
            os.kill(os.getpid(), signal.SIGSEGV)
        row["alone"] = len(group) == 1

Attempts(Path(sys.argv[1]), "EncodeClip")(rows, work)
print(json.dumps(rows))
"""


def test_the_clip_that_kills_is_told_from_those_beside_it(tmp_path: Path) -> None:
    (tmp_path / "attempts").mkdir()

    def attempt() -> subprocess.CompletedProcess:
        command = [sys.executable, "-c", WORK, str(tmp_path / "attempts")]
        return subprocess.run(command, capture_output=True, text=True, check=False)

    assert [attempt().returncode for _ in range(2)] == [-signal.SIGSEGV, -signal.SIGSEGV]
    third = attempt()
    assert third.returncode == 0, third.stderr
    a, b, c = json.loads(third.stdout)
    assert a["alone"] and c["alone"] and not a["error"] and not c["error"]
    assert b["error"] == {
        "source": b["source"],
        "sample_id": "b",
        "num_clips": 1,
        "stage": "EncodeClip",
        "error_type": "DeadlyClipError",
        "message": "/videos/b.mp4 from 0 to 2 s ended the process of EncodeClip 2 times; remove it",
        "attempts": 2,
    }
    assert [file.name for file in (tmp_path / "attempts").iterdir()] == ["EncodeClip-b"]


def cut(source: dict, **limits: float) -> list[dict]:
    row = {"source": source, "caption": None, "labels": None, "done": []}
    tables = CutVideo([2.0], VideoLimits(**limits))(pa.Table.from_pylist([row], SOURCES))
    return [row for table in tables for row in table.to_pylist()]


@pytest.fixture
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "a.mp4", moving_square(33), FPS)
    return tmp_path / "a.mp4"


def test_a_video_that_kills_its_decoder_is_an_error_row_of_two_attempts(video: Path) -> None:
    [source] = [video["source"] for video in find_videos(str(video.parent), PHENOMENA).videos.to_pylist()]
    [row] = cut(source, max_seconds=1e-4)
    assert (row["error"]["error_type"], row["error"]["attempts"]) == ("DecoderError", 2)
    clips = pa.Table.from_pylist(cut(source), CLIPS)
    rows = ReadClip([(2.0, 17)], [(64, 64)], [(64, 64)], VideoLimits(max_seconds=1e-4))(clips).to_pylist()
    assert {(row["error"]["error_type"], row["error"]["attempts"]) for row in rows} == {("DecoderError", 2)}
    assert [row["share"] for row in rows] == [0.5, 0.5]


def test_limits_of_the_configuration_reach_the_decoder(tmp_path: Path) -> None:
    write, message = REFUSED["forty streams"]
    write(tmp_path / "a.mkv")
    [source] = [video["source"] for video in find_videos(str(tmp_path), PHENOMENA).videos.to_pylist()]
    [row] = cut(source)
    assert message in row["error"]["message"]
    [row] = cut(source, max_streams=40)
    assert "less than one clip" in row["error"]["message"]


def test_a_file_that_vanishes_is_tried_again_when_it_is_back(video: Path) -> None:
    [source] = [video["source"] for video in find_videos(str(video.parent), PHENOMENA).videos.to_pylist()]
    clips = cut(source)
    content, status = video.read_bytes(), video.stat()
    video.unlink()
    missing = {"uri": str(video), "size": 0, "modified": 0.0}
    rows = ReadClip([(2.0, 17)], [(64, 64)], [(64, 64)], VideoLimits())(
        pa.Table.from_pylist(clips, CLIPS)
    ).to_pylist()
    for row in (*rows, *cut(source)):
        assert row["error"]["error_type"] == "FileNotFoundError"
        assert row["error"]["message"] == f"{video} cannot be opened (No such file or directory)"
        assert (row["error"]["source"], row["error"]["sample_id"]) == (missing, None)
    video.write_bytes(content)
    os.utime(video, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert [video["source"] for video in find_videos(str(video.parent), PHENOMENA).videos.to_pylist()] == [
        source
    ]


FILL = """
import resource, sys
from pathlib import Path
import numpy as np, pyarrow as pa
from pipelines.caching.tables import write_file
from prophy.errors import ProPhyError

write_file(Path(sys.argv[1]), pa.table({"x": np.zeros(100)}), {})
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_file(Path(sys.argv[1]), pa.table({"x": np.random.default_rng(0).random(10_000)}), {})
except ProPhyError as error:
    print(error)
"""


def test_a_full_disk_is_one_sentence_and_leaves_what_was_whole(tmp_path: Path) -> None:
    """A limit on the size of files stands for the end of the disk: the same failure of the same call."""
    folder = tmp_path / "cache" / "priors"
    folder.mkdir(parents=True)
    process = subprocess.run(
        [sys.executable, "-c", FILL, str(folder)], capture_output=True, text=True, check=True
    )
    assert process.stdout == (
        f"cannot write to {folder} (File too large); free it or choose another cache.output, then run the "
        f"same command again: what was written before is whole\n"
    )
    [whole] = folder.iterdir()
    assert hashlib.sha256(whole.read_bytes()).hexdigest() == whole.stem


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 1 MB."""
    with small_disk(tmp_path / "disk", 1 << 20) as folder:
        yield folder


@pytest.mark.slow
def test_a_disk_that_is_read_only_and_then_full(
    tiny_cache: Config,
    disk: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """12 encodings of 130 kB are to be written; the priors are there."""
    output = disk / "cache"
    shutil.copytree(Path(tiny_cache.cache.output, "priors"), output / "priors")
    options = (f"cache.input={tiny_cache.cache.input}", f"cache.output={output}", "cache.rows_per_file=1")
    prophy, command = CommandLine(monkeypatch, capsys), ["cache", *in_folder(tmp_path / "run", *options)]
    again = "then run the same command again: what was written before is whole"

    remount(disk, "ro")
    sentence = prophy.mistake(*command)
    assert f"cannot write to {output} (Read-only file system)" in sentence and again in sentence

    remount(disk, "rw")
    encodings = encodings_folder(tiny_config(tmp_path / "run", *options))
    sentence = prophy.mistake(*command)
    assert f"cannot write to {encodings} (No space left on device)" in sentence and again in sentence
    written = times(encodings)
    assert 1 <= len(written) < 12
    verify_command, index = ["cache", "verify", *command[1:]], output / "priors" / INDEX
    # Encodings have from 94 to 126 kB, in whatever order they come: what they leave free may be too little
    # for the indices, so the user frees some.
    remount(disk, "size=1100k")
    assert prophy(*verify_command)[0] == 0  # which clears away what was half written, and writes the indices
    fill(disk / "rest")
    assert prophy(*verify_command)[0] == 0
    before = index.read_bytes()
    index.write_bytes(before[::-1])
    fill(disk / "what a late writer of the failed run gave back")
    assert "(No space left on device)" in prophy.mistake(*verify_command)
    assert index.read_bytes() == before[::-1]
    index.unlink()
    fill(disk / "rest of the index")
    assert "(No space left on device)" in prophy.mistake(*verify_command)
    assert not index.exists() and verify(output) == []

    remount(disk, "size=20m")
    assert prophy(*command)[0] == 0
    assert written.items() <= times(encodings).items() and len(times(encodings)) == 12
    assert verify(output) == []


def fill(file: Path) -> None:
    """Leaves no byte of the disk."""
    with file.open("wb", buffering=0) as rest, pytest.raises(OSError, match="No space left"):
        while True:
            rest.write(bytes(4096))


def times(folder: Path) -> dict[str, int]:
    """The files of a table, and when they were written."""
    return {name: (folder / name).stat().st_mtime_ns for name in file_names(folder)}


# A process of its own: a thread of the driver may wait for it longer than a clip takes.
KILL_WHOEVER_BEGINS = """
import os, signal, sys, time
from pathlib import Path

marker, killed = Path(sys.argv[1]), 0
while True:
    pids = marker.read_text().splitlines() if marker.exists() else []
    for pid in map(int, pids[killed:]):
        os.kill(pid, signal.SIGSEGV)
        killed += 1
    time.sleep(0.001)
"""


@pytest.mark.slow
def test_a_deadly_clip_and_a_video_that_vanishes_do_not_end_the_run(
    ray_cluster: None, tmp_path: Path
) -> None:
    """The clip is given up for good, the video until it is back."""
    config = tiny_config(tmp_path / "run", "cache.rows_per_file=1")
    clips = Path(config.cache.input)
    clips.mkdir(parents=True)
    for number in range(4):
        write_video(clips / f"{number}.mp4", moving_square(17 + number), FPS)
    deadly = find_videos(str(clips), PHENOMENA).videos.to_pylist()[1]["source"]
    [row] = cut(deadly)
    marker = Path(config.cache.output, ATTEMPTS_FOLDER, f"ExtractPriors-{row['sample_id']}")
    priors, stop = priors_folder(config), threading.Event()

    def hide_the_last() -> None:
        while not (file_names(priors) or stop.is_set()):
            time.sleep(0.002)
        (clips / "3.mp4").rename(tmp_path / "hidden")

    hiding = threading.Thread(target=hide_the_last)
    hiding.start()
    with subprocess.Popen([sys.executable, "-c", KILL_WHOEVER_BEGINS, marker]) as killer:
        try:
            summary = cache.run(config)
        finally:
            killer.kill()
            stop.set()
            hiding.join()
    assert summary.num_encodings == 2
    quarantine = read_quarantine(Path(config.cache.output, "quarantine")).to_pylist()
    [gone] = [row for row in quarantine if row["error_type"] == "DeadlyClipError"]
    assert (gone["stage"], gone["attempts"], gone["source"]) == ("ExtractPriors", 2, deadly)
    missing = f"{clips / '3.mp4'} cannot be opened (No such file or directory)"
    assert sorted(summary.quarantined) == sorted([gone["message"], missing])
    assert verify(Path(config.cache.output)) == []

    (tmp_path / "hidden").rename(clips / "3.mp4")
    videos, refused = (
        find_videos(str(clips), PHENOMENA).videos,
        read_quarantine(Path(config.cache.output, "quarantine")),
    )
    index, encodings = map(update_index, (cache.priors_table(config, WISA), cache.encodings_table(config)))
    work = videos_left(videos, index, refused, [2.0]), clips_left(videos, index, encodings, refused)
    left = {row["source"]["uri"] for table in work for row in table.to_pylist()}
    assert left == {str(clips / "3.mp4")}  # it vanished from the one or the other
