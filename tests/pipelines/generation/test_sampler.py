"""From a specification to frames, in both families: step caches, with a branch that injects something."""

import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipelines.config import Config, StepCache
from pipelines.generation import generate
from pipelines.generation.limits import check_model
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import VideoSpec
from pipelines.serving.errors import ApiError
from pipelines.serving.protocol import VideoRequest
from prophy.errors import ProPhyError
from prophy.models.control import PhysicsTrace
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config
from tests.servers import LIMITS, save_checkpoint

SPEC = VideoSpec(
    prompt="a red ball falls",
    negative_prompt="",
    seed=0,
    num_frames=5,
    height=32,
    width=32,
    fps=8.0,
    num_inference_steps=8,
    guidance_scale=3.0,
)
EXACT = {
    "wan": ({"first_block": 0.0}, {"sea": 0.0}, {"taylorseer": 1}),
    "cogvideox": ({"first_block": 0.0}, {"taylorseer": 1}),
}
LOSSY = {
    "wan": ({"first_block": 0.3}, {"sea": 2.0}, {"taylorseer": 3}),
    "cogvideox": ({"first_block": 0.3}, {"taylorseer": 3}),
}


@pytest.fixture(scope="module", params=["wan", "cogvideox"])
def config(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder, family = tmp_path_factory.mktemp("sampling"), request.param
    pretrained = "tiny" if family == "wan" else str(write_pipeline(folder / "backbone"))
    return tiny_config(
        folder / "run",
        f"checkpoint={save_checkpoint(folder / 'model', family, pretrained)}",
        f"backbone.family={family}",
        f"backbone.pretrained={pretrained}",
        f"backbone.max_sequence_length={32 if family == 'wan' else MAX_SEQUENCE_LENGTH}",
    )


@pytest.fixture(scope="module")
def sampler(config: Config) -> VideoSampler:
    return VideoSampler(config)


def cached(step_cache: dict[str, Any]) -> VideoSpec:
    return SPEC.model_copy(update={"step_cache": StepCache(**step_cache)})


@pytest.mark.parametrize("offload", ["text_encoder", "all"])
def test_what_waits_in_memory_makes_the_same_video(
    config: Config, sampler: VideoSampler, offload: str
) -> None:
    """On a CPU it waits where it computes: that hooks bring what each pass needs is all that is seen."""
    changed = config.model_copy(update={"backbone": config.backbone.model_copy(update={"offload": offload})})
    offloading = VideoSampler(changed)
    hooked = {
        name
        for name, component in offloading._pipeline.components.items()
        if isinstance(component, torch.nn.Module)
        and any(hasattr(module, "_diffusers_hook") for module in component.modules())
    }
    assert hooked == {"text_encoder"} | ({"transformer"} if offload == "all" else set())
    assert np.array_equal(offloading.sample(SPEC), sampler.sample(SPEC))


def test_weights_of_eight_bits_change_a_video_slightly(
    config: Config, sampler: VideoSampler, capsys: pytest.CaptureFixture[str]
) -> None:
    changed = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"storage_dtype": "float8_e4m3fn"})}
    )
    small = VideoSampler(changed)
    expected, frames = sampler.sample(SPEC), small.sample(SPEC)
    error = np.square(frames.astype(float) - expected).mean()
    psnr = 10 * np.log10(255**2 / error)
    with capsys.disabled():
        print(f"\n{config.backbone.family} in float8_e4m3fn: {psnr:.1f} dB")
    assert 25 < psnr < 80
    weights = dict(small._pipeline.transformer.named_parameters())
    of_branch = {value.dtype for name, value in weights.items() if name.startswith("physics_branch.")}
    assert torch.float8_e4m3fn not in of_branch
    kept = sum(value.nbytes for name, value in weights.items() if not name.startswith("physics_branch."))
    whole = sum(
        value.nbytes
        for name, value in sampler._pipeline.transformer.named_parameters()
        if not name.startswith("physics_branch.")
    )
    assert kept < whole / 2


def test_blocks_that_fetch_the_next_are_not_skipped(config: Config) -> None:
    changed = config.model_copy(
        update={
            "backbone": config.backbone.model_copy(update={"offload": "all"}),
            "sampling": config.sampling.model_copy(update={"step_cache": StepCache(taylorseer=2)}),
        }
    )
    with pytest.raises(ProPhyError, match="set backbone.offload to text_encoder, or leave sampling.step"):
        VideoSampler(changed)


def test_the_warm_up_is_of_the_models_own_shape_on_a_gpu(
    config: Config, sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    sampler.warm_up(LIMITS)  # on the CPU, for real
    asked: list[VideoSpec] = []
    monkeypatch.setattr(sampler, "sample", lambda spec, image: asked.append(spec))
    clip = config.backbone
    small = LIMITS.model_copy(update={"max_pixels": clip.height * clip.width - 1})
    for device, limits in (("cpu", LIMITS), ("cuda", LIMITS), ("cuda", small)):
        monkeypatch.setattr(sampler, "_device", torch.device(device))
        sampler.warm_up(limits)
    shapes = [(spec.num_frames, spec.height, spec.width) for spec in asked]
    smallest = 1, LIMITS.height_multiple, LIMITS.width_multiple
    assert shapes == [smallest, (clip.num_frames, clip.height, clip.width), smallest]
    assert all(spec.guidance_scale > 1 and spec.num_inference_steps == 1 for spec in asked)


def test_the_warm_up_of_a_model_that_makes_one_shape_is_of_that_shape(
    sampler: VideoSampler, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[VideoSpec] = []
    monkeypatch.setattr(sampler, "sample", lambda spec, image: asked.append(spec))
    sampler.warm_up(LIMITS.model_copy(update={"only": (9, 32, 48), "max_num_frames": 5}))
    assert [(spec.num_frames, spec.height, spec.width) for spec in asked] == [(9, 32, 48)]


def test_numbers_that_are_none_make_no_video(sampler: VideoSampler) -> None:
    weight = sampler._pipeline.transformers[0].proj_out.weight
    kept = weight.detach().clone()
    try:
        with torch.no_grad():
            weight[0, 0] = torch.nan
        with pytest.raises(ProPhyError, match="no colours .*; choose another checkpoint, or"):
            sampler.sample(SPEC)
    finally:
        with torch.no_grad():
            weight.copy_(kept)


def test_a_step_cache_that_may_skip_nothing_changes_nothing(config: Config, sampler: VideoSampler) -> None:
    expected = sampler.sample(SPEC)
    for step_cache in EXACT[config.backbone.family]:
        assert np.array_equal(sampler.sample(cached(step_cache)), expected), step_cache


@pytest.mark.heavy
def test_a_video_that_was_aborted_leaves_nothing_in_the_cache(config: Config, sampler: VideoSampler) -> None:
    def abort(progress: float) -> None:
        if progress > 0.6:
            raise InterruptedError

    expected = sampler.sample(SPEC)
    for step_cache in LOSSY[config.backbone.family]:
        spec = cached(step_cache)
        video = sampler.sample(spec)
        assert not np.array_equal(video, expected), f"{step_cache} skips nothing"
        with pytest.raises(InterruptedError):
            sampler.sample(spec.model_copy(update={"seed": 1}), abort)
        assert np.array_equal(sampler.sample(spec), video)
        assert np.array_equal(sampler.sample(SPEC), expected)


def test_a_trace_of_a_video_with_skipped_steps_has_them_all(config: Config, sampler: VideoSampler) -> None:
    whole = PhysicsTrace()
    sampler.sample(SPEC, trace=whole)
    for step_cache in LOSSY[config.backbone.family]:
        spec, trace = cached(step_cache), PhysicsTrace()
        assert np.array_equal(sampler.sample(spec, trace=trace), sampler.sample(spec))
        assert trace.num_passes == 8
        np.testing.assert_allclose(trace.semantic_weights, whole.semantic_weights, atol=1e-3)
        assert trace.phenomenon_maps.shape == whole.phenomenon_maps.shape


@pytest.mark.heavy
def test_a_video_of_a_batch_is_as_alone_but_for_rounding(config: Config) -> None:
    """In float32: how far bfloat16 rounds otherwise in a batch depends on the processor."""
    precise = config.backbone.model_copy(update={"autocast": None})
    sampler = VideoSampler(config.model_copy(update={"backbone": precise}))
    for step_cache in ({}, {"taylorseer": 3}):
        specs = [
            cached(step_cache).model_copy(update={"prompt": prompt, "seed": seed})
            for seed, prompt in enumerate(("a red ball falls", "a yellow fire burns", "a red ball falls"))
        ]
        alone = np.stack([sampler.sample(spec) for spec in specs]).astype(int)
        difference = np.abs(sampler.sample_batch(specs) - alone)
        assert difference.mean() < 0.5 and np.abs(alone[0] - alone[1]).mean() > 5, step_cache


def test_sea_cache_is_for_wan(config: Config) -> None:
    sampling = config.sampling.model_copy(update={"step_cache": StepCache(sea=0.1)})
    config = config.model_copy(update={"sampling": sampling})
    if config.backbone.family == "wan":
        check_model(config)
    else:
        with pytest.raises(ProPhyError, match="of cogvideox does not tell; use first_block or taylorseer"):
            check_model(config)


def test_a_kernel_that_does_not_run_here_is_refused_before_anything_loads(config: Config) -> None:
    nowhere = {"attention": "_native_cudnn", "pretrained": "nowhere"}
    config = config.model_copy(update={"backbone": config.backbone.model_copy(update=nowhere)})
    with pytest.raises(ProPhyError, match="backbone.attention '_native_cudnn' needs an NVIDIA GPU"):
        VideoSampler(config)


def test_the_step_cache_is_the_operators_choice(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "sampling.step_cache.taylorseer=3")
    served = VideoRequest.parse({"prompt": "a ball"}, config, LIMITS).to_spec(config, LIMITS)
    assert served.step_cache == generate.video_spec(config, "a ball").step_cache == StepCache(taylorseer=3)
    with pytest.raises(ApiError, match="unknown field 'step_cache'"):
        VideoRequest.parse({"prompt": "a ball", "step_cache": {"taylorseer": 3}}, config, LIMITS)


def test_a_video_that_takes_too_much_memory_leaves_the_next_one_well(sampler: VideoSampler) -> None:
    spec = SPEC.model_copy(update={"num_inference_steps": 1})
    before = sampler.sample(spec)
    errors = [
        torch.OutOfMemoryError(),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ]
    taken: list[weakref.ref[torch.Tensor]] = []

    def fail(module: torch.nn.Module, arguments: tuple[Any, ...]) -> None:
        activations: Any = torch.zeros(1000)
        activations.self = activations  # which only the garbage collector frees
        taken.append(weakref.ref(activations))
        raise errors.pop()

    with sampler._pipeline.transformer.register_forward_pre_hook(fail):
        while errors:
            with pytest.raises(
                ProPhyError, match="5 frames of 32x32 pixels took more memory than there is; ask"
            ):
                sampler.sample(spec)
            assert taken.pop()() is None
    assert np.array_equal(sampler.sample(spec), before)
    sampler.check_device()
