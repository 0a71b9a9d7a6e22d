import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel
from PIL import Image

from prophy.backbones.loading import load_pipeline
from prophy.errors import ProPhyError
from prophy.pretraining.backbone import BackboneRecipe, pretrain_backbone
from prophy.tiny.pipeline import TRANSFORMER, VAE

SMALL = {
    "num_clips": 3,
    "num_held_out": 2,
    "num_samples": 1,
    "batch_size": 2,
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


def test_no_vae_is_a_mistake_of_the_user(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="run `prophy pretrain vae`"):
        pretrain_backbone(tmp_path, BackboneRecipe(num_steps=1))
