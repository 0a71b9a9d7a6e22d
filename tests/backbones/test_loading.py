"""Pipelines and what was trained for them: an adapter is served as it was trained, whatever the precision."""

from pathlib import Path

import numpy as np
import pytest
import torch

from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline, vae_dtype
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.tiny.pipeline import TRANSFORMER
from tests.cogvideox import write_pipeline

PARTS = {"vae": None, "text_encoder": None, "tokenizer": None}
NO_BRANCH = {"physical_blocks": False, "num_semantic_experts": 0, "num_refinement_experts": 0}


@pytest.mark.parametrize("name", ["nobody/nothing", "{empty}"])
def test_a_name_that_is_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="cannot load"):
        load_pipeline("wan", name.format(empty=tmp_path), None, torch.float32, None)


def test_a_branch_of_another_backbone_is_refused(tmp_path: Path) -> None:
    transformer = ProPhyWanTransformer3DModel(
        **TRANSFORMER | {"num_layers": 1},
        physics={"physics_layers": [0], "latent_shape": [5, 16, 16], "phenomena": ["melting"]},
    )
    save_branch(transformer, tmp_path, {"name": "another", "revision": None, "fingerprint": "0"})
    with pytest.raises(ProPhyError, match=r"another backbone \(another\) than tiny"):
        load_pipeline("wan", "tiny", None, torch.float32, tmp_path)


def test_the_vae_has_the_precision_that_upstream_wants(tmp_path: Path) -> None:
    """And where a frame is larger than CogVideoX's was made for, it is taken in tiles."""
    folder = str(write_pipeline(tmp_path / "backbone"))
    cpu = torch.device("cpu")
    exact, rounded = (
        VideoEncoder(folder, None, dtype, None, 16, "cogvideox") for dtype in ("float32", "bfloat16")
    )
    vaes = [encoder._pipeline.vae for encoder in (exact, rounded)]
    assert [vae.dtype for vae in vaes] == [torch.float32, vae_dtype("cogvideox", torch.bfloat16, cpu)]
    assert vae_dtype("wan", torch.bfloat16, cpu) == torch.float32
    assert (vaes[0].use_tiling, vaes[0].tile_sample_min_height, vaes[0].tile_sample_min_width) == (
        True,
        480,
        720,
    )

    frames = np.random.default_rng(0).integers(0, 256, (1, 5, 32, 32, 3), dtype=np.uint8)
    latents = exact.encode_video(frames)
    difference = (rounded.encode_video(frames) - latents).square().mean() / latents.square().mean()
    print(f"CogVideoX's VAE in {vaes[1].dtype}: latents differ by {difference.sqrt():.1%}")
    assert difference.sqrt() < 0.05
    vaes[0].enable_tiling(24, 24)  # as of a larger frame
    tiled = exact.encode_video(frames)
    assert tiled.shape == latents.shape and not torch.equal(tiled, latents)


def predict(transformer: PhysicsTransformer) -> torch.Tensor:
    generator, channels = torch.Generator().manual_seed(1), transformer.config.in_channels
    latents = torch.randn(1, channels, 2, 4, 4, generator=generator).to(transformer.dtype)
    embeds = torch.randn(1, 5, transformer.config[transformer._text_dim], generator=generator)
    text = {transformer.semantic_text: embeds.to(transformer.dtype)}
    return transformer.predict(latents, torch.tensor([500]), text).sample


@torch.no_grad()
@pytest.mark.parametrize("family", ["wan", "cogvideox"])
def test_an_adapter_is_served_in_bfloat16_as_it_was_trained(family: str, tmp_path: Path) -> None:
    """After a few steps its part of a weight is below the precision of that weight."""
    pretrained = "tiny" if family == "wan" else str(write_pipeline(tmp_path / "backbone"))
    pipeline = load_pipeline(family, pretrained, None, torch.bfloat16, None, **PARTS)
    trained = (
        FAMILIES[family]
        .classes()
        .prophy_transformer.from_transformer(
            pipeline.transformer,
            {"physics_layers": [0], "latent_shape": [2, 4, 4], "phenomena": ["melting"], **NO_BRANCH},
        )
    )
    trained.add_lora(rank=8, alpha=4)
    torch.manual_seed(0)
    changes = []
    for name, matrix in trained.named_parameters():
        if "lora_B" in name:
            weight = trained.get_parameter(name.replace("lora_B.default", "base_layer"))
            other = trained.get_parameter(name.replace("lora_B", "lora_A"))
            matrix.normal_()
            matrix.mul_(3e-4 * weight.float().norm() / (0.5 * matrix @ other).norm())
            changed = weight.float() + 0.5 * matrix @ other
            changes.append((changed.bfloat16() != weight).float().mean())
    assert max(changes) < 0.2, "fused, the adapter would leave most of the weights as they were"

    model = tmp_path / "model"
    save_branch(
        trained,
        model,
        {"name": pretrained, "revision": None, "fingerprint": fingerprint(pretrained, None)},
    )
    served = load_pipeline(family, pretrained, None, torch.bfloat16, model, **PARTS).transformer
    assert {value.dtype for name, value in served.named_parameters() if "lora_" in name} == {torch.bfloat16}
    with torch.autocast("cpu", torch.bfloat16):  # as training computes
        assert torch.equal(predict(served), predict(trained))
    # In float32 nothing is rounded but weights: what is kept of the adapter's effect is seen.
    effect, kept = predict(trained.float()), predict(served.float())
    trained.disable_adapters()
    bare = predict(trained)
    assert (kept - effect).norm() < 0.01 * (effect - bare).norm()
