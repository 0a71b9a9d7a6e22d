"""Wan2.2-A14B at tiny random weights: a branch beside each transformer, from clips to videos, without Ray."""

import itertools
import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline, WanPipeline
from PIL import Image

from pipelines.config import Config, StepCache, load_config
from pipelines.evaluation.contestants import enter
from pipelines.generation.limits import check_model, model_fingerprint, shape_limits
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import MAPS_FILE, PhysicsSpec, VideoSpec
from pipelines.training import export
from pipelines.training import train as train_command
from pipelines.training.data import build_dataset
from pipelines.training.evaluation import held_out_losses
from pipelines.training.model import build_module
from pipelines.training.plan import make_plan
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.description import branches_in
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.training.cache import PriorCache
from tests.backbones.small_cache import write_cache
from tests.backbones.small_training import alike, last_checkpoint, save_checkpoint, train, with_backbone
from tests.conftest import tiny_config
from tests.wan import MAX_SEQUENCE_LENGTH, write_a14b
from tests.wisa import PHENOMENA

CAPTIONS = ("a red ball falls", "a candle burns", "ice", "smoke on the left")
SPEC = VideoSpec(
    prompt="a red ball falls",
    negative_prompt="",
    seed=1,
    num_frames=5,
    height=32,
    width=32,
    fps=8.0,
    num_inference_steps=5,
    guidance_scale=3.0,
)
HIGH_STEPS = 3  # of these five: their timesteps are above 875


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_a14b(tmp_path_factory.mktemp("a14b") / "backbone", WanPipeline)


def config_of(backbone: Path, expert: str) -> Config:
    """A run of its own, with the cache that both share."""
    folder = backbone.parent
    return tiny_config(
        folder / expert,
        f"backbone.pretrained={backbone}",
        f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}",
        "backbone.height=32",
        "backbone.width=32",
        "backbone.autocast=null",
        f"cache.output={folder / 'cache'}",
        "physics.physics_layers=[0,2]",
        "checkpoint=null",
        f"train.expert={expert}",
        "train.start_from=null",
        "train.precision=fp32",
        "train.num_workers=1",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "train.lora_rank=4",
        "train.num_held_out=1",
    )


@pytest.fixture(scope="module")
def high(backbone: Path) -> Config:
    return config_of(backbone, "high_noise")


@pytest.fixture(scope="module")
def low(backbone: Path) -> Config:
    return with_backbone(config_of(backbone, "low_noise"), "lora")


@pytest.fixture(scope="module")
def cache(high: Config) -> PriorCache:
    return write_cache(high, CAPTIONS)


@pytest.fixture(scope="module")
def trained(high: Config, low: Config, cache: PriorCache) -> dict[str, Path]:
    """Exports, by what they hold; the branch for low noise has an adapter beside it."""
    for config in (high, low):
        save_checkpoint(config, train(config, cache))
    folder = high.run_dir.parent / "exports"
    return {
        "high_noise": (one := export.run(high, folder / "high_noise", None, complete=False)),
        "low_noise": export.run(low, folder / "low_noise", None, complete=False),
        "both": export.run(low, folder / "both", None, complete=False, other=one),
        "complete": export.run(low, folder / "complete", None, complete=True, other=one),
    }


def sampler_of(config: Config, checkpoint: Path | None, **backbone: Any) -> VideoSampler:
    changed = config.backbone.model_copy(update=backbone)
    return VideoSampler(
        config.model_copy(update={"checkpoint": checkpoint and str(checkpoint), "backbone": changed})
    )


@pytest.mark.parametrize("upstream", [WanPipeline, WanImageToVideoPipeline])
def test_untrained_branches_make_upstreams_videos(
    upstream: type[WanPipeline] | type[WanImageToVideoPipeline], tmp_path: Path
) -> None:
    folder = write_a14b(tmp_path, upstream)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))
    image = {} if upstream is WanPipeline else {"image": picture}

    def sample(pipeline: Any, **kwargs: Any) -> np.ndarray:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(
            prompt="a red ball falls",
            height=32,
            width=64,
            num_frames=5,
            num_inference_steps=5,
            max_sequence_length=MAX_SEQUENCE_LENGTH,
            generator=torch.Generator().manual_seed(0),
            **image,
            **kwargs,
        ).frames

    pipeline: Any = load_pipeline("wan", str(folder), None, torch.float32, None)
    assert isinstance(pipeline, upstream) and len(pipeline.transformers) == 2
    # Of the same weights in memory: kernels round by where those lie.
    expected = sample(upstream(**pipeline.components, boundary_ratio=pipeline.config.boundary_ratio))
    assert np.array_equal(sample(pipeline), expected)
    physics = {"physics_layers": (0, 2), "latent_shape": (2, 4, 8), "phenomena": PHENOMENA}
    for name in ("transformer", "transformer_2"):
        grown = ProPhyWanTransformer3DModel.from_transformer(getattr(pipeline, name), physics).eval()
        pipeline.register_modules(**{name: grown})
        assert np.array_equal(sample(pipeline), expected)
    videos = [expected]
    for transformer in pipeline.transformers:
        for block in transformer.physics_branch.blocks:
            torch.nn.init.normal_(block.injection.weight, std=0.3)
        videos.append(sample(pipeline))
        assert np.array_equal(sample(pipeline, physics=PhysicsControl(scale=0.0)), expected)
    assert len({video.tobytes() for video in videos}) == 3


@pytest.mark.parametrize(("expert", "how"), [("high_noise", "frozen"), ("low_noise", "full")])
def test_training_needs_the_files_of_its_own_transformer_alone(
    expert: str, how: str, cache: PriorCache, backbone: Path, tmp_path: Path
) -> None:
    other, own = "transformer_2", "transformer"
    if expert == "low_noise":
        other, own = own, other
    without = shutil.copytree(backbone, tmp_path / "backbone")
    [file] = (without / other).glob("*.safetensors")
    file.unlink()
    config = with_backbone(config_of(backbone, expert), how)
    config = config.model_copy(
        update={"backbone": config.backbone.model_copy(update={"pretrained": str(without)})}
    )
    module = build_module(config, cache.null_text(), cache.phenomena)
    pipeline: Any = load_pipeline("wan", str(backbone), None, torch.float32, None)
    weights = {
        module.transformer.backbone_name(name): value for name, value in module.transformer.named_parameters()
    }
    for name, value in getattr(pipeline, own).named_parameters():
        assert torch.equal(weights[name], value)
    [batch], _ = build_dataset(config, cache, rank=0)[0]
    timesteps = module.objective.timesteps(batch.timestep_quantile)
    assert ((timesteps >= 875) == (expert == "high_noise")).all()
    train = config.train.model_copy(
        update={"noise_levels": (0.9, 0.95) if expert == "high_noise" else (0.4, 0.5)}
    )
    of_some = build_module(config.model_copy(update={"train": train}), cache.null_text(), cache.phenomena)
    least, most = (1000 * level for level in train.noise_levels)
    timesteps = of_some.objective.timesteps(torch.linspace(0, 1, 9))
    assert timesteps.tolist()[::8] == pytest.approx([least, most]) and (timesteps.diff() > 0).all()


def test_a_run_resumes_and_is_measured_at_its_own_levels(
    high: Config, low: Config, cache: PriorCache, trained: dict[str, Path]
) -> None:
    for config in (high, low):
        checkpoint = last_checkpoint(config)
        assert checkpoint is not None and checkpoint.run["backbone"]["expert"] == config.train.expert
        resumed = build_module(config, cache.null_text(), cache.phenomena, checkpoint)
        for name, value in resumed.named_parameters():
            if value.requires_grad:
                assert torch.equal(value, checkpoint.tensor("parameter", name))
        losses = held_out_losses(config, cache, trained[str(config.train.expert)])
        assert np.isfinite(losses["loss"]) and losses["token_alignment"] > 0
    again = high.model_copy(
        update={"train": high.train.model_copy(update={"start_from": str(trained["both"])})}
    )
    started = build_module(again, cache.null_text(), cache.phenomena)
    checkpoint = last_checkpoint(high)
    assert checkpoint is not None
    assert all(
        torch.equal(value, checkpoint.tensor("parameter", name))
        for name, value in started.named_parameters()
        if value.requires_grad
    )


def test_either_branch_or_both_make_videos(high: Config, trained: dict[str, Path]) -> None:
    videos = {"bare": sampler_of(high, None).sample(SPEC)}
    for name in ("high_noise", "low_noise", "both"):
        own = high.model_copy(update={"checkpoint": str(trained[name])})
        check_model(own)
        assert shape_limits(own).phenomena == PHENOMENA
        videos[name] = sampler_of(high, trained[name]).sample(SPEC)
    complete = high.model_copy(
        update={"backbone": high.backbone.model_copy(update={"pretrained": str(trained["complete"])})}
    )
    check_model(complete)
    assert shape_limits(complete).phenomena == PHENOMENA
    assert alike(VideoSampler(complete).sample(SPEC), videos["both"])
    for one, other in itertools.combinations(videos.values(), 2):
        assert not alike(one, other)
    card = (trained["complete"] / "README.md").read_text()
    assert "for low noise" in card and "The other transformer has a branch of its own" in card
    assert {*branches_in(trained["both"])} == {"high_noise", "low_noise"}


def test_knobs_and_maps_are_those_of_the_transformers_that_have_a_branch(
    high: Config, trained: dict[str, Path]
) -> None:
    bare = sampler_of(high, None).sample(SPEC)
    off = SPEC.model_copy(update={"physics": PhysicsSpec(scale=0.0)})
    stronger = SPEC.model_copy(update={"physics": PhysicsSpec(strength={PHENOMENA[0]: 5.0})})
    means = {}
    for name, num_steps in (("high_noise", HIGH_STEPS), ("low_noise", 5 - HIGH_STEPS), ("both", 5)):
        sampler, trace = sampler_of(high, trained[name]), PhysicsTrace()
        video = sampler.sample(SPEC, trace=trace)
        assert trace.num_passes == num_steps
        assert not np.array_equal(sampler.sample(stronger), video)
        # Its adapter stays where the branch for low noise is off.
        assert alike(sampler.sample(off), bare) == (name == "high_noise")
        means[name] = trace.phenomenon_maps
    assert means["both"].shape == (1, 2, 2, 2, len(PHENOMENA))

    spec = SPEC.model_copy(update={"num_inference_steps": 1, "physics": PhysicsSpec(return_maps=True)})
    maps = json.loads(sampler_of(high, trained["high_noise"]).render(spec).files[MAPS_FILE])
    assert {*maps["maps"]} == {*PHENOMENA}
    with pytest.raises(ProPhyError, match="none of the 1 steps fell to the transformer that has a branch"):
        sampler_of(high, trained["low_noise"]).render(spec)


@pytest.mark.heavy
def test_what_saves_time_or_memory_is_for_both_transformers(high: Config, trained: dict[str, Path]) -> None:
    sampler, runs = sampler_of(high, trained["both"]), Counter[int]()
    for index, transformer in enumerate(sampler._pipeline.transformers):
        transformer.blocks[1].attn1.register_forward_pre_hook(lambda *_, index=index: runs.update([index]))
    sampler.warm_up(shape_limits(high))
    assert {*runs} == {0, 1}
    spec = SPEC.model_copy(update={"num_inference_steps": 12})
    counts = []
    for step_cache in ({}, {"first_block": 1e9}, {"sea": 1e9}, {"taylorseer": 2}, {}):
        runs.clear()
        sampler.sample(spec.model_copy(update={"step_cache": StepCache(**step_cache)}))
        counts.append([runs[0], runs[1]])
    whole, *cached, after = counts
    assert whole == after and sum(whole) == 2 * 12
    assert all(count[index] < whole[index] for count in cached for index in (0, 1))

    offloading = sampler_of(high, trained["both"], offload="all")
    assert alike(offloading.sample(SPEC), sampler.sample(SPEC))
    small = sampler_of(high, trained["both"], storage_dtype="float8_e4m3fn")
    assert small.sample(SPEC).shape == (5, 32, 32, 3)
    for hooked, stored in zip(offloading._pipeline.transformers, small._pipeline.transformers, strict=True):
        assert any(hasattr(module, "_diffusers_hook") for module in hooked.modules())
        assert torch.float8_e4m3fn in {value.dtype for value in stored.parameters()}


def test_guidance_of_the_steps_of_low_noise(high: Config) -> None:
    sampler = sampler_of(high, None)
    expected = sampler.sample(SPEC)
    same, other = (
        sampler.sample(SPEC.model_copy(update={"guidance_scale_2": scale})) for scale in (3.0, 2.0)
    )
    assert np.array_equal(same, expected) and not alike(other, expected)
    wrong = load_config("tiny", ["sampling.guidance_scale_2=3"])
    with pytest.raises(ProPhyError, match="guidance_scale_2 is 3, but tiny has one transformer; set it to"):
        check_model(wrong)


def test_a_fingerprint_is_of_both_transformers(high: Config, backbone: Path, tmp_path: Path) -> None:
    assert fingerprint(str(backbone), None) in model_fingerprint(high)
    changed = shutil.copytree(backbone, tmp_path / "changed")
    [file] = (changed / "transformer_2").glob("*.safetensors")
    file.write_bytes(b"of another training")
    assert fingerprint(str(changed), None) != fingerprint(str(backbone), None)


@pytest.mark.heavy
def test_a_plan_trains_one_and_serves_both(high: Config) -> None:
    plan = make_plan(load_config("wan2.2-t2v-a14b"))
    assert plan.size.backbone == 14_288_491_584 and plan.size.trained == plan.size.branch
    # Two of 40 blocks, and a branch; no text encoder.
    branch = 2 * plan.size.branch
    assert branch < plan.footprint.transformers < branch + 2 * plan.size.backbone // 18
    assert plan.footprint.serving < 30e9
    for storage_dtype, item in ((None, 4), ("float8_e4m3fn", 1)):
        backbone = high.backbone.model_copy(update={"storage_dtype": storage_dtype})
        of_tiny = make_plan(high.model_copy(update={"backbone": backbone}))
        weights = item * of_tiny.size.backbone + 4 * of_tiny.size.branch
        assert of_tiny.footprint.transformers == 2 * weights


def test_mistakes(
    high: Config, low: Config, cache: PriorCache, trained: dict[str, Path], tmp_path: Path
) -> None:
    def training(config: Config, **values: Any) -> Config:
        return config.model_copy(update={"train": config.train.model_copy(update=values)})

    tiny = tiny_config(tmp_path / "run", "train.expert=low_noise")
    for use in (train_command.run, make_plan):
        with pytest.raises(ProPhyError, match="set train.expert to high_noise or low_noise"):
            use(training(high.model_copy(update={"run_dir": tmp_path / "run"}), expert=None))
        with pytest.raises(ProPhyError, match="low_noise, but tiny has one transformer; set it to null"):
            use(tiny)
        with pytest.raises(ProPhyError, match="is 0.1 to 0.9, and .* is for 0.875 to 1; set it within these"):
            here = {"run_dir": tmp_path / "run"}
            use(training(high.model_copy(update=here), noise_levels=(0.1, 0.9)))
    with pytest.raises(ProPhyError, match="trained on high_noise, and train.expert is low_noise; make them"):
        build_module(training(low, start_from=str(trained["high_noise"])), cache.null_text(), cache.phenomena)
    with pytest.raises(ProPhyError, match="holds no branch for high_noise, and this run trained the one"):
        export.run(low, tmp_path / "export", None, complete=False, other=trained["low_noise"])
    twice = tmp_path / "twice"
    for name in ("high_noise", "low_noise"):
        shutil.copytree(trained["high_noise"], twice / name)
    with pytest.raises(ProPhyError, match="both branches in .*twice were trained on high_noise"):
        check_model(high.model_copy(update={"checkpoint": str(twice)}))
    with pytest.raises(
        ProPhyError, match=r"two transformers, and clips .* set evaluate.measures to \[videos"
    ):
        enter(high)
    with pytest.raises(ProPhyError, match="is a complete export, which holds a trained branch"):
        make_plan(
            high.model_copy(
                update={"backbone": high.backbone.model_copy(update={"pretrained": str(trained["complete"])})}
            )
        )
