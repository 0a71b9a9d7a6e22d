import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image

from prophy.backbones.loading import load_pipeline
from prophy.errors import ProPhyError
from prophy.pretraining.backbone import BackboneRecipe, _losses, _timesteps, pretrain_backbone
from prophy.tiny.pipeline import TRANSFORMER, VAE
from prophy.tiny.text import TEXT_DIM, write_text_encoder
from prophy.training.objectives import FlowMatching

pytestmark = pytest.mark.heavy

SMALL: dict[str, Any] = {
    "num_clips": 3,
    "num_held_out": 2,
    "num_samples": 1,
    "batch_size": 2,
    "micro_batch_size": 1,
    "validate_every": 4,
}


@pytest.fixture(scope="module", autouse=True)
def narrow() -> Iterator[None]:
    """Two narrow blocks and a narrow VAE: what is tested is the training."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VAE, "base_dim", 8)
        for name, value in {"num_attention_heads": 2, "ffn_dim": 128, "num_layers": 2}.items():
            patch.setitem(TRANSFORMER, name, value)
        yield


@pytest.fixture(scope="module")
def trained(narrow: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone")
    AutoencoderKLWan(**VAE).save_pretrained(folder / "vae")
    write_text_encoder(folder / "text_encoder", ["a red ball falls and bounces on the left"])
    pretrain_backbone(folder, BackboneRecipe(num_steps=8, warmup_steps=1, **SMALL))
    return folder


def test_writes_a_transformer_for_the_pipeline_and_its_measurements(trained: Path) -> None:
    transformer = WanTransformer3DModel.from_pretrained(trained / "transformer")
    pipeline = load_pipeline(
        "wan", str(trained / "pipeline"), None, torch.float32, None, transformer=transformer
    )
    assert pipeline.transformer is transformer
    measured = json.loads((trained / "transformer.json").read_text())
    assert len(measured["validation_by_noise"]) == 3
    assert measured["seconds_per_video"] > 0
    with Image.open(trained / "transformer.png") as sheet:
        assert sheet.height > 64


def test_validation_falls(trained: Path) -> None:
    history = torch.load(trained / "transformer.pt")["progress"]["history"]
    first, last = (entry["validation"] for entry in history if "validation" in entry)
    assert last < first


def test_goes_on_from_its_checkpoint(trained: Path) -> None:
    """A finished run that is given more steps takes only those."""
    before = WanTransformer3DModel.from_pretrained(trained / "transformer").state_dict()
    progress = pretrain_backbone(trained, BackboneRecipe(num_steps=10, warmup_steps=1, **SMALL))
    after = WanTransformer3DModel.from_pretrained(trained / "transformer").state_dict()
    assert len(progress.history) == 10
    assert any(not torch.equal(after[name], value) for name, value in before.items())


@pytest.mark.parametrize("part", ["vae", "text_encoder"])
def test_a_missing_part_is_a_mistake_of_the_user(part: str, tmp_path: Path) -> None:
    for other in {"vae", "text_encoder"} - {part}:
        (tmp_path / other).mkdir()
    with pytest.raises(ProPhyError, match=f"run `prophy pretrain {part}`"):
        pretrain_backbone(tmp_path, BackboneRecipe(num_steps=1))


def test_begins_with_another_transformer(trained: Path, tmp_path: Path) -> None:
    for part in ("vae", "text_encoder", "clips", "encodings"):
        shutil.copytree(trained / part, tmp_path / part)
    recipe = BackboneRecipe(num_steps=1, start_from=trained / "transformer", learning_rate=0.0, **SMALL)
    pretrain_backbone(tmp_path, recipe)
    expected = WanTransformer3DModel.from_pretrained(trained / "transformer").state_dict()
    actual = WanTransformer3DModel.from_pretrained(tmp_path / "transformer").state_dict()
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def test_a_given_frame_is_seen_without_noise_and_not_asked_for() -> None:
    """Its noise changes nothing, and its tokens are at timestep 0."""
    transformer = WanTransformer3DModel(**TRANSFORMER).eval()
    generator = torch.Generator().manual_seed(0)
    latents, noise, other = (torch.randn(2, 16, 5, 16, 16, generator=generator) for _ in range(3))
    other[:, :, 1:] = noise[:, :, 1:]
    fixed = {
        "latents": latents,
        "text": torch.randn(2, 32, TEXT_DIM, generator=generator),
        "timesteps": torch.tensor([300.0, 900.0]),
        "given": torch.tensor([True, False]),
    }
    timesteps = []
    handle = transformer.register_forward_pre_hook(lambda _, inputs: timesteps.append(inputs[1]))
    with torch.no_grad():
        one, two = (_losses(transformer, FlowMatching(3.0), noise=each, **fixed) for each in (noise, other))
    handle.remove()
    assert one[0] == two[0] and one[1] != two[1]
    assert timesteps[0].shape == (2, 5 * 8 * 8)
    assert (timesteps[0][0, :64] == 0).all() and (timesteps[0][0, 64:] == 300).all()
    assert (timesteps[0][1] == 900).all()


def test_timesteps_leave_no_part_of_the_range_without_samples() -> None:
    recipe = BackboneRecipe(num_steps=1)
    rng = np.random.default_rng(0)
    drawn = torch.cat([_timesteps(FlowMatching(3.0), recipe, rng) for _ in range(400)]) / 1000
    assert drawn.min() > 0 and drawn.max() < 1
    assert 0.2 < (drawn > 0.96).float().mean() < 0.27
    assert (drawn < 0.2).float().mean() > 0.02
