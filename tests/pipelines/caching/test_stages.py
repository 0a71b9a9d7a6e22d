"""The stages on real files, without Ray: real tiny models, real damage."""

import hashlib
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.caching.stages import (
    CLIPS,
    CLIPS_WITH_FRAMES,
    ENCODINGS_OR_ERROR,
    PRIORS_OR_ERROR,
    SOURCES,
    CutVideo,
    EncodeClip,
    ExtractPriors,
    ReadClip,
)
from pipelines.caching.tables import Table
from pipelines.config import Config, VideoLimits
from prophy.errors import ProPhyError
from prophy.priors.extractor import Clip
from prophy.sandbox import simulate_clip
from prophy.schema import EMPTY_PROMPT, ENCODINGS, PRIORS
from prophy.taxonomy import from_multi_hot
from prophy.video import read_frames, write_video
from tests.wisa import PHENOMENA, WISA


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five seconds: two clips of two seconds and a rest."""
    path = tmp_path_factory.mktemp("videos") / "a.mp4"
    write_video(path, simulate_clip(3, num_frames=40, fps=8, size=64).frames, 8)
    return path


def cut(path: Path, *, done: list[str] | None = None, **limits: int) -> list[dict]:
    source = {"uri": str(path), "size": 1, "modified": 1.0}
    row = {"source": source, "caption": "a ball", "labels": ["collision"], "done": done or []}
    tables = list(CutVideo([2.0], VideoLimits(**limits))(pa.Table.from_pylist([row], SOURCES)))
    assert all(table.schema.equals(CLIPS) and len(table) == 1 for table in tables)
    return [row for table in tables for row in table.to_pylist()]


def test_a_video_is_cut_into_clips(video: Path) -> None:
    first, second = cut(video)
    assert (first["start_s"], first["end_s"], second["start_s"], second["end_s"]) == (0, 2, 2, 4)
    assert (first["fps"], first["num_frames"], first["height"], first["width"]) == (8, 40, 64, 64)
    assert first["content_hash"] == hashlib.sha256(video.read_bytes()).hexdigest()
    assert (first["caption"], first["labels"], first["num_clips"], first["error"]) == (
        "a ball",
        ["collision"],
        2,
        None,
    )
    assert first["sample_id"] != second["sample_id"]
    assert (first["share"], second["share"]) == (0.5, 0.5)
    assert cut(video, done=[first["sample_id"]]) == [{**second, "share": 1.0}]
    assert cut(video)[0]["sample_id"] == first["sample_id"]


@pytest.mark.parametrize(
    ("limits", "message"),
    [({"max_pixels": 1000}, "over the limit"), ({"max_duration_s": 4}, "over the limit")],
)
def test_a_video_over_the_limits_is_an_error_row(video: Path, limits: dict, message: str) -> None:
    [row] = cut(video, **limits)
    assert row["sample_id"] is None
    error = row["error"]
    assert (error["stage"], error["error_type"], error["attempts"]) == ("CutVideo", "VideoError", 1)
    assert message in error["message"]
    assert error["source"]["uri"] == str(video)


def test_a_video_shorter_than_a_clip_is_an_error_row(tmp_path: Path) -> None:
    write_video(tmp_path / "short.mp4", np.zeros((12, 64, 64, 3), np.uint8), 8)
    [row] = cut(tmp_path / "short.mp4")
    assert "lasts 1.500 s, less than one clip of 2 s" in row["error"]["message"]


def test_clips_get_their_frames(video: Path) -> None:
    clips = pa.Table.from_pylist(cut(video), CLIPS)
    read = ReadClip([(2.0, 17)], [(32, 48)], [(32, 48)], VideoLimits())(clips)
    assert read.schema.equals(CLIPS_WITH_FRAMES)
    for row in read.to_pylist():
        frames = np.frombuffer(row["frames"], np.uint8).reshape(17, 32, 48, 3)
        expected = read_frames(video, row["start_s"], row["end_s"], 17, 32, 48, 48 / 32)
        assert np.array_equal(frames, expected)


def test_clips_take_the_nearest_shape_and_are_encoded_together(
    config: Config, video: Path, tmp_path: Path
) -> None:
    write_video(tmp_path / "wide.mp4", np.zeros((17, 48, 96, 3), np.uint8), 8)
    buckets = [(64, 64), (32, 64), (64, 32)]
    backbone = config.backbone.model_copy(update={"aspect_buckets": buckets})
    square, wide = cut(video)[0], cut(tmp_path / "wide.mp4")[0]
    read = ReadClip([(2.0, 17)], buckets, backbone.frame_shapes, VideoLimits())(
        pa.Table.from_pylist(
            [square, wide, {**square, "sample_id": "tall", "height": 90, "width": 60}], CLIPS
        )
    )
    assert [len(row["frames"]) // (17 * 3) for row in read.to_pylist()] == [64 * 64, 32 * 64, 64 * 32]
    table = Table(tmp_path / "encodings", ENCODINGS, {}, {})
    table.folder.mkdir(parents=True, exist_ok=True)
    encoded = EncodeClip(backbone, table, tmp_path)(read)
    assert encoded.schema.equals(ENCODINGS_OR_ERROR)
    shapes = [row["latents_shape"] for row in encoded.to_pylist()]
    assert shapes == [[16, 5, 16, 16], [16, 5, 8, 16], [16, 5, 16, 8]]
    assert (tmp_path / "encodings" / EMPTY_PROMPT).exists()


def test_a_clip_that_cannot_be_decoded_becomes_an_error_row_and_the_rest_goes_on(
    video: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.mp4"
    damaged.write_bytes(video.read_bytes())
    _, second = cut(damaged)
    damaged.write_bytes(video.read_bytes()[:200])
    good = cut(video)[0]
    [earlier] = cut(tmp_path / "missing.mp4")
    rows = ReadClip([(2.0, 17)], [(64, 64)], [(64, 64)], VideoLimits())(
        pa.Table.from_pylist([second, good, earlier], CLIPS)
    ).to_pylist()
    assert rows[0]["error"]["stage"] == "ReadClip"
    assert (rows[0]["error"]["sample_id"], rows[0]["error"]["num_clips"]) == (second["sample_id"], 2)
    assert rows[0]["frames"] is None
    assert rows[1]["error"] is None
    assert len(rows[1]["frames"]) == 17 * 64 * 64 * 3
    assert rows[2]["error"] == earlier["error"]
    assert rows[2]["error"]["stage"] == "CutVideo"


def test_priors_are_rows_of_the_table_with_given_labels_or_the_answers(
    config: Config, video: Path, tmp_path: Path
) -> None:
    vlm = config.vlm
    labelled, unlabelled = cut(video)
    [failed] = cut(video, max_pixels=10)
    clips = pa.Table.from_pylist([labelled, {**unlabelled, "labels": None}, failed], CLIPS)
    stage = ExtractPriors(vlm, WISA, tmp_path)
    shapes = vlm.frame_shapes
    rows = stage(ReadClip([(2.0, vlm.num_frames)], shapes, shapes, VideoLimits())(clips))
    assert rows.schema.equals(PRIORS_OR_ERROR)
    rows.slice(0, 2).select(PRIORS.names).cast(PRIORS)  # every column is there

    first, second, third = rows.to_pylist()
    assert third["error"] == failed["error"]
    assert from_multi_hot(first["phenomena"], PHENOMENA) == ("collision",)
    frames = read_frames(video, 0.0, 2.0, vlm.num_frames, vlm.height, vlm.width)
    [expected] = stage.extractor([Clip(frames, (vlm.num_frames - 1) / 2.0, ("collision",))])
    assert first["vlm_caption"] == expected.vlm_caption
    assert {row["question"]: row["answer"] for row in first["answers"]} == expected.answers
    assert first["map_phenomena"] == [PHENOMENA.index("collision")]
    assert first["maps_shape"] == [2, 4, 8, 8]
    maps = np.float32(first["maps"]).reshape(first["maps_shape"])
    np.testing.assert_allclose(maps, expected.maps, atol=1e-6)  # a batch rounds as a whole
    assert "presence" in [row["question"] for row in second["answers"]]
    assert len(second["map_phenomena"]) == second["maps_shape"][0] - 1 == sum(second["phenomena"])


def test_a_batch_without_enough_memory_names_the_key(
    config: Config, video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    vlm = config.vlm
    stage = ExtractPriors(vlm, WISA, tmp_path)
    shapes = vlm.frame_shapes
    clips = ReadClip([(2.0, vlm.num_frames)], shapes, shapes, VideoLimits())(
        pa.Table.from_pylist(cut(video), CLIPS)
    )

    def fail(*arguments: object) -> None:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(stage.extractor.vlm, "watch", fail)
    with pytest.raises(ProPhyError, match="memory for 2 clips at once; set cache.extract_batch_size below 2"):
        stage(clips)
    with pytest.raises(ProPhyError, match="memory for 1 clip; take smaller shapes or a smaller model"):
        stage(clips.slice(0, 1))
