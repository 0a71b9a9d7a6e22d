"""Videos of images beside upstream's pipelines, at tiny random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DiffusionPipeline, WanImageToVideoPipeline, WanPipeline
from PIL import Image

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.errors import ProPhyError
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.generation.pipeline_wan_i2v import ProPhyWanImageToVideoPipeline
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.wan import I2V_SEQUENCE_LENGTH, MAX_SEQUENCE_LENGTH, write_i2v, write_ti2v
from tests.wisa import PHENOMENA


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_ti2v(tmp_path_factory.mktemp("ti2v"))


@pytest.fixture(scope="module")
def pictures() -> list[Image.Image]:
    pixels = np.random.default_rng(0).integers(0, 256, (2, 32, 64, 3), dtype=np.uint8)
    return [Image.fromarray(picture) for picture in pixels]


@pytest.fixture
def pipeline(folder: Path) -> ProPhyWanPipeline:
    """With an untrained branch."""
    bare = load_pipeline("wan", str(folder), None, torch.float32, None)
    torch.manual_seed(0)
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        bare.transformer, {"physics_layers": (0, 2), "latent_shape": (2, 2, 4), "phenomena": PHENOMENA}
    )
    bare.register_modules(transformer=transformer.eval())
    return bare


def awaken(pipeline: ProPhyWanPipeline) -> None:
    """Gives the branch weights as after training."""
    torch.manual_seed(1)
    for block in pipeline.transformer.physics_branch.blocks:
        torch.nn.init.normal_(block.injection.weight, std=0.3)


def sample(pipeline: DiffusionPipeline, prompt: str | list[str] = "a red ball falls", **kwargs: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    arguments: dict[str, Any] = {"generator": generator, "output_type": "np", "num_frames": 5}
    arguments |= {"max_sequence_length": MAX_SEQUENCE_LENGTH} | kwargs
    return pipeline(
        prompt=prompt,
        height=32,
        width=64,
        num_inference_steps=2,
        **arguments,
    ).frames


def as_tensor(*pictures: Image.Image) -> torch.Tensor:
    """`[B, 3, H, W]` in [0, 1]."""
    pixels = np.stack([np.asarray(picture) for picture in pictures])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255


def test_an_untrained_branch_changes_no_video_of_text_or_image(
    folder: Path, pipeline: ProPhyWanPipeline, pictures: list[Image.Image]
) -> None:
    of_text = sample(WanPipeline.from_pretrained(folder))
    of_image = sample(WanImageToVideoPipeline.from_pretrained(folder), image=pictures[0])
    assert of_text.shape == of_image.shape == (1, 5, 32, 64, 3)
    images = pipeline.for_images()
    assert isinstance(images, ProPhyWanImageToVideoPipeline)
    for _ in range(2):
        assert np.array_equal(sample(pipeline), of_text)
        assert np.array_equal(sample(images, image=pictures[0]), of_image)
    assert np.array_equal(sample(images, image=as_tensor(pictures[0])), of_image)
    awaken(pipeline)  # the two share their transformer
    assert not np.array_equal(sample(images, image=pictures[0]), of_image)
    off = PhysicsControl(scale=0.0)
    assert np.array_equal(sample(images, image=pictures[0], physics=off), of_image)
    assert np.array_equal(sample(pipeline, physics=off), of_text)


def test_the_first_latent_of_the_video_is_the_images(
    pipeline: ProPhyWanPipeline, pictures: list[Image.Image]
) -> None:
    awaken(pipeline)
    latents = sample(pipeline.for_images(), image=pictures[0], output_type="latent")
    vae = pipeline.vae
    with torch.no_grad():
        encoded = vae.encode(as_tensor(pictures[0])[:, :, None] * 2 - 1).latent_dist.mode()
    mean, std = (
        torch.tensor(value).view(1, -1, 1, 1, 1)
        for value in (vae.config.latents_mean, vae.config.latents_std)
    )
    torch.testing.assert_close(latents[:, :, :1], (encoded - mean) / std)


def test_each_video_of_a_batch_begins_with_its_own_image(
    pipeline: ProPhyWanPipeline, pictures: list[Image.Image]
) -> None:
    awaken(pipeline)
    images, prompts = pipeline.for_images(), ["a red ball falls", "ice melts"]
    generators = [torch.Generator().manual_seed(seed) for seed in range(2)]
    together = sample(images, prompts, image=as_tensor(*pictures), generator=generators)
    for index in range(2):
        generator = torch.Generator().manual_seed(index)
        alone = sample(images, prompts[index], image=pictures[index], generator=generator)
        np.testing.assert_allclose(together[index], alone[0], atol=1e-5)
    assert np.abs(together[0] - together[1]).max() > 1e-3


@pytest.fixture(scope="module")
def i2v(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_i2v(tmp_path_factory.mktemp("i2v"))


def test_a_model_of_images_alone_makes_upstreams_videos(i2v: Path, pictures: list[Image.Image]) -> None:
    """Also before it has learnt anything, and of what a cache holds of the image."""
    length: dict[str, Any] = {"max_sequence_length": I2V_SEQUENCE_LENGTH}
    expected = sample(WanImageToVideoPipeline.from_pretrained(i2v), image=pictures[0], **length)
    bare = load_pipeline("wan", str(i2v), None, torch.float32, None)
    assert isinstance(bare, ProPhyWanImageToVideoPipeline) and bare.for_images() is bare
    for image in (pictures[0], as_tensor(pictures[0])):
        assert np.array_equal(sample(bare, image=image, **length), expected)
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        bare.transformer, {"physics_layers": (0, 2), "latent_shape": (2, 4, 8), "phenomena": PHENOMENA}
    )
    bare.register_modules(transformer=transformer.eval())
    assert np.array_equal(sample(bare, image=pictures[0], **length), expected)
    awaken(bare)
    assert not np.array_equal(sample(bare, image=pictures[0], **length), expected)
    with pytest.raises(ProPhyError, match="one image at a time; set generate.batch_size to 1"):
        sample(bare, ["a", "b"], image=as_tensor(*pictures), **length)


def test_a_cache_holds_what_the_pipeline_hands_to_the_transformer(
    i2v: Path, pictures: list[Image.Image]
) -> None:
    bare, seen = load_pipeline("wan", str(i2v), None, torch.float32, None), []
    bare.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    sample(bare, image=pictures[0], max_sequence_length=I2V_SEQUENCE_LENGTH)
    encoder = VideoEncoder(str(i2v), None, "float32", None, I2V_SEQUENCE_LENGTH, "wan")
    frames = np.stack([np.stack([np.asarray(picture)] * 5) for picture in pictures])
    frames[:, 1:] = 0  # of which nothing is seen
    image = encoder.encode_image(frames)
    assert {name: tuple(value.shape) for name, value in image.items()} == {
        "image_latents": (2, 6, 2, 4, 8),
        "image_embeds": (2, 257, 8),
    }
    assert torch.equal(seen[0]["encoder_hidden_states_image"], image["image_embeds"][:1])
    torch.testing.assert_close(seen[0]["hidden_states"][:, -6:], image["image_latents"][:1])


def test_texts_of_another_length_are_refused(i2v: Path) -> None:
    with pytest.raises(ProPhyError, match="max_sequence_length, which is 32, to 512"):
        VideoEncoder(str(i2v), None, "float32", None, 32, "wan")


def test_a_trace_of_a_video_of_an_image_sees_the_conditional_passes(
    pipeline: ProPhyWanPipeline, pictures: list[Image.Image]
) -> None:
    trace = PhysicsTrace()
    sample(pipeline.for_images(), image=pictures[0], physics=PhysicsControl(trace=trace))
    assert trace.num_passes == 2 and trace.phenomenon_maps.shape == (1, 2, 1, 2, 17)
