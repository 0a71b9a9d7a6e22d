"""`prophy export`: from a checkpoint of training to safetensors that need neither this run nor DeepSpeed.

The branch alone, as `serve` and `generate` take it, or a complete pipeline in diffusers' layout. Tensors are
read one by one and written file by file, and the backbone's files are copied: nothing is ever in memory as a
whole, and no GPU is needed.
"""

import json
import logging
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download
from safetensors import safe_open

from pipelines.checkpoint import Checkpoint, find, latest
from pipelines.config import Config
from prophy.backbones import BACKBONES, fingerprint, load_configs, resolve_pretrained
from prophy.errors import ProPhyError
from prophy.models.checkpoint import write_branch, write_files

_BRANCH = "transformer.physics_branch."  # begins the names of its parameters in training
_INDEX = "diffusion_pytorch_model.safetensors.index.json"

logger = logging.getLogger(__name__)


def run(config: Config, output: Path, step: int | None, complete: bool) -> Path:
    """Writes the trained branch, its moving average if there is one, into `output`.

    Args:
        config: the run.
        output: a folder that does not exist yet, or is empty.
        step: which checkpoint; the latest if None.
        complete: a whole pipeline instead of the branch alone.

    Raises:
        ProPhyError: no such checkpoint, or a damaged one; the folder is not empty; or the backbone is not
            the one that was trained.
    """
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise ProPhyError(f"{output} is not empty; choose another folder for the export")
    checkpoint = _open(config.checkpoints, step)
    backbone = config.backbone
    if (
        complete
        and fingerprint(backbone.pretrained, backbone.revision) != _backbone(checkpoint)["fingerprint"]
    ):
        raise ProPhyError(
            f"{checkpoint.folder} was trained on another backbone ({_backbone(checkpoint)['name']}) than "
            f"{backbone.pretrained}; set backbone.pretrained to that one"
        )
    if complete:
        _export_pipeline(config, checkpoint, output)
    else:
        export_branch(checkpoint, output)
    logger.info("exported step %d: %s", checkpoint.step, output)
    return output


def export_branch(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes the trained branch, or its moving average if there is one, as `load_branch` reads it."""
    kind = "ema" if "ema" in checkpoint.kinds else "parameter"
    shapes = {
        name.removeprefix(_BRANCH): shape
        for name, shape in checkpoint.shapes.items()
        if name.startswith(_BRANCH)
    }
    write_branch(
        folder,
        checkpoint.run["physics"],
        _backbone(checkpoint),
        shapes,
        lambda name: checkpoint.tensor(kind, _BRANCH + name),
    )


def _open(root: Path, step: int | None) -> Checkpoint:
    checkpoint = latest(root) if step is None else find(root, step)
    if checkpoint is None:
        which = "checkpoint" if step is None else f"undamaged checkpoint of step {step}"
        raise ProPhyError(f"no {which} in {root}; run `prophy train` with this configuration first")
    return checkpoint


def _backbone(checkpoint: Checkpoint) -> dict[str, str | None]:
    return checkpoint.run["backbone"]


def _export_pipeline(config: Config, checkpoint: Checkpoint, output: Path) -> None:
    backbone, family = config.backbone, BACKBONES[config.backbone.family]
    source = Path(resolve_pretrained(backbone.pretrained))
    if not source.is_dir():
        source = Path(snapshot_download(str(source), revision=backbone.revision))

    # 1. Everything but the transformer's index and the pipeline's is taken as it is
    shutil.copytree(source, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "README.md"))
    folder = output / "transformer"
    weight_map = _weight_map(folder)

    # 2. The branch, as more files of the transformer
    kind = "ema" if "ema" in checkpoint.kinds else "parameter"
    names = {name.removeprefix("transformer."): name for name in checkpoint.shapes}
    shapes = {own: checkpoint.shapes[name] for own, name in names.items()}
    weight_map |= write_files(
        folder, "physics_branch{suffix}.safetensors", shapes, lambda own: checkpoint.tensor(kind, names[own])
    )
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=1))

    # 3. Configurations that name our classes
    _, transformer = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    ours = family.prophy_transformer
    _write_json(
        folder / "config.json", {**transformer, **checkpoint.run["physics"], "_class_name": ours.__name__}
    )
    model_index = json.loads((source / "model_index.json").read_text())
    model_index |= {
        "_class_name": family.pipeline.__name__,
        "transformer": [ours.__module__, ours.__name__],
        "max_sequence_length": backbone.max_sequence_length,
    }
    _write_json(output / "model_index.json", model_index)
    (output / "README.md").write_text(_model_card(config, checkpoint))


def _weight_map(folder: Path) -> dict[str, str]:
    """File of each tensor of the backbone, from its index, or from its only file."""
    if (folder / _INDEX).is_file():
        return json.loads((folder / _INDEX).read_text())["weight_map"]
    file = "diffusion_pytorch_model.safetensors"
    with safe_open(folder / file, "pt") as tensors:
        return dict.fromkeys(tensors.keys(), file)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _model_card(config: Config, checkpoint: Checkpoint) -> str:
    name, physics = _backbone(checkpoint)["name"], checkpoint.run["physics"]
    pipeline = BACKBONES[config.backbone.family].pipeline
    base_model = "" if name == "tiny" or Path(str(name)).is_dir() else f"base_model: {name}\n"
    revision = _backbone(checkpoint)["revision"]
    return f"""---
library_name: diffusers
pipeline_tag: text-to-video
{base_model}---
# {Path(str(name)).name} with a Physical Branch (ProPhy)

Trained for {checkpoint.step} steps with `prophy train` on {name}{f" at {revision}" if revision else ""}; the
backbone's weights are unchanged. Physical Blocks beside the layers {physics["physics_layers"]},
{physics["num_semantic_experts"]} semantic and {physics["num_refinement_experts"]} refinement experts
({physics["top_k"]} per token). The method is that of https://arxiv.org/abs/2512.05564. The backbone's licence
holds for its weights.

```python
from {pipeline.__module__} import {pipeline.__name__}

pipeline = {pipeline.__name__}.from_pretrained("this/folder")
```
"""
