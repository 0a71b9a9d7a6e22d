"""What videos are asked for in a comparison."""

from pathlib import Path

import pytest

from pipelines.config import load_config
from pipelines.evaluation.requests import requests_of, spec_of, unit_of
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


def test_things_alone_pairs_and_falls_come_in_turn(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "evaluate.num_prompts=30")
    requests = requests_of(config)
    assert len({unit_of(request) for request in requests}) == 30
    kinds = [len(request.parts) for request in requests]
    assert kinds == [1, 2, 1] * 10
    assert all(request.parts[0].scene.name == "bouncing_ball" for request in requests[2::3])
    assert len({request.parts for request in requests}) > 24
    fewer = requests_of(tiny_config(tmp_path, "evaluate.num_prompts=12"))
    assert fewer == requests[:12], "more prompts keep those before"
    assert spec_of(config, requests[4]).seed == requests[4].seed
    assert spec_of(config, requests[4]).prompt == requests[4].prompt


def test_a_preset_of_two_transformers_compares_videos_of_square_frames() -> None:
    """It compares nothing else: videos cannot be left out."""
    square = ["backbone.height=624", "backbone.width=624", "backbone.aspect_buckets=null"]
    requests_of(load_config("wan2.2-t2v-a14b", square))


def test_what_cannot_be_asked_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"evaluate\.num_prompts is 5000, and there are \d+ such prompts"):
        requests_of(tiny_config(tmp_path, "evaluate.num_prompts=5000"))
    with pytest.raises(ProPhyError, match=r"are 80x64; set backbone\.height and .* one value, .*, or leave"):
        requests_of(tiny_config(tmp_path, "backbone.width=80"))
    with pytest.raises(ProPhyError, match=r"backbone\.num_frames is 1; raise it, or leave videos out of"):
        requests_of(tiny_config(tmp_path, "backbone.num_frames=1"))
