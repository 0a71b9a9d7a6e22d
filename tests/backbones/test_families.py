import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from pipelines.config import load_config
from pipelines.generation.limits import check_model
from pipelines.training.data import clip_shape
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import load_configs
from prophy.errors import ProPhyError
from prophy.tiny.pipeline import TRANSFORMER, VAE, pipeline_folder

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


def _copy(folder: Path, pipeline: dict[str, Any], transformer: dict[str, Any]) -> str:
    """The configurations of the embedded pipeline with other values, and no weights."""
    for file, changed in (("model_index.json", pipeline), ("transformer/config.json", transformer)):
        content = json.loads((pipeline_folder() / file).read_text()) | changed
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content))
    shutil.copytree(pipeline_folder() / "vae", folder / "vae", ignore=shutil.ignore_patterns("*.safetensors"))
    return str(folder)


TWO = {"transformer_2": ["diffusers", "WanTransformer3DModel"]}
# By what is wrong: what Wan2.2 and image-to-video pipelines say otherwise than Wan2.1's text-to-video.
UNSUPPORTED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "has two transformers and no boundary_ratio": (TWO, {}),
    "between a first and a last image": ({}, {"in_channels": 36, "pos_embed_seq_len": 514}),
    "reads 32 channels beside the latents": ({}, {"in_channels": 48}),
    "is a WanVACEPipeline, and": ({"_class_name": "WanVACEPipeline"}, {}),
    "is a CogVideoXPipeline, and": ({"_class_name": "CogVideoXPipeline"}, {}),
}


@pytest.mark.parametrize("reason", UNSUPPORTED)
def test_what_a_family_cannot_do_is_refused_before_anything_loads(reason: str, tmp_path: Path) -> None:
    folder = _copy(tmp_path, *UNSUPPORTED[reason])
    config = load_config("tiny", [f"backbone.pretrained={folder}", "checkpoint=null"])
    # What caching, training and planning, generating and serving, and loading look at first.
    for look in (
        lambda: load_configs("wan", folder, None),
        lambda: clip_shape(config.backbone, 17, 64, 64),
        lambda: check_model(config),
        lambda: load_pipeline("wan", folder, None, torch.float32, None),
    ):
        with pytest.raises(ProPhyError, match=reason) as error:
            look()
        assert str(error.value).startswith(folder) and "choose another backbone.pretrained" in str(
            error.value
        )


def test_a_place_for_a_second_transformer_is_no_second_transformer(tmp_path: Path) -> None:
    vae, _ = load_configs("wan", _copy(tmp_path, {"transformer_2": [None, None]}, {}), None)
    assert vae["z_dim"] == 16
