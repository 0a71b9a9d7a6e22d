"""Clips on disk, and pictures of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from prophy.sandbox import contact_sheet, read_truth, simulate_clip, write_dataset
from prophy.video import probe

SHAPE: dict[str, Any] = {"num_frames": 17, "fps": 8.0, "size": 64}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("clips"), num_clips=5, seed=3, **SHAPE)


def test_round_trip(manifest: Path) -> None:
    seeds = pq.read_table(manifest)["seed"].to_pylist()
    truths = read_truth(manifest)
    assert len(truths) == 5
    for seed, truth in zip(seeds, truths, strict=True):
        clip = simulate_clip(seed, **SHAPE)
        for name in ("caption", "captions", "phenomena", "parts", "constants", "fps", "pixels_per_m"):
            assert getattr(truth, name) == getattr(clip, name)
        assert truth.masks.keys() == clip.masks.keys()
        for phenomenon, mask in clip.masks.items():
            np.testing.assert_array_equal(truth.masks[phenomenon], mask)
        for ours, theirs in zip(truth.tracks, clip.tracks, strict=True):
            assert ours.name == theirs.name
            np.testing.assert_array_equal(ours.position_m, theirs.position_m)
        assert truth.frames.shape == clip.frames.shape
        luma = (truth.frames.astype(float) - clip.frames) @ [0.299, 0.587, 0.114]
        assert 10 * np.log10(255**2 / (luma**2).mean()) > 40  # h264 stores colour at half resolution


def test_files_are_videos_relative_to_the_manifest(manifest: Path) -> None:
    rows = pq.read_table(manifest).to_pylist()
    for row in rows:
        info = probe(manifest.parent / row["path"])
        assert (info.num_frames, info.height, info.width) == (17, 64, 64)
        assert info.fps == pytest.approx(8.0)
    assert {row["split"] for row in rows} == {"train"}


def test_same_seed_same_files_and_other_seeds_other_clips(manifest: Path, tmp_path: Path) -> None:
    again = write_dataset(tmp_path / "again", num_clips=5, seed=3, **SHAPE)
    other = write_dataset(tmp_path / "other", num_clips=5, seed=4, **SHAPE, split="held_out")
    for row, same, new in zip(*(pq.read_table(m).to_pylist() for m in (manifest, again, other)), strict=True):
        assert row == same
        video = (manifest.parent / row["path"]).read_bytes()
        assert video == (again.parent / same["path"]).read_bytes()
        assert row["seed"] != new["seed"]
        assert video != (other.parent / new["path"]).read_bytes()


def test_contact_sheet_shows_frames_captions_and_outlines(manifest: Path) -> None:
    truths = read_truth(manifest)
    outlined = np.asarray(contact_sheet(truths, columns=4, scale=2))
    plain = np.asarray(contact_sheet(truths, columns=4, scale=2, outlines=False))
    row_height = outlined.shape[0] // 5
    assert outlined.shape == plain.shape == (5 * row_height, 4 * 2 * 64, 3)
    assert row_height > 2 * 64
    for index, truth in enumerate(truths):
        shown = plain[index * row_height :][row_height - 128 : row_height, :128]
        np.testing.assert_array_equal(shown[::2, ::2], truth.frames[0])
        assert plain[index * row_height :][: row_height - 128].max() > 200
    assert (outlined != plain).any(-1).mean() > 0.005
    simulated = [simulate_clip(0, **SHAPE)]
    assert contact_sheet(simulated, columns=3).width == 3 * 2 * 64
