"""Whole pipeline calls: the embedded pipeline, small clips, guidance on."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.checkpoint import save_branch
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.wisa import PHENOMENA


@pytest.fixture(scope="module")
def bare() -> ProPhyWanPipeline:
    return load_pipeline("wan", "tiny", None, torch.float32, None)


@pytest.fixture
def pipeline(bare: ProPhyWanPipeline) -> ProPhyWanPipeline:
    """With an untrained branch."""
    torch.manual_seed(0)
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        bare.transformer, {"physics_layers": (0, 3), "latent_shape": (2, 8, 8), "phenomena": PHENOMENA}
    )
    settings = {name: bare.config[name] for name in ("expand_timesteps", "max_sequence_length")}
    return ProPhyWanPipeline(**bare.components | {"transformer": transformer.eval()}, **settings)


def awaken(pipeline: ProPhyWanPipeline) -> None:
    """Gives the branch weights as after training."""
    for block in pipeline.transformer.physics_branch.blocks:
        torch.nn.init.normal_(block.injection.weight, std=0.1)
    torch.nn.init.normal_(pipeline.transformer.physics_branch.refinement_injection.weight, std=0.1)


def sample(pipeline: ProPhyWanPipeline, output_type: str = "latent", **kwargs: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    video = pipeline(
        "a red ball falls",
        height=32,
        width=32,
        num_frames=5,
        num_inference_steps=2,
        generator=generator,
        output_type=output_type,
        **kwargs,
    ).frames
    return np.asarray(video)


def test_untrained_branch_changes_nothing(bare: ProPhyWanPipeline, pipeline: ProPhyWanPipeline) -> None:
    expected = sample(bare)
    assert np.array_equal(sample(pipeline), expected)
    awaken(pipeline)
    assert not np.array_equal(sample(pipeline), expected)
    assert np.array_equal(sample(pipeline, physics=PhysicsControl(scale=0.0)), expected)


def same_video(loaded: ProPhyWanPipeline, original: ProPhyWanPipeline, video: np.ndarray) -> None:
    """Same weights bit for bit, same video to rounding: kernels depend on where in memory weights lie."""
    weights, expected = loaded.transformer.state_dict(), original.transformer.state_dict()
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[key], value) for key, value in expected.items())
    np.testing.assert_allclose(sample(loaded, "np"), video, atol=1e-4)


def test_saved_and_loaded_pipeline_gives_the_same_video(pipeline: ProPhyWanPipeline, tmp_path: Path) -> None:
    awaken(pipeline)
    video = sample(pipeline, "np")
    assert video.shape == (1, 5, 32, 32, 3) and video.std() > 0

    pipeline.save_pretrained(tmp_path / "whole")
    loaded = ProPhyWanPipeline.from_pretrained(tmp_path / "whole")
    assert isinstance(loaded.transformer, ProPhyWanTransformer3DModel)
    assert loaded.config.max_sequence_length == 32
    same_video(loaded, pipeline, video)

    backbone = {"name": "tiny", "revision": None, "fingerprint": fingerprint("tiny", None)}
    save_branch(pipeline.transformer, tmp_path / "branch", backbone)
    grown = load_pipeline("wan", "tiny", None, torch.float32, tmp_path / "branch")
    same_video(grown, pipeline, video)


def test_trace_sees_the_conditional_passes(pipeline: ProPhyWanPipeline) -> None:
    guided, plain = PhysicsTrace(), PhysicsTrace()
    sample(pipeline, physics=PhysicsControl(trace=guided), guidance_scale=5.0)
    sample(pipeline, physics=PhysicsControl(trace=plain), guidance_scale=1.0)
    assert guided.num_passes == plain.num_passes == 2
    assert guided.phenomenon_maps.shape == (1, 2, 4, 4, 17)
    # The text decides the semantic weights: with guidance they are still the prompt's.
    assert torch.equal(guided.semantic_weights, plain.semantic_weights)
    embeds, empty = pipeline.encode_prompt("a red ball falls")
    router = pipeline.transformer.physics_branch.semantic.router
    torch.testing.assert_close(guided.semantic_weights, router(embeds).detach())
    assert not torch.allclose(guided.semantic_weights, router(empty))


def test_semantic_experts_run_once_per_text(pipeline: ProPhyWanPipeline) -> None:
    """Not once per step; and not from one call to the next, between which weights may change."""
    awaken(pipeline)
    semantic, calls = pipeline.transformer.physics_branch.semantic, []
    semantic.register_forward_hook(lambda *_: calls.append(1))
    before = sample(pipeline, guidance_scale=5.0)
    assert len(calls) == 2  # the prompt and its absence, in two steps
    torch.nn.init.normal_(semantic.basis_maps)
    assert not np.array_equal(sample(pipeline, guidance_scale=5.0), before)
    assert len(calls) == 4


def test_knobs_may_come_as_attention_kwargs(pipeline: ProPhyWanPipeline) -> None:
    trace = PhysicsTrace()
    sample(pipeline, attention_kwargs={"physics": PhysicsControl(trace=trace)})
    assert trace.num_passes == 2


def test_physics_without_a_branch_is_refused(bare: ProPhyWanPipeline) -> None:
    with pytest.raises(ProPhyError, match="no Physical Branch"):
        sample(bare, physics=PhysicsControl())


def test_text_length_is_the_pipelines_own(pipeline: ProPhyWanPipeline) -> None:
    assert pipeline.encode_prompt("a red ball")[0].shape == (1, 32, 192)
    assert pipeline.encode_prompt("a red ball", max_sequence_length=16)[0].shape == (1, 16, 192)
    expected = sample(pipeline)
    assert np.array_equal(sample(pipeline, max_sequence_length=32), expected)
    assert not np.array_equal(sample(pipeline, max_sequence_length=16), expected)
