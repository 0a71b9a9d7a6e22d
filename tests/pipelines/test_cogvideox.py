"""CogVideoX all the way: cache, train with two ZeRO workers, generate, at tiny random weights."""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file

from pipelines import cache, generate, train
from pipelines.config import Config
from pipelines.train_metrics import METRICS_FILE
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config


def test_from_clips_to_a_video(tiny_cache: Config, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run",
        f"cache.input={tiny_cache.cache.input}",
        "cache.rows_per_file=4",
        "backbone.family=cogvideox",
        f"backbone.pretrained={write_pipeline(tmp_path / 'backbone')}",
        f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}",
        "physics.physics_layers=[0,2]",
        "checkpoint=null",
        "train.start_from=null",
        "train.num_steps=3",
        "train.log_every=1",
        "sampling.num_inference_steps=2",
    )
    # The VLM's priors do not depend on the backbone.
    shutil.copytree(Path(tiny_cache.cache.output) / "priors", Path(config.cache.output) / "priors")
    summary = cache.run(config)
    assert (summary.added_priors.written, summary.added_encodings.written) == (0, 12)

    model = train.run(config)
    rows = [json.loads(line) for line in (config.run_dir / "train" / METRICS_FILE).open()]
    assert [row["step"] for row in rows] == [1, 2, 3] and all(row["gradient_norm"] > 0 for row in rows)
    weights = load_file(model / "physics_branch.safetensors")
    assert all(torch.isfinite(value).all() for value in weights.values())
    assert weights["blocks.0.injection.weight"].any()

    trained = config.model_copy(update={"checkpoint": model})
    [video] = generate.run(trained, ["a red ball falls"])
    assert video.stat().st_size > 0
