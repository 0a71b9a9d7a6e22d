"""CogVideoX all the way: cache, train with two ZeRO workers, export, serve, at tiny random weights."""

import json
import shutil
from pathlib import Path

import httpx
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from pipelines.caching import cache
from pipelines.caching.tables import file_names
from pipelines.caching.verify import verify
from pipelines.config import Config
from pipelines.generation import generate
from pipelines.generation.limits import shape_limits
from pipelines.generation.sampler import VideoSampler
from pipelines.layout import METRICS_FILE
from pipelines.serving.replica import VideoGenerator
from pipelines.training import export, train
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import load_configs
from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
from prophy.schema import EMPTY_PROMPT, latents_of, text_of
from prophy.video import read_frames, write_video
from tests.caches import encodings_folder
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config
from tests.hostile import FPS, moving_square
from tests.servers import http_server, make

SHAPES = [(64, 64), (48, 80), (80, 48)]


def assert_encoded(row: dict, backbone: Path, pipeline: ProPhyCogVideoXPipeline) -> None:
    """The row's latents and text are those that the pipeline of diffusers itself would hand on."""
    shape = SHAPES[int(Path(row["source"]["uri"]).stem)]
    configs = load_configs("cogvideox", str(backbone), None)
    latents = latents_of(row)
    assert latents.shape == (4, *FAMILIES["cogvideox"].latent_shape(17, *shape, *configs))
    frames = read_frames(row["source"]["uri"], 0.0, 2.0, 17, *shape)
    pixels = pipeline.video_processor.preprocess_video([[Image.fromarray(frame) for frame in frames]])
    padding = (pipeline.transformer.config.patch_size_t or 1) - 1
    assert torch.equal(latents[:, :padding], latents[:, padding : 2 * padding])
    with torch.no_grad():
        expected = pipeline.vae.decode(pipeline.vae.encode(pixels).latent_dist.mean).sample
        # The pipeline's layout is [B, T, C, H, W].
        decoded = pipeline.decode_latents(latents[:, padding:].transpose(0, 1)[None])
    torch.testing.assert_close(decoded, expected, rtol=1e-3, atol=1e-4)


def assert_text(row: dict, prompt: str, pipeline: ProPhyCogVideoXPipeline) -> None:
    text = text_of(row)
    expected, _ = pipeline.encode_prompt(prompt, do_classifier_free_guidance=False)
    torch.testing.assert_close(text, {"prompt_embeds": expected[0]})
    assert text["prompt_embeds"].shape == (MAX_SEQUENCE_LENGTH, 16)
    assert text["prompt_embeds"].any(-1).all()  # T5 has no mask: padding is not zero


@pytest.mark.slow
def test_encodings_in_several_shapes_are_what_the_pipeline_takes(ray_cluster: None, tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for number, (height, width) in enumerate(SHAPES):
        write_video(clips / f"{number}.mp4", moving_square(17, 2 * height, 2 * width), FPS)
    # CogVideoX 1.0 encodes 4k + 1 frames; 1.5, whose patches hold two latent frames, 8k + 1.
    for patch_size_t, num_priors in ((None, len(SHAPES)), (2, 0)):
        backbone = write_pipeline(tmp_path / f"backbone-{patch_size_t}", patch_size_t=patch_size_t)
        config = tiny_config(
            tmp_path / "run",
            "backbone.family=cogvideox",
            f"cache.input={clips}",
            f"backbone.pretrained={backbone}",
            f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}",
            f"backbone.aspect_buckets={[list(shape) for shape in SHAPES]}",
            f"vlm.aspect_buckets={[list(shape) for shape in SHAPES]}",
            "backbone.autocast=null",
        )
        summary = cache.run(config)
        assert (summary.added_priors.written, summary.added_encodings.written) == (num_priors, len(SHAPES))
        folder = encodings_folder(config)
        pipeline = load_pipeline("cogvideox", str(backbone), None, torch.float32, None)
        rows = [row for name in file_names(folder) for row in pq.read_table(folder / name).to_pylist()]
        assert len(rows) == len(SHAPES)
        for row in rows:
            assert_encoded(row, backbone, pipeline)
            assert_text(row, row["caption"], pipeline)
        [empty] = pq.read_table(folder / EMPTY_PROMPT).to_pylist()
        assert_text(empty, "", pipeline)
    assert verify(Path(config.cache.output)) == []


@pytest.mark.slow
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
        "train.backbone=lora",
        "train.lora_rank=4",
        "train.backbone_learning_rate=1e-2",
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

    assert load_file(model / "pytorch_lora_weights.safetensors")[
        "transformer.transformer_blocks.0.attn1.to_q.lora_B.weight"
    ].any()

    trained = config.model_copy(update={"checkpoint": str(model)})
    [video] = generate.run(trained, ["a red ball falls"])
    assert Path(video).stat().st_size > 0

    # The complete pipeline makes what the trained branch and adapter make.
    complete = export.run(config, tmp_path / "complete", None, complete=True)
    backbone = config.backbone.model_copy(update={"pretrained": str(complete)})
    exported = config.model_copy(update={"backbone": backbone})
    spec = generate.video_spec(exported, "a red ball falls")
    expected = VideoSampler(trained).sample(spec)
    assert np.array_equal(VideoSampler(exported).sample(spec), expected)
    assert not np.array_equal(VideoSampler(config).sample(spec), expected)

    generator = VideoGenerator(exported, shape_limits(exported))
    with http_server(exported, generator.generate) as url, httpx.Client(base_url=url, timeout=60) as client:
        assert make(client, physics={"scale": 0.5})[4:8] == b"ftyp"
