"""What is written beside an exported model, and what a run may say that it never trained on."""

import shutil
from pathlib import Path

import pytest

from pipelines.training.record import Training, find_training, never_trained_on, read_training, write_training
from prophy.tiny.pipeline import pipeline_folder
from tests.conftest import tiny_config


def test_a_video_is_held_out_only_if_no_earlier_step_was_trained_on_it(tmp_path: Path) -> None:
    assert never_trained_on(["a", "b"], None, None) == ["a", "b"]
    assert never_trained_on(["a", "b"], {"held_out": ["b", "z"]}, None) == ["b"]
    assert never_trained_on(["a", "b"], {"held_out": []}, None) == []
    assert never_trained_on(["a", "b"], {}, None) is None, "the checkpoint does not say it"
    assert never_trained_on(["a", "b"], None, tmp_path) is None, "nor does the branch"
    write_training(tmp_path, 10, {"held_out": ["a"]})
    assert never_trained_on(["a", "b"], None, tmp_path) == ["a"]
    assert never_trained_on(["a", "b"], {"held_out": ["b"]}, tmp_path) == ["b"], "as its start said"


@pytest.mark.parametrize("content", ["{", "[]", "{}", '{"step": 3}', '{"step": null, "held_out": []}'])
def test_a_file_of_this_name_that_is_no_record_says_nothing(tmp_path: Path, content: str) -> None:
    (tmp_path / "training.json").write_text(content)
    assert read_training(tmp_path) is None


def test_a_complete_export_on_the_hub_says_how_it_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repository = 40 * "a", tmp_path / "models--someone--model"
    snapshot = shutil.copytree(pipeline_folder(), repository / "snapshots" / commit)
    write_training(snapshot, 10, {"held_out": ["a"]})
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = tiny_config(tmp_path, "backbone.pretrained=someone/model", "checkpoint=null")
    assert find_training(config) == Training(10, ("a",))
