import copy
import json
from pathlib import Path

import pytest
import torch
from diffusers import ModelMixin

from prophy.errors import ProPhyError
from prophy.models.checkpoint import load_branch, save_branch
from prophy.models.description import trained_on
from prophy.models.physics_config import BranchConfig
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel

from .conftest import BASELINES, PHYSICS

BACKBONE = {"name": "some/backbone", "revision": None, "fingerprint": "abc"}


def test_save_and_load(awakened: ProPhyWanTransformer3DModel, tmp_path: Path) -> None:
    save_branch(awakened, tmp_path / "model", BACKBONE)
    checkpoint = load_branch(tmp_path / "model")
    assert checkpoint.backbone == trained_on(tmp_path / "model") == BACKBONE
    assert checkpoint.physics["physics_layers"] == PHYSICS["physics_layers"]
    expected = {f"physics_branch.{key}": value for key, value in awakened.physics_branch.state_dict().items()}
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state_dict[key], value) for key, value in expected.items())


def test_an_adapter_is_diffusers_own(backbone: ModelMixin, inputs: dict, tmp_path: Path) -> None:
    """A run that trains an adapter alone writes a file that diffusers loads without this project."""
    plain = copy.deepcopy(backbone)
    model = ProPhyWanTransformer3DModel.from_transformer(backbone, PHYSICS | BASELINES["lora"])
    model.add_lora(rank=4, alpha=8)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    save_branch(model, tmp_path, BACKBONE)
    checkpoint = load_branch(tmp_path)
    assert checkpoint.lora == {"rank": 4, "alpha": 8}
    expected = {name: value for name, value in model.state_dict().items() if "lora_" in name}
    assert checkpoint.state_dict.keys() == expected.keys()
    assert all(torch.equal(checkpoint.state_dict[name], value) for name, value in expected.items())
    plain.load_lora_adapter(
        tmp_path,
        prefix="transformer",
        weight_name="pytorch_lora_weights.safetensors",
        use_safetensors=True,
    )
    assert torch.equal(plain(**inputs).sample, model(**inputs).sample)


def test_a_folder_without_a_branch(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no trained branch in .*`model` folder"):
        load_branch(tmp_path)


def test_a_training_checkpoint_is_no_branch(tmp_path: Path) -> None:
    (tmp_path / "rank-00000-of-00001.safetensors").touch()
    with pytest.raises(ProPhyError, match="is a training checkpoint, .*`prophy export` makes a branch of it"):
        load_branch(tmp_path)


def test_a_branch_that_names_no_phenomena_is_refused(transformer: PhysicsTransformer, tmp_path: Path) -> None:
    save_branch(transformer, tmp_path, {"name": "x", "revision": None, "fingerprint": "0"})
    file = tmp_path / "physics_branch.json"
    description = json.loads(file.read_text())
    description["physics"]["num_phenomena"] = len(description["physics"].pop("phenomena"))
    file.write_text(json.dumps(description))
    with pytest.raises(ProPhyError, match="replace that key by the list phenomena"):
        load_branch(tmp_path)


@pytest.mark.parametrize(
    ("content", "wrong"), [("{", "no JSON object"), ("[1]", "no JSON object"), ("{}", "holds no physics")]
)
def test_a_damaged_description_is_named(
    transformer: PhysicsTransformer, tmp_path: Path, content: str, wrong: str
) -> None:
    save_branch(transformer, tmp_path, {"name": "x", "revision": None, "fingerprint": "0"})
    (tmp_path / "physics_branch.json").write_text(content)
    with pytest.raises(ProPhyError, match=f"physics_branch.json .*{wrong}.*; export the branch anew"):
        load_branch(tmp_path)


def test_settings_that_no_branch_has(transformer: PhysicsTransformer) -> None:
    for wrong, message in (
        ({"top_k": 5}, r"top_k \(5\) must not exceed num_refinement_experts \(4\)"),
        ({"dropout": 0.1}, "physics says: dropout"),
        ({"phenomena": ["a", "b", "a"]}, "physics says: phenomena: 2 phenomena have the name 'a'"),
    ):
        with pytest.raises(ProPhyError, match=message):
            BranchConfig.read(PHYSICS | wrong)
