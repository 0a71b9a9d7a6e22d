"""Offline generation: prompts become files, once."""

import json
from pathlib import Path

import pytest

from pipelines.generation import generate
from prophy.errors import ProPhyError
from prophy.video import probe
from tests.conftest import tiny_config

SMALL = ("backbone.num_frames=5", "backbone.height=32", "backbone.width=32", "sampling.num_inference_steps=2")


def test_prompts_become_videos_and_are_not_made_again(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", *SMALL)
    prompts = ["a red ball falls", "a yellow fire burns", "a red ball falls"]
    paths = generate.run(config, prompts)
    assert len(set(paths)) == 3, "a repeated prompt is another video"
    for path in paths:
        info = probe(path)
        assert (info.num_frames, info.height, info.width) == (5, 32, 32)
    manifest = config.generate.output / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == list(zip(prompts, [0, 0, 1], strict=True))
    assert [config.generate.output.absolute() / line["path"] for line in lines] == paths
    assert lines[0]["num_inference_steps"] == 2

    kept, removed = paths[0].stat().st_mtime_ns, paths[1].read_bytes()
    paths[1].unlink()
    assert generate.run(config, prompts[1::-1]) == paths[1::-1], "a video's name does not depend on the order"
    assert paths[0].stat().st_mtime_ns == kept
    assert paths[1].read_bytes() == removed, "the same seed makes the same video"
    assert manifest.read_text().splitlines() == [json.dumps(line) for line in lines]


def test_batches(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run", *SMALL, "generate.batch_size=2", "sampling.step_cache.taylorseer=2"
    )
    paths = generate.run(config, ["a red ball falls", "a yellow fire burns", "a blue ball falls"])
    assert len({path.read_bytes() for path in paths}) == 3
    assert all(probe(path).num_frames == 5 for path in paths)

    for cache in ("first_block", "sea"):
        config = tiny_config(tmp_path, "generate.batch_size=2", f"sampling.step_cache.{cache}=0.1")
        with pytest.raises(
            ProPhyError, match="generate.batch_size of 2 .*; use sampling.step_cache.taylorseer"
        ):
            generate.run(config, ["a red ball falls"])


def test_empty_prompts(tmp_path: Path) -> None:
    for prompts in ([], ["a ball", " "]):
        with pytest.raises(ProPhyError, match="give at least one, and none empty"):
            generate.run(tiny_config(tmp_path), prompts)
