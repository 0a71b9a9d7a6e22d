import shutil
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKLWan, WanTransformer3DModel

from prophy.backbones import (
    BACKBONES,
    encoders_fingerprint,
    fingerprint,
    load_pipeline,
    pinned_revision,
    resolve_pretrained,
)
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.tiny.pipeline import TRANSFORMER, VAE, pipeline_folder

TRANSFORMER_CONFIG = {"patch_size": [1, 2, 2]}


def test_shapes_are_what_the_networks_make() -> None:
    wan = BACKBONES["wan"]
    with torch.device("meta"):
        vae, transformer = AutoencoderKLWan(**VAE), WanTransformer3DModel(**TRANSFORMER)
        latents = vae.encode(torch.empty(1, 3, 17, 64, 64)).latent_dist.mean
    shape = wan.latent_shape(17, 64, 64, vae.config, TRANSFORMER_CONFIG)
    assert shape == tuple(latents.shape[2:]) == (5, 16, 16)
    grid = wan.token_grid(shape, transformer.config)
    assert grid == tuple(transformer.patch_embedding(latents).shape[2:]) == (5, 8, 8)
    # The published configuration leaves the factors out.
    assert wan.latent_shape(81, 480, 832, {"z_dim": 16}, TRANSFORMER_CONFIG) == (21, 60, 104)


def test_a_hub_id_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repository = 40 * "a", tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert pinned_revision("someone/model", None) == pinned_revision("someone/model", "main") == commit
    assert pinned_revision("tiny", None) is None
    with pytest.raises(ProPhyError, match="someone/other"):
        pinned_revision("someone/other", None)


@pytest.mark.parametrize(("frames", "height"), [(16, 64), (17, 66)])
def test_clips_that_do_not_fit_the_vae(frames: int, height: int) -> None:
    with pytest.raises(ProPhyError, match=rf"cannot encode {frames} frames of {height}x64"):
        BACKBONES["wan"].latent_shape(frames, height, 64, VAE, TRANSFORMER_CONFIG)


def test_latents_that_do_not_fit_the_patches() -> None:
    with pytest.raises(ProPhyError, match=r"patches of \(1, 2, 2\)"):
        BACKBONES["wan"].token_grid((5, 15, 16), TRANSFORMER_CONFIG)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    source = pipeline_folder() / "scheduler"
    shutil.copytree(source, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy"), None) == fingerprint(str(source), None)
    with (tmp_path / "copy" / "scheduler_config.json").open("a") as file:
        file.write("\n")
    assert fingerprint(str(tmp_path / "copy"), None) != fingerprint(str(source), None)


def test_fingerprint_of_encoders_leaves_the_transformer_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder(), tmp_path / "copy"))
    names = [str(folder), "tiny"]
    assert not {encoders_fingerprint(name, None) for name in names} & {fingerprint(n, None) for n in names}
    first, whole = encoders_fingerprint(str(folder), None), fingerprint(str(folder), None)
    for part, matters in {
        "transformer": False,
        "scheduler": False,
        "vae": True,
        "text_encoder": True,
        "tokenizer": True,
    }.items():
        [file, *_] = sorted((folder / part).iterdir())
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert (encoders_fingerprint(str(folder), None) != first) == matters
        assert fingerprint(str(folder), None) != whole
        file.write_bytes(content)


def test_a_name_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no folder ./nowhere"):
        resolve_pretrained("./nowhere")
    for load in (
        fingerprint,
        encoders_fingerprint,
        lambda name, revision: load_pipeline("wan", name, revision, torch.float32, None),
    ):
        with pytest.raises(ProPhyError, match="cannot load nobody/nothing"):
            load("nobody/nothing", None)
    with pytest.raises(ProPhyError, match="cannot load"):
        load_pipeline("wan", str(tmp_path), None, torch.float32, None)


def test_a_branch_of_another_backbone_is_refused(tmp_path: Path) -> None:
    transformer = ProPhyWanTransformer3DModel(
        **TRANSFORMER | {"num_layers": 1}, physics_layers=(0,), latent_shape=(5, 16, 16)
    )
    save_branch(transformer, tmp_path, {"name": "another", "revision": None, "fingerprint": "0"})
    with pytest.raises(ProPhyError, match=r"another backbone \(another\) than tiny"):
        load_pipeline("wan", "tiny", None, torch.float32, tmp_path)
