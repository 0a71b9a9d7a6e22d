"""The published configurations with a branch, on the meta device: their sizes, and whose keys are whose."""

import pytest
import torch
from diffusers import AutoencoderKLWan

from pipelines.config import load_config
from pipelines.training.model import branch_config
from prophy.backbones.families import FAMILIES, Expert
from tests.wisa import PHENOMENA

TRANSFORMER = {"patch_size": (1, 2, 2)}
# By preset: parameters of the published model; latents and tokens of a clip.
PUBLISHED: dict[str, tuple[int, tuple[int, ...], tuple[int, ...]]] = {
    "wan2.1-1.3b": (1_418_996_800, (21, 60, 104), (21, 30, 52)),
    "wan2.1-14b": (14_288_491_584, (21, 60, 104), (21, 30, 52)),
    "wan2.1-i2v-14b": (16_394_878_784, (21, 60, 104), (21, 30, 52)),
    "wan2.2-ti2v-5b": (4_999_787_712, (31, 44, 80), (31, 22, 40)),
    # Of each of the two; image latents and a mask are 20 channels more.
    "wan2.2-t2v-a14b": (14_288_491_584, (21, 60, 104), (21, 30, 52)),
    "wan2.2-i2v-a14b": (14_288_491_584 + 20 * 4 * 5120, (21, 60, 104), (21, 30, 52)),
    "cogvideox-2b": (1_693_783_872, (13, 60, 90), (13, 30, 45)),
    "cogvideox-5b": (5_570_283_072, (13, 60, 90), (13, 30, 45)),
    "cogvideox-5b-i2v": (5_570_479_680, (13, 60, 90), (13, 30, 45)),
    "cogvideox1.5-5b-i2v": (5_571_594_880, (22, 96, 170), (11, 48, 85)),
    "cogvideox1.5-5b": (5_570_676_352, (22, 96, 170), (11, 48, 85)),
}


@pytest.mark.parametrize("preset", PUBLISHED)
def test_published_configuration(preset: str) -> None:
    num_parameters, latents, tokens = PUBLISHED[preset]
    config = load_config(preset)
    clip, family = config.backbone, FAMILIES[config.backbone.family]
    published, classes = family.published[clip.pretrained], family.classes()
    with torch.device("meta"):
        upstream = classes.transformer(**published.transformer)
        shape = family.latent_shape(clip.num_frames, clip.height, clip.width, published.vae, upstream.config)
        model = classes.prophy_transformer(
            **published.transformer, physics=branch_config(config.physics, shape, PHENOMENA).model_dump()
        )
    assert shape == latents and family.token_grid(shape, upstream.config) == tokens

    assert sum(parameter.numel() for parameter in upstream.parameters()) == num_parameters
    own = {name: value.shape for name, value in model.state_dict().items()}
    expected = {name: value.shape for name, value in upstream.state_dict().items()}
    assert {name: own[name] for name in own if not name.startswith("physics_branch.")} == expected
    num_layers = len(config.physics.physics_layers)
    assert num_layers == len(model.physics_branch.blocks)
    # The branch is mostly its blocks, each of which is one of the backbone's.
    block = sum(p.numel() for p in getattr(upstream, model._block_list)[0].parameters())
    branch = sum(p.numel() for p in model.physics_branch.parameters())
    assert num_layers * block < branch < (num_layers + 3) * block


def test_the_transformers_of_a14b_share_all_noise_between_them() -> None:
    for name, boundary in (("T2V", 0.875), ("I2V", 0.9)):
        published = FAMILIES["wan"].published[f"Wan-AI/Wan2.2-{name}-A14B-Diffusers"]
        assert (
            FAMILIES["wan"].unsupported(published.pipeline, {"in_channels": 16, "out_channels": 16}) is None
        )
        assert FAMILIES["wan"].experts(published.pipeline) == {
            "high_noise": Expert("transformer", (boundary, 1.0)),
            "low_noise": Expert("transformer_2", (0.0, boundary)),
        }


def test_the_vae_of_ti2v_makes_what_its_record_says() -> None:
    settings = FAMILIES["wan"].published["Wan-AI/Wan2.2-TI2V-5B-Diffusers"].vae
    with torch.device("meta"):
        vae = AutoencoderKLWan(**settings)
        latents = vae.encode(torch.empty(1, 3, 9, 64, 96)).latent_dist.mean
    assert sum(parameter.numel() for parameter in vae.parameters()) == 704_688_668
    assert latents.shape == (1, 48, *FAMILIES["wan"].latent_shape(9, 64, 96, settings, TRANSFORMER))
