"""Models that take an image all the way: cache, training that resumes, export, videos; at tiny weights."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.caching import cache
from pipelines.config import Config
from pipelines.generation import generate
from pipelines.layout import METRICS_FILE
from pipelines.training import export, train
from prophy.video import read_frames
from tests import cogvideox, wan
from tests.conftest import tiny_config

pytestmark = pytest.mark.slow

WEIGHTS = "physics_branch.safetensors"
# What writes the backbone, tokens of a text, and whether it makes videos of text alone too.
KINDS: dict[str, tuple[str, Callable[[Path], Path], int, bool]] = {
    "wan2.2-ti2v": ("wan", wan.write_ti2v, wan.MAX_SEQUENCE_LENGTH, True),
    "wan2.1-i2v": ("wan", wan.write_i2v, wan.I2V_SEQUENCE_LENGTH, False),
    "cogvideox-i2v": ("cogvideox", cogvideox.write_i2v, cogvideox.MAX_SEQUENCE_LENGTH, False),
}


def shown(video: str) -> np.ndarray:
    return read_frames(video, 0.0, 2.0, 17, 64, 64)


@pytest.mark.parametrize("kind", KINDS)
def test_from_clips_to_a_video_of_an_image(kind: str, tiny_cache: Config, tmp_path: Path) -> None:
    family, write, length, takes_text = KINDS[kind]
    settings = (
        f"cache.input={tiny_cache.cache.input}",
        f"backbone.family={family}",
        f"backbone.pretrained={write(tmp_path / 'backbone')}",
        f"backbone.max_sequence_length={length}",
        "backbone.autocast=null",
        "physics.physics_layers=[0,2]",
        "checkpoint=null",
        "train.start_from=null",
        "train.learning_rate=1e-2",
        "train.log_every=1",
        "train.save_every=2",
        "sampling.num_inference_steps=2",
    )
    config = tiny_config(tmp_path / "run", *settings, "train.num_steps=2")
    # The VLM's priors do not depend on the backbone.
    shutil.copytree(Path(tiny_cache.cache.output) / "priors", Path(config.cache.output) / "priors")
    summary = cache.run(config)
    assert (summary.added_priors.written, summary.added_encodings.written) == (0, 12)

    train.run(config)
    model = train.run(tiny_config(tmp_path / "run", *settings, "train.num_steps=4"))
    rows = [json.loads(line) for line in (config.run_dir / "train" / METRICS_FILE).open()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert all(np.isfinite(row["loss"]) and row["gradient_norm"] > 0 for row in rows)

    # Resumed, it is what it would have been, bit for bit.
    through = (f"cache.output={config.cache.output}", "train.num_steps=4", "train.save_every=4")
    expected = load_file(train.run(tiny_config(tmp_path / "through", *settings, *through)) / WEIGHTS)
    found = load_file(model / WEIGHTS)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], value) for name, value in expected.items())

    image = tmp_path / "photo.jpg"
    Image.fromarray(np.arange(30 * 40 * 3, dtype=np.uint8).reshape(30, 40, 3)).save(image)
    trained = config.model_copy(update={"checkpoint": str(model)})
    prompts = ["a red ball falls", "a candle burns"]
    made = [shown(video) for video in generate.run(trained, prompts, [image])]
    assert not np.array_equal(made[0], made[1])

    # The complete pipeline makes what the trained branch makes.
    complete = export.run(config, tmp_path / "complete", None, complete=True)
    backbone = config.backbone.model_copy(update={"pretrained": str(complete)})
    exported = config.model_copy(update={"backbone": backbone})
    for video, frames in zip(generate.run(exported, prompts, [image]), made, strict=True):
        assert np.abs(shown(video).astype(int) - frames).mean() < 1  # weights lie elsewhere: sums are rounded
    if takes_text:
        [of_text] = generate.run(exported, prompts[:1])
        assert np.abs(shown(of_text).astype(int) - made[0]).mean() > 5
