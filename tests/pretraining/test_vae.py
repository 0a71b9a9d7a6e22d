import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan
from PIL import Image

from prophy.pretraining.muon import Muon, orthogonalise
from prophy.pretraining.vae import VaeRecipe, pretrain_vae

pytestmark = pytest.mark.heavy

SMALL = {"num_clips": 4, "num_held_out": 2, "crop_batch_size": 1, "crop_frames": 5, "crop_size": 16}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return AutoencoderKLWan.from_pretrained(folder / "vae").state_dict()


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of five steps, the last of them on a whole clip."""
    folder = tmp_path_factory.mktemp("whole")
    pretrain_vae(folder, VaeRecipe(num_steps=5, **SMALL))
    return folder


def test_writes_a_vae_that_is_measured_and_normalises_its_latents(whole: Path) -> None:
    vae = AutoencoderKLWan.from_pretrained(whole / "vae")
    measured = json.loads((whole / "vae.json").read_text())
    assert measured["parameters"] == sum(parameter.numel() for parameter in vae.parameters())
    assert measured["psnr_worst_clip_db"] <= measured["psnr_db"]
    assert measured["seconds"] > 0
    assert len(set(vae.config.latents_std)) > 1, "measured, not the default"
    with Image.open(whole / "vae.png") as sheet:
        assert sheet.height > 4 * 64


@pytest.mark.slow
def test_goes_on_where_it_was_cut_off_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    recipe = VaeRecipe(num_steps=5, **SMALL)
    with pytest.raises(KeyboardInterrupt), pytest.MonkeyPatch.context() as patch:
        patch.setattr("prophy.pretraining.recipe._SECONDS_BETWEEN_CHECKPOINTS", 0.0)
        patch.setattr("prophy.pretraining.vae._whole_clips", _interrupt)
        pretrain_vae(tmp_path, recipe)
    assert not (tmp_path / "vae").exists()
    progress = pretrain_vae(tmp_path, recipe)
    assert len(progress.history) == 5
    expected, actual = weights(whole), weights(tmp_path)
    assert all(torch.equal(actual[name], value) for name, value in expected.items())


def _interrupt(*_: object) -> None:
    raise KeyboardInterrupt


def test_learns_to_reconstruct(tmp_path: Path) -> None:
    recipe = VaeRecipe(num_steps=30, crops_share=1.0, **SMALL)
    history = pretrain_vae(tmp_path, recipe).history
    errors = [entry["l1"] for entry in history]
    assert sum(errors[-10:]) < 0.8 * sum(errors[:10])


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (8, 8)])
def test_orthogonalised_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalise(matrix))
    assert values.min() > 0.5
    assert values.max() < 1.3


def test_muon_treats_a_kernel_as_a_matrix() -> None:
    generator = torch.Generator().manual_seed(0)
    kernel = torch.randn(4, 3, 2, 2, generator=generator)
    gradient = torch.randn(kernel.shape, generator=generator)
    results = []
    for shape in (kernel.shape, (4, 12)):
        parameter = torch.nn.Parameter(kernel.clone().view(shape))
        optimiser = Muon([parameter], lr=0.1, weight_decay=0.01)
        for _ in range(2):
            parameter.grad = gradient.view(shape).clone()
            optimiser.step()
        results.append(parameter.detach().view(kernel.shape))
    assert torch.equal(*results)
    assert not torch.allclose(results[0], kernel, atol=0.05)
