"""Latents and embeddings against what the pipeline does with them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from tests.wan import MAX_SEQUENCE_LENGTH, write_ti2v


@pytest.fixture(scope="module")
def encoder() -> VideoEncoder:
    return VideoEncoder("tiny", None, "float32", None, 32, "wan")


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return load_pipeline("wan", "tiny", None, torch.float32, None)


def test_latents_are_the_normalised_posterior_mean(encoder: VideoEncoder, pipeline: Any) -> None:
    frames = np.random.default_rng(0).integers(0, 256, (2, 5, 32, 32, 3), dtype=np.uint8)
    latents = encoder.encode_video(frames)
    assert latents.shape == (2, 16, 2, 8, 8) and latents.dtype == torch.float32

    # As the pipeline reads pixels, and as it takes the normalisation back before it decodes.
    pixels = pipeline.video_processor.preprocess_video(
        [[Image.fromarray(f) for f in clip] for clip in frames]
    )
    config = pipeline.vae.config
    mean, std = (
        torch.tensor(value).view(1, 16, 1, 1, 1) for value in (config.latents_mean, config.latents_std)
    )
    with torch.no_grad():
        posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(latents * std + mean, posterior.mean, rtol=1e-4, atol=1e-5)
    assert (config.latents_std[0], config.latents_mean[0]) != (1.0, 0.0)


def test_the_first_latent_of_a_clip_is_that_of_its_first_frame(tmp_path: Path) -> None:
    """So a cache needs nothing else for models that are given it."""
    ti2v = VideoEncoder(str(write_ti2v(tmp_path)), None, "float32", None, MAX_SEQUENCE_LENGTH, "wan")
    frames = np.random.default_rng(0).integers(0, 256, (2, 17, 32, 64, 3), dtype=np.uint8)
    latents = ti2v.encode_video(frames)
    assert latents.shape == (2, 6, 5, 2, 4)
    torch.testing.assert_close(latents[:, :, :1], ti2v.encode_video(frames[:, :1]), rtol=1e-4, atol=1e-5)


def test_text_is_what_the_pipeline_encodes(encoder: VideoEncoder, pipeline: Any) -> None:
    prompts = ["a red ball falls", ""]
    text = encoder.encode_text(prompts)
    embeds = text["prompt_embeds"]
    with torch.inference_mode():
        expected, _ = pipeline.encode_prompt(prompts, do_classifier_free_guidance=False)
    assert text.keys() == {"prompt_embeds"} and embeds.shape == (2, 32, 192)
    assert torch.equal(embeds, expected)
    assert embeds[1].any(-1).sum() == 2 and embeds[0].any(-1).sum() == 6  # padding is zero


def test_a_text_encoder_that_waits_in_memory_gives_the_same(encoder: VideoEncoder) -> None:
    waiting = VideoEncoder("tiny", None, "float32", None, 32, "wan", offload="text_encoder")
    prompts = ["a red ball falls", ""]
    expected, text = encoder.encode_text(prompts), waiting.encode_text(prompts)
    assert expected.keys() == text.keys()
    assert all(torch.equal(text[name], value) for name, value in expected.items())
