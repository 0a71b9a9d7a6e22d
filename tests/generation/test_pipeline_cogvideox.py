"""CogVideoX from pixels to pixels, at tiny random weights: encodings, pipeline calls, guidance, padding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint, load_configs
from prophy.generation.pipeline_cogvideox import ProPhyCogVideoXPipeline
from prophy.models.checkpoint import save_branch
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
from tests.cogvideox import MAX_SEQUENCE_LENGTH, SCALING_FACTOR, write_pipeline
from tests.wisa import PHENOMENA


@pytest.fixture(scope="module", params=[None, 2], ids=["1.0", "1.5"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pipeline(tmp_path_factory.mktemp("cogvideox"), patch_size_t=request.param)


@pytest.fixture
def bare(folder: Path) -> ProPhyCogVideoXPipeline:
    return load_pipeline("cogvideox", str(folder), None, torch.float32, None)


@pytest.fixture
def pipeline(folder: Path, bare: ProPhyCogVideoXPipeline) -> ProPhyCogVideoXPipeline:
    """With an untrained branch."""
    torch.manual_seed(0)
    transformer = ProPhyCogVideoXTransformer3DModel.from_transformer(
        bare.transformer, {"physics_layers": (0, 2), "latent_shape": (6, 8, 8), "phenomena": PHENOMENA}
    )
    components = bare.components | {"transformer": transformer.eval()}
    return ProPhyCogVideoXPipeline(**components, max_sequence_length=MAX_SEQUENCE_LENGTH)


def sample(pipeline: ProPhyCogVideoXPipeline, output_type: str = "latent", **kwargs: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    video = pipeline(
        "a red ball falls",
        height=32,
        width=32,
        num_frames=17,
        num_inference_steps=2,
        generator=torch.Generator().manual_seed(0),
        output_type=output_type,
        **kwargs,
    ).frames
    return np.asarray(video)


def test_untrained_branch_changes_nothing_and_a_trained_one_survives_saving(
    folder: Path, bare: ProPhyCogVideoXPipeline, pipeline: ProPhyCogVideoXPipeline, tmp_path: Path
) -> None:
    expected = sample(bare)
    assert np.array_equal(sample(pipeline), expected)
    for block in pipeline.transformer.physics_branch.blocks:
        torch.nn.init.normal_(block.injection.weight, std=0.1)
    video = sample(pipeline, "np")
    assert video.shape == (1, 17, 32, 32, 3)
    assert not np.array_equal(sample(pipeline), expected)
    assert np.array_equal(sample(pipeline, physics=PhysicsControl(scale=0.0)), expected)

    pipeline.save_pretrained(tmp_path / "whole")
    loaded = ProPhyCogVideoXPipeline.from_pretrained(tmp_path / "whole")
    assert isinstance(loaded.transformer, ProPhyCogVideoXTransformer3DModel)
    assert loaded.config.max_sequence_length == MAX_SEQUENCE_LENGTH
    np.testing.assert_allclose(sample(loaded, "np"), video, atol=1e-4)

    backbone = {"name": str(folder), "revision": None, "fingerprint": fingerprint(str(folder), None)}
    save_branch(pipeline.transformer, tmp_path / "branch", backbone)
    grown = load_pipeline("cogvideox", str(folder), None, torch.float32, tmp_path / "branch")
    np.testing.assert_allclose(sample(grown, "np"), video, atol=1e-4)


def test_trace_holds_the_guided_half(pipeline: ProPhyCogVideoXPipeline) -> None:
    traces = {scale: PhysicsTrace() for scale in (1.0, 6.0)}
    for scale, trace in traces.items():
        sample(pipeline, physics=PhysicsControl(trace=trace), guidance_scale=scale)
    assert traces[6.0].num_passes == traces[1.0].num_passes == 2
    patch_t = pipeline.transformer.config.patch_size_t or 1
    assert traces[6.0].phenomenon_maps.shape == (1, (5 + patch_t - 1) // patch_t, 4, 4, 17)
    # The text decides the semantic weights: with guidance they are still the prompt's.
    torch.testing.assert_close(traces[6.0].semantic_weights, traces[1.0].semantic_weights)


def test_semantic_experts_run_once_for_prompt_and_guidance(pipeline: ProPhyCogVideoXPipeline) -> None:
    calls = []
    pipeline.transformer.physics_branch.semantic.register_forward_hook(lambda *_: calls.append(1))
    sample(pipeline, guidance_scale=6.0)
    assert len(calls) == 1  # the two are one batch


def test_latents_and_text_are_what_the_pipeline_takes(folder: Path, bare: ProPhyCogVideoXPipeline) -> None:
    encoder = VideoEncoder(str(folder), None, "float32", None, MAX_SEQUENCE_LENGTH, "cogvideox")
    frames = np.random.default_rng(0).integers(0, 256, (1, 17, 32, 32, 3), dtype=np.uint8)
    latents = encoder.encode_video(frames)
    family, configs = FAMILIES["cogvideox"], load_configs("cogvideox", str(folder), None)
    shape = family.latent_shape(17, 32, 32, *configs)
    assert latents.shape == (1, 4, *shape)

    with torch.no_grad():
        posterior = bare.vae.encode(torch.from_numpy(frames).permute(0, 4, 1, 2, 3) / 127.5 - 1).latent_dist
    padding = shape[0] - 5
    torch.testing.assert_close(latents[:, :, padding:] / SCALING_FACTOR, posterior.mean, rtol=1e-4, atol=1e-5)
    assert torch.equal(latents[:, :, 0], latents[:, :, padding])
    family.token_grid(shape, configs[1])  # fills the patches

    embeds = encoder.encode_text(["a red ball falls", ""])["prompt_embeds"]
    expected, _ = bare.encode_prompt(["a red ball falls", ""], do_classifier_free_guidance=False)
    assert embeds.shape == (2, MAX_SEQUENCE_LENGTH, 16)
    torch.testing.assert_close(embeds, expected)
    assert embeds[1].any(-1).all()  # T5 has no mask: padding is not zero
