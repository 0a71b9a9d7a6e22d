"""A run with two checkpoints, which no training has made, to export."""

import pytest
import torch

from pipelines.config import Config
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.saving import Fragment, Save
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import fingerprint
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.backbones.small_training import one_rank
from tests.conftest import tiny_config
from tests.wisa import PHENOMENA

PARTS = {"vae": None, "text_encoder": None, "tokenizer": None}


@pytest.fixture(scope="module")
def transformer() -> ProPhyWanTransformer3DModel:
    """As after training."""
    torch.manual_seed(0)
    backbone = load_pipeline("wan", "tiny", None, torch.float32, None, **PARTS).transformer
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        backbone, {"physics_layers": [0, 4], "latent_shape": [5, 16, 16], "phenomena": PHENOMENA}
    )
    torch.nn.init.normal_(transformer.physics_branch.refinement_injection.weight)
    return transformer


@pytest.fixture(scope="module")
def trained(transformer: ProPhyWanTransformer3DModel, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Step 7 is the transformer, every parameter in two fragments; the average of step 8 is twice that."""
    config = tiny_config(tmp_path_factory.mktemp("export") / "run")
    parameters = {
        f"transformer.physics_branch.{k}": v for k, v in transformer.physics_branch.named_parameters()
    }
    backbone = {"name": "tiny", "revision": None, "fingerprint": fingerprint("tiny", None)}
    run = {"backbone": backbone, "physics": transformer.config["physics"], "lora": None}
    for step, kinds in ((7, {"parameter": 1}), (8, {"parameter": 1, "ema": 2})):
        parts = []
        for name, parameter in parameters.items():
            flat = {kind: factor * parameter.detach().flatten() for kind, factor in kinds.items()}
            middle = parameter.numel() // 3
            parts += [
                Fragment(name, 0, {kind: value[:middle] for kind, value in flat.items()}),
                Fragment(name, middle, {kind: value[middle:] for kind, value in flat.items()}),
            ]
        shapes = {name: parameter.shape for name, parameter in parameters.items()}
        with one_rank():
            Save(FolderStore(config.checkpoints), step, parts, shapes, run).commit(num_to_keep=2)
    return config
