"""A VLM of another package teaches: from a clip to a row of the cache, and to targets on the token grid."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch

from pipelines.caching.cache import priors_table
from pipelines.caching.stages import CLIPS_WITH_FRAMES, PRIORS_OR_ERROR, ExtractPriors
from pipelines.caching.tables import Table, WriteRows, file_names
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.grounding import make_targets
from prophy.priors.vlm import VLMS, load_vlm
from prophy.schema import QUARANTINE, open_file
from tests.conftest import tiny_config
from tests.outside import plugged_in
from tests.wisa import PHENOMENA, WISA

DURATION_S, NUM_FRAMES = 2.0, 6
SLICE_TIMES = [(0.0, 0.0), (0.4, 1.2), (1.6, 2.0)]  # of the frames 0, 1 to 3, and 4 and 5


@pytest.fixture(scope="module", autouse=True)
def package(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    folder = tmp_path_factory.mktemp("site-packages")
    with plugged_in(folder, "prophy.vlms", "outside_vlm", "tests.priors.outside_vlm:OutsideVlm"):
        yield


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("outside")
    (folder / "vlm").mkdir()
    (folder / "vlm" / "config.json").write_text(
        json.dumps({"model_type": "outside_vlm", "frames_per_slice": 3})
    )
    return tiny_config(
        folder / "run",
        f"vlm.pretrained={folder / 'vlm'}",
        f"vlm.num_frames={NUM_FRAMES}",
        "vlm.height=64",
        "vlm.width=96",
        "vlm.layers=[0]",
        "vlm.heads=[0]",
    )


@pytest.fixture(scope="module")
def frames() -> np.ndarray:
    """Black; in the last two frames a white square in the second row and fourth column of cells."""
    frames = np.zeros((NUM_FRAMES, 64, 96, 3), np.uint8)
    frames[4:, 16:32, 48:64] = 255
    return frames


def extracted(config: Config, frames: np.ndarray, *labels: list[str] | None) -> pa.Table:
    """The rows of one clip, under as many names as there are `labels`."""
    row = {
        "source": {"uri": "a.mp4", "size": 1, "modified": 0.0},
        "content_hash": "a",
        "start_s": 3.0,
        "end_s": 3.0 + DURATION_S,
        "fps": 8.0,
        "num_frames": 17,
        "height": 64,
        "width": 96,
        "num_clips": 1,
        "share": 1.0,
        "frames": frames.tobytes(),
        "frames_shape": frames.shape,
    }
    attempts = config.run_dir / "attempts"
    attempts.mkdir(parents=True, exist_ok=True)
    stage = ExtractPriors(config.vlm, WISA, attempts)
    rows = [row | {"sample_id": f"clip-{number}", "labels": each} for number, each in enumerate(labels)]
    return stage(pa.Table.from_pylist(rows, CLIPS_WITH_FRAMES))


def test_it_is_found_by_the_model_type_of_its_files(config: Config) -> None:
    assert [*VLMS] == ["outside_vlm", "qwen2_5_vl", "qwen3_vl"]
    vlm: Any = load_vlm(config.vlm.pretrained, None, "float32", None)
    assert type(vlm) is VLMS["outside_vlm"] and vlm.frames_per_slice == 3


def test_from_a_clip_to_a_row_and_to_targets(config: Config, frames: np.ndarray) -> None:
    table = priors_table(config, WISA)
    quarantine = Table(config.run_dir / "quarantine", QUARANTINE, {}, {})
    table.folder.mkdir(parents=True, exist_ok=True)
    assert extracted(config, frames, None).schema.equals(PRIORS_OR_ERROR)
    assert WriteRows(table, quarantine)(extracted(config, frames, None))["written"].to_pylist() == [1]
    [name] = file_names(table.folder)
    with open_file(table.folder / name) as file:
        [row] = file.read().to_pylist()
    assert row["vlm_caption"] == "something moves" and row["unparsed"] == []
    assert row["map_phenomena"] == [PHENOMENA.index("collision")]
    times = [[each["start_s"], each["end_s"]] for each in row["slice_times"]]
    assert np.allclose(times, SLICE_TIMES, rtol=1e-12)
    maps = torch.tensor(row["maps"]).reshape(row["maps_shape"])
    assert maps.shape == (2, 3, 4, 6) and not maps[1].any()  # nothing is said of the background
    assert maps[0].nonzero().tolist() == [[2, 1, 3]]

    slices = torch.tensor(times, dtype=torch.float64) / DURATION_S
    latents, grid = torch.zeros(4, 5, 8, 12), (5, 4, 6)
    targets, mask = make_targets(
        maps,
        row["map_phenomena"],
        latents,
        grid=grid,
        num_frames=17,
        slices=slices,
        num_phenomena=len(PHENOMENA),
        recipe="minus_background",
        negatives="zero",
    )
    found = targets[:, PHENOMENA.index("collision")].reshape(grid)
    # The middles of slices are at 0, 0.4 and 0.9 of the clip; these are those of tokens, of four frames each.
    middles = torch.tensor([0, 2.5, 6.5, 10.5, 14.5]) / 16
    signed = ((middles - 0.4) / 0.5).clamp(0, 1)
    expected = (signed / signed[signed > 0].quantile(0.8)).clamp(0, 1)
    torch.testing.assert_close(found[:, 1, 3], expected, rtol=1e-5, atol=1e-6)
    found[:, 1, 3] = 0
    assert not found.any()
    assert mask[:, PHENOMENA.index("collision")].all() and mask.sum() == mask.shape[0]


def test_labels_are_asked_for_instead(config: Config, frames: np.ndarray) -> None:
    [row] = extracted(config, frames, ["melting"]).to_pylist()
    assert row["map_phenomena"] == [PHENOMENA.index("melting")]
    assert [each["question"] for each in row["answers"]] == ["caption", "background", "melting"]


def test_several_clips_are_one_batch(config: Config, frames: np.ndarray) -> None:
    rows = extracted(config, frames, None, ["melting"]).to_pylist()
    alone = [extracted(config, frames, labels).to_pylist()[0] for labels in (None, ["melting"])]
    assert rows == [alone[0], alone[1] | {"sample_id": "clip-1"}]


def test_its_layers_and_heads_are_checked(config: Config, frames: np.ndarray) -> None:
    source = config.vlm.pretrained
    with pytest.raises(ProPhyError, match=r"vlm.layers .*0 to 0"):
        PriorExtractor(source, WISA, dtype="float32", layers=[1])
    with pytest.raises(ProPhyError, match=r"vlm.heads .*0 to 1"):
        PriorExtractor(source, WISA, dtype="float32", heads=[2])
    extractor = PriorExtractor(source, WISA, dtype="float32", heads=[1])
    [everywhere] = extractor([Clip(frames, 2.5, ("collision",))])
    assert (everywhere.maps[0] == 1).all()


def test_two_packages_must_not_claim_one_name(tmp_path: Path) -> None:
    other = plugged_in(tmp_path, "prophy.vlms", "outside_vlm", "elsewhere:Vlm")
    with pytest.raises(ProPhyError, match=r"'outside_vlm' \(.*elsewhere:Vlm.*; uninstall one"), other:
        list(VLMS)
