"""CogVideoX's videos of images beside upstream's pipeline, at tiny random weights."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import CogVideoXImageToVideoPipeline, DiffusionPipeline
from PIL import Image

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.generation.pipeline_cogvideox_i2v import ProPhyCogVideoXImageToVideoPipeline
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.transformer_cogvideox import ProPhyCogVideoXTransformer3DModel
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_i2v
from tests.wisa import PHENOMENA

# 5 frames are 2 latent ones; 1.5, whose patches hold two, encodes 8k + 1.
KINDS: dict[str, tuple[int, dict[str, Any]]] = {
    "5b": (5, {}),
    "1.5-5b": (9, {"patch_size_t": 2, "patch_bias": False, "ofs_embed_dim": 8}),
}


@pytest.fixture(scope="module")
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 64, 3), dtype=np.uint8))


def sample(pipeline: DiffusionPipeline, image: Any, num_frames: int, **kwargs: Any) -> np.ndarray:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline(
        image=image,
        prompt="a red ball falls",
        height=32,
        width=64,
        num_frames=num_frames,
        num_inference_steps=2,
        max_sequence_length=MAX_SEQUENCE_LENGTH,
        generator=torch.Generator().manual_seed(0),
        output_type="np",
        **kwargs,
    ).frames


@pytest.mark.parametrize("kind", KINDS)
def test_an_untrained_branch_changes_no_video(kind: str, image: Image.Image, tmp_path: Path) -> None:
    num_frames, settings = KINDS[kind]
    folder = write_i2v(tmp_path, **settings)
    expected = sample(CogVideoXImageToVideoPipeline.from_pretrained(folder), image, num_frames)
    pipeline = load_pipeline("cogvideox", str(folder), None, torch.float32, None)
    assert isinstance(pipeline, ProPhyCogVideoXImageToVideoPipeline) and pipeline.for_images() is pipeline
    as_tensor = torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1)[None].float() / 255
    for given in (image, as_tensor):
        assert np.array_equal(sample(pipeline, given, num_frames), expected)
    torch.manual_seed(0)
    transformer: Any = ProPhyCogVideoXTransformer3DModel.from_transformer(
        pipeline.transformer, {"physics_layers": (0, 2), "latent_shape": (2, 8, 16), "phenomena": PHENOMENA}
    )
    pipeline.register_modules(transformer=transformer.eval())
    assert np.array_equal(sample(pipeline, image, num_frames), expected)
    for block in transformer.physics_branch.blocks:
        torch.nn.init.normal_(block.injection.weight, std=0.3)
    trace = PhysicsTrace()
    video = sample(pipeline, image, num_frames, physics=PhysicsControl(trace=trace))
    assert not np.array_equal(video, expected) and trace.num_passes == 2
    assert trace.phenomenon_maps.shape[0] == 1


@pytest.mark.parametrize("kind", KINDS)
def test_a_cache_holds_what_the_pipeline_hands_to_the_transformer(
    kind: str, image: Image.Image, tmp_path: Path
) -> None:
    """But for the noise of the posterior, whose mean is cached."""
    num_frames, settings = KINDS[kind]
    folder, seen = write_i2v(tmp_path, **settings), []
    pipeline = load_pipeline("cogvideox", str(folder), None, torch.float32, None)
    last: Any = pipeline.vae.encoder.conv_out.conv
    last.weight.data[4:] = 0
    last.bias.data[4:] = -30.0  # logarithm of the variance: a sample is the mean
    pipeline.save_pretrained(folder)
    pipeline.transformer.register_forward_pre_hook(lambda _, __, given: seen.append(given), with_kwargs=True)
    sample(pipeline, image, num_frames, guidance_scale=1.0)

    encoder = VideoEncoder(str(folder), None, "float32", None, MAX_SEQUENCE_LENGTH, "cogvideox")
    frames = np.stack([np.asarray(image)] * num_frames)[None]
    cached = encoder.encode_image(frames)
    assert cached.keys() == {"image_latents"} and cached["image_latents"].shape == (1, 4, 1, 8, 16)
    transformer = ProPhyCogVideoXTransformer3DModel.from_transformer(
        pipeline.transformer, {"physics_layers": (0,), "latent_shape": (2, 8, 16), "phenomena": PHENOMENA}
    )
    given = seen[0]
    latents = given["hidden_states"].transpose(1, 2)[:, :4]
    expected = pipeline.transformer(**{**given, "return_dict": True}).sample.transpose(1, 2)
    text = {"prompt_embeds": given["encoder_hidden_states"], **cached}
    output = transformer.predict(latents, given["timestep"], text)
    torch.testing.assert_close(output.sample, expected, rtol=1e-4, atol=1e-5)
    routing = transformer.route(latents, given["timestep"], text)
    assert torch.equal(routing.phenomenon_maps, output.routing.phenomenon_maps)
