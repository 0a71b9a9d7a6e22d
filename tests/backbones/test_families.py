import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from prophy.backbones.families import FAMILIES
from prophy.errors import ProPhyError
from prophy.tiny.pipeline import TRANSFORMER, VAE

TRANSFORMER_CONFIG = {"patch_size": [1, 2, 2]}


def test_shapes_are_what_the_networks_make() -> None:
    wan = FAMILIES["wan"]
    with torch.device("meta"):
        vae, transformer = AutoencoderKLWan(**VAE), WanTransformer3DModel(**TRANSFORMER)
        latents = vae.encode(torch.empty(1, 3, 17, 64, 64)).latent_dist.mean
    shape = wan.latent_shape(17, 64, 64, vae.config, TRANSFORMER_CONFIG)
    assert shape == tuple(latents.shape[2:]) == (5, 16, 16)
    grid = wan.token_grid(shape, transformer.config)
    assert grid == tuple(transformer.patch_embedding(latents).shape[2:]) == (5, 8, 8)
    # The published configuration leaves the factors out.
    assert wan.latent_shape(81, 480, 832, {"z_dim": 16}, TRANSFORMER_CONFIG) == (21, 60, 104)


@pytest.mark.parametrize(("frames", "height"), [(16, 64), (17, 66)])
def test_clips_that_do_not_fit_the_vae(frames: int, height: int) -> None:
    with pytest.raises(ProPhyError, match=rf"cannot encode {frames} frames of {height}x64"):
        FAMILIES["wan"].latent_shape(frames, height, 64, VAE, TRANSFORMER_CONFIG)


def test_latents_that_do_not_fit_the_patches() -> None:
    with pytest.raises(ProPhyError, match=r"patches of \(1, 2, 2\)"):
        FAMILIES["wan"].token_grid((5, 15, 16), TRANSFORMER_CONFIG)
