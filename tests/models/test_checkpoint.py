from pathlib import Path

import pytest
import torch

from prophy.errors import ProPhyError
from prophy.models.checkpoint import load_branch, save_branch, trained_on
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel

from .conftest import PHYSICS

BACKBONE = {"name": "some/backbone", "revision": None, "fingerprint": "abc"}


def test_save_and_load(awakened: ProPhyWanTransformer3DModel, tmp_path: Path) -> None:
    save_branch(awakened, tmp_path / "model", BACKBONE)
    checkpoint = load_branch(tmp_path / "model")
    assert checkpoint.backbone == trained_on(tmp_path / "model") == BACKBONE
    assert tuple(checkpoint.physics["physics_layers"]) == PHYSICS["physics_layers"]
    expected = awakened.physics_branch.state_dict()
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())


def test_a_folder_without_a_branch(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no trained branch"):
        load_branch(tmp_path)
