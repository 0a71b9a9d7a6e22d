from pathlib import Path

import pytest
import torch

from prophy.backbones.registry import load_pipeline
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.tiny.pipeline import TRANSFORMER


@pytest.mark.parametrize("name", ["nobody/nothing", "{empty}"])
def test_a_name_that_is_no_model(name: str, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="cannot load"):
        load_pipeline("wan", name.format(empty=tmp_path), None, torch.float32, None)


def test_a_branch_of_another_backbone_is_refused(tmp_path: Path) -> None:
    transformer = ProPhyWanTransformer3DModel(
        **TRANSFORMER | {"num_layers": 1}, physics_layers=(0,), latent_shape=(5, 16, 16)
    )
    save_branch(transformer, tmp_path, {"name": "another", "revision": None, "fingerprint": "0"})
    with pytest.raises(ProPhyError, match=r"another backbone \(another\) than tiny"):
        load_pipeline("wan", "tiny", None, torch.float32, tmp_path)
