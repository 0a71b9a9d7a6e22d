"""What a run may go on from: found out before Ray starts, and again by what builds the module."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from pipelines.config import Config
from pipelines.training import train
from pipelines.training.model import build_module
from pipelines.training.start import start_folder
from prophy.errors import ProPhyError
from prophy.tiny import bundled
from tests.conftest import tiny_config
from tests.wisa import PHENOMENA


def build(config: Config) -> object:
    return build_module(config, {"prompt_embeds": torch.zeros(32, 192)}, PHENOMENA)


@pytest.fixture
def branch(tmp_path: Path) -> Path:
    """A branch that the backbone was trained beside; so much of it as tells that."""
    folder = shutil.copytree(bundled("branch"), tmp_path / "branch")
    save_file({"patch_embedding.bias": torch.zeros(192)}, folder / "backbone-00001-of-00002.safetensors")
    return folder


@pytest.mark.parametrize("use", [train.run, build])
@pytest.mark.parametrize("backbone", ["frozen", "lora"])
def test_a_branch_beside_a_trained_backbone_is_for_such_runs(
    use: Callable[[Config], object], backbone: str, branch: Path, tmp_path: Path
) -> None:
    overrides = (f"train.start_from={branch}", f"train.backbone={backbone}")
    with pytest.raises(
        ProPhyError, match=f"the backbone was trained beside .* is '{backbone}'; set it to full"
    ):
        use(tiny_config(tmp_path / "run", *overrides))


def test_what_else_a_run_may_go_on_from(branch: Path, tmp_path: Path) -> None:
    def folder(*overrides: str) -> Path | None:
        return start_folder(tiny_config(tmp_path / "run", *overrides).train)

    assert folder("train.start_from=null") is None
    assert folder("train.start_from=tiny") == bundled("branch")
    assert folder(f"train.start_from={branch}", "train.backbone=full") == branch
