"""Every kind of model that takes images, from clips to videos, at tiny random weights and without Ray."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import WanImageToVideoPipeline
from PIL import Image

from pipelines.config import Config
from pipelines.generation.limits import check_model, shape_limits
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import VideoSpec
from pipelines.training import export
from pipelines.training.data import build_dataset
from pipelines.training.evaluation import held_out_losses
from pipelines.training.plan import make_plan
from pipelines.training.train import pin_backbone
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.training.cache import PriorCache
from tests import cogvideox, wan
from tests.backbones.small_cache import write_cache
from tests.backbones.small_training import alike, save_checkpoint, train, with_backbone
from tests.conftest import tiny_config

CAPTIONS = ("a red ball falls", "a candle burns", "ice", "smoke on the left")
COGVIDEOX_1_5 = {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8}
# By kind: family, what writes it, tokens of a text, and the tensors of an image that its cache holds.
KINDS: dict[str, tuple[str, Callable[[Path], Path], int, dict[str, tuple[int, ...]]]] = {
    "wan2.2-ti2v": ("wan", wan.write_ti2v, wan.MAX_SEQUENCE_LENGTH, {}),
    "wan2.1-i2v": (
        "wan",
        wan.write_i2v,
        wan.I2V_SEQUENCE_LENGTH,
        {"image_latents": (6, 5, 4, 4), "image_embeds": (257, 8)},
    ),
    "wan2.2-i2v-a14b": (
        "wan",
        lambda folder: wan.write_a14b(folder, WanImageToVideoPipeline),
        wan.MAX_SEQUENCE_LENGTH,
        {"image_latents": (6, 5, 4, 4)},
    ),
    "cogvideox-i2v": (
        "cogvideox",
        cogvideox.write_i2v,
        cogvideox.MAX_SEQUENCE_LENGTH,
        {"image_latents": (4, 1, 8, 8)},
    ),
    "cogvideox1.5-i2v": (
        "cogvideox",
        lambda folder: cogvideox.write_i2v(folder, **COGVIDEOX_1_5),
        cogvideox.MAX_SEQUENCE_LENGTH,
        {"image_latents": (4, 1, 8, 8)},
    ),
}


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def config(kind: str, tmp_path_factory: pytest.TempPathFactory) -> Config:
    family, write, length, _ = KINDS[kind]
    folder = tmp_path_factory.mktemp(kind)
    return tiny_config(
        folder / "run",
        f"backbone.family={family}",
        f"backbone.pretrained={write(folder / 'backbone')}",
        f"backbone.max_sequence_length={length}",
        "backbone.height=32",
        "backbone.width=32",
        "backbone.autocast=null",
        "physics.physics_layers=[0,2]",
        "checkpoint=null",
        "train.start_from=null",
        "train.precision=fp32",
        "train.num_workers=1",
        "train.global_batch_size=2",
        "train.micro_batch_size=2",
        "train.lora_rank=4",
        "train.num_held_out=1",
        f"train.expert={'high_noise' if 'a14b' in kind else 'null'}",
    )


@pytest.fixture(scope="module")
def cache(config: Config) -> PriorCache:
    return write_cache(config, CAPTIONS)


@pytest.fixture(scope="module")
def spec(config: Config) -> VideoSpec:
    return VideoSpec(
        prompt="a red ball falls",
        negative_prompt="",
        seed=1,
        num_frames=17,
        height=32,
        width=32,
        fps=8.0,
        num_inference_steps=2,
        guidance_scale=3.0,
    )


def image(seed: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 48, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "png")
    return buffer.getvalue()


def test_the_cache_holds_what_the_model_reads_of_the_first_frame(
    kind: str, config: Config, cache: PriorCache
) -> None:
    sample, expected = cache.read("0-clip"), KINDS[kind][3]
    tensors = {name: tuple(value.shape) for name, value in sample.text.items()}
    assert tensors.pop("prompt_embeds")[0] == config.backbone.max_sequence_length
    assert tensors == expected
    assert cache.null_text().keys() == {"prompt_embeds"}
    for name in expected:
        assert not torch.equal(cache.read("1-clip").text[name], sample.text[name])


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["frozen", "lora", "full"])
def test_what_was_trained_makes_videos_that_depend_on_the_image(
    kind: str, config: Config, cache: PriorCache, spec: VideoSpec, how: str
) -> None:
    folder = config.run_dir / how
    config = with_backbone(config, how)
    module = train(config, cache)
    save_branch(module.transformer, folder, pin_backbone(config))
    trained = config.model_copy(update={"checkpoint": str(folder)})
    losses = held_out_losses(config, cache, folder)
    assert np.isfinite(losses["loss"]) and losses["token_alignment"] > 0

    check_model(trained)
    limits, sampler, bare = shape_limits(trained), VideoSampler(trained), VideoSampler(config)
    sampler.warm_up(limits)
    frames = sampler.sample(spec, image=image(0))
    assert frames.shape == (17, 32, 32, 3)
    assert np.array_equal(sampler.sample(spec, image=image(0)), frames)
    assert not np.array_equal(sampler.sample(spec, image=image(1)), frames)
    if how != "full":  # what is saved of a backbone that was trained is the export's to write
        assert not np.array_equal(bare.sample(spec, image=image(0)), frames)
    of_text = VideoSpec(**spec.model_dump())
    if kind == "wan2.2-ti2v":
        limits.check_image(False, of_text.step_cache)
        assert not np.array_equal(sampler.sample(of_text), frames)
    else:
        with pytest.raises(ProPhyError, match="of images alone; give one"):
            limits.check_image(False, of_text.step_cache)
        with pytest.raises(ProPhyError, match="of images alone; give one"):
            sampler.sample(of_text)


@pytest.mark.heavy
@pytest.mark.parametrize("how", ["frozen", "lora", "full"])
def test_a_complete_export_makes_what_the_trained_branch_makes(
    kind: str, config: Config, cache: PriorCache, spec: VideoSpec, how: str, tmp_path: Path
) -> None:
    own = with_backbone(config, how).model_copy(update={"run_dir": tmp_path})
    save_checkpoint(own, train(own, cache))
    complete = export.run(own, tmp_path / "complete", None, complete=True)
    backbone = own.backbone.model_copy(update={"pretrained": str(complete)})
    frames = VideoSampler(own.model_copy(update={"backbone": backbone})).sample(spec, image=image(0))
    if how == "full":  # it is all that holds the trained backbone
        assert not alike(VideoSampler(own).sample(spec, image=image(0)), frames)
    else:
        trained = own.model_copy(
            update={"checkpoint": str(export.run(own, tmp_path / "branch", None, False))}
        )
        assert alike(VideoSampler(trained).sample(spec, image=image(0)), frames)


@pytest.mark.heavy
def test_its_training_can_be_planned(config: Config) -> None:
    plan = make_plan(config)
    assert plan.flops > 0 and plan.activations[True] > 0


def test_a_share_of_images_is_for_models_that_can_do_without(
    kind: str, config: Config, cache: PriorCache
) -> None:
    own = config.model_copy(update={"train": config.train.model_copy(update={"image_share": 0.75})})
    if kind == "wan2.2-ti2v":
        given = [build_dataset(own, cache, 0)[step][0][0].given for step in range(12)]
        assert 0.5 < torch.stack(given).float().mean() < 1
    else:
        with pytest.raises(ProPhyError, match="always takes an image; set it to null"):
            build_dataset(own, cache, 0)
        prompts = config.train.model_copy(update={"sample_prompts": ["a ball"]})
        with pytest.raises(ProPhyError, match=r"sample_prompts .* always takes an image; set them to \[\]"):
            build_dataset(config.model_copy(update={"train": prompts}), cache, 0)
