"""What a run that goes on holds on to: the backbone at its revision, the samples, its folder."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from pipelines.config import Config
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.samples import describe_samples
from pipelines.training.train import alone, compare_samples, pin_backbone
from prophy.errors import ProPhyError
from prophy.tiny.pipeline import pipeline_folder
from prophy.training.cache import PriorCache
from tests.caches import encodings_folder, priors_folder
from tests.conftest import tiny_config

MODEL, THEN, NOW = "nobody/video", "a" * 40, "b" * 40


def write_checkpoint(config: Config, run: dict[str, Any], step: int = 2) -> Path:
    """One without a parameter."""
    folder = Path(config.checkpoints) / f"step-{step:08d}"
    folder.mkdir(parents=True)
    manifest = {"version": 1, "step": step, "files": {}, "run": run, "shapes": {}}
    (folder / MANIFEST).write_text(json.dumps(manifest))
    return folder


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The local cache of a hub where `main` of the model is `THEN`; what decides it is the file."""
    folder = tmp_path / "hub" / f"models--{MODEL.replace('/', '--')}"
    for commit in (THEN, NOW):
        (folder / "snapshots" / commit).mkdir(parents=True)
        (folder / "snapshots" / commit / "model_index.json").write_text("{}")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text(THEN)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return folder / "refs" / "main"


def test_a_hub_that_moves_on_does_not_change_the_backbone(hub: Path, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", f"backbone.pretrained={MODEL}")
    first = pin_backbone(config)
    assert first == {"name": MODEL, "revision": THEN, "fingerprint": THEN}
    hub.write_text(NOW)
    assert pin_backbone(config)["revision"] == NOW
    write_checkpoint(config, {"backbone": first})
    assert pin_backbone(config) == first


def test_a_folder_that_has_changed_is_refused(tmp_path: Path) -> None:
    backbone = tmp_path / "backbone"
    shutil.copytree(pipeline_folder() / "scheduler", backbone)
    config = tiny_config(tmp_path / "run", f"backbone.pretrained={backbone}")
    first = pin_backbone(config)
    folder = write_checkpoint(config, {"backbone": first})
    assert pin_backbone(config) == first
    with (backbone / "scheduler_config.json").open("a") as file:
        file.write("\n")
    message = f"{folder} was trained on another backbone .*{first['fingerprint']}.* than {backbone} is now"
    with pytest.raises(ProPhyError, match=message):
        pin_backbone(config)


def test_a_cache_that_has_grown_is_said(
    tiny_cache: Config, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    config = tiny_config(tmp_path / "run", f"cache.output={tiny_cache.cache.output}")
    cache = PriorCache(priors_folder(config), encodings_folder(config))
    samples = describe_samples(config, cache)
    assert samples["number"] == 12
    write_checkpoint(config, {"samples": samples})
    compare_samples(config, cache)
    assert not caplog.text
    write_checkpoint(config, {"samples": {"number": 11, "sha256": "0"}}, step=4)
    compare_samples(config, cache)
    assert "other samples to train on (12) than at the last checkpoint (11)" in caplog.text


def test_one_run_in_a_folder(tmp_path: Path) -> None:
    root = tmp_path / "run" / "train"
    for _ in range(2):
        with alone(root):
            message = f"another run trains in {root.parent}; wait for it, or choose another run_dir"
            with pytest.raises(ProPhyError, match=message), alone(root):
                pass
