"""`prophy export`: from a checkpoint of training to safetensors that need neither this run nor DeepSpeed.

What was trained alone (branch, adapter), as `serve` and `generate` take it, or a complete pipeline in
diffusers' layout, which loads like any other. What was trained is written as it was trained, in float32, and
an adapter stays beside the backbone's weights: in bfloat16 most of what it adds to them would round away.
Tensors are read one by one and written file by file, and what was not trained is copied: nothing is ever in
memory as a whole, and no GPU is needed.
"""

import json
import logging
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipelines.config import Config
from pipelines.training.checkpoint import Checkpoint, find, latest, pinned
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import check_unchanged, download, is_hub_id, load_configs, takes_images
from prophy.errors import ProPhyError
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.checkpoint import write_branch, write_files
from prophy.models.physics_transformer import BRANCH
from prophy.models.weights import INDEX, WeightFiles

_TRANSFORMER = "transformer."  # begins the names of its parameters in training

_FORMAT = {"format": "pt"}  # which diffusers looks for

logger = logging.getLogger(__name__)


def run(config: Config, output: Path, step: int | Literal["best"] | None, complete: bool) -> Path:
    """Writes what was trained, its moving average if there is one, into `output`.

    Args:
        config: the run.
        output: a folder that does not exist yet.
        step: which checkpoint; "best" is that of the lowest held-out loss; the latest if None.
        complete: a whole pipeline instead of branch and adapter alone.

    Raises:
        ProPhyError: no such checkpoint, or a damaged one; the folder exists, or cannot be written; or the
            backbone is not the one that was trained.
    """
    if output.exists():
        raise ProPhyError(f"{output} exists; choose another folder for the export")
    checkpoint = _open(config.checkpoints, step)
    if complete:
        check_unchanged(checkpoint.folder, _backbone(checkpoint), config.backbone.pretrained)
    with writing_model(output) as folder:
        if complete:
            _export_pipeline(config, checkpoint, folder)
        else:
            export_branch(checkpoint, folder)
    logger.info(
        "exported step %d; the backbone's weights %s: %s",
        checkpoint.step,
        _backbone_says(checkpoint),
        output,
    )
    return output


def export_branch(checkpoint: Checkpoint, folder: Path) -> None:
    """Writes what was trained, or its moving average if there is one, as `load_branch` reads it."""
    write_branch(
        folder,
        checkpoint.run["physics"],
        _backbone(checkpoint),
        checkpoint.run["lora"],
        {name.removeprefix(_TRANSFORMER): shape for name, shape in checkpoint.shapes.items()},
        lambda name: _trained(checkpoint, name),
    )


@contextmanager
def writing_model(folder: Path) -> Iterator[Path]:
    """A place to write a model to, which becomes `folder` when the block ends.

    Raises:
        ProPhyError: it cannot be written, or `folder` is there by then and not empty.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # left by a process that was killed
        yield partial
        partial.rename(folder)
    except (OSError, SafetensorError) as error:
        reason = error.args[0][0][-1] if isinstance(error, shutil.Error) else error  # one file of many
        raise ProPhyError(
            f"cannot export to {folder}: {reason}; mend that, and run the same command again"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _open(root: Path, step: int | Literal["best"] | None) -> Checkpoint:
    if step == "best":
        if "best" not in pinned(root):
            raise ProPhyError(
                f"no checkpoint in {root} was measured on held-out clips, and kept; set train.num_held_out "
                f"and train.keep_best, or give the number of a step"
            )
        step = pinned(root)["best"]
    checkpoint = latest(root) if step is None else find(root, step)
    if checkpoint is None:
        which = "checkpoint" if step is None else f"undamaged checkpoint of step {step}"
        raise ProPhyError(f"no {which} in {root}; run `prophy train` with this configuration first")
    return checkpoint


def _backbone(checkpoint: Checkpoint) -> dict[str, str | None]:
    return checkpoint.run["backbone"]


def _export_pipeline(config: Config, checkpoint: Checkpoint, output: Path) -> None:
    backbone, classes = config.backbone, FAMILIES[config.backbone.family].classes()
    revision = _backbone(checkpoint)["revision"]
    source = download(backbone.pretrained, revision)

    # 1. What is not the transformer's is taken as it is; its files too, unless they hold what was trained
    shutil.copytree(source, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "README.md"))
    folder = output / "transformer"
    weights = WeightFiles(source / "transformer")
    weight_map: dict[str, str] = {}
    trained = {name.removeprefix(_TRANSFORMER): shape for name, shape in checkpoint.shapes.items()}
    for file in sorted(set(weights.files.values())):
        own = [name for name, place in weights.files.items() if place == file]
        names = {name: _name_beside_an_adapter(checkpoint, name) for name in own}
        if any(name in trained or name != names[name] for name in own):
            (folder / file).unlink()  # it may be a link
            tensors = {
                names[name]: _trained(checkpoint, name) if name in trained else weights.read(name)
                for name in own
            }
            save_file(tensors, folder / file, _FORMAT)
        weight_map |= dict.fromkeys(names.values(), file)

    # 2. Branch and adapter, as more files of the transformer
    new = {name: shape for name, shape in trained.items() if name not in weights.files}
    weight_map |= write_files(
        folder, "physics_branch{suffix}.safetensors", new, lambda name: _trained(checkpoint, name)
    )
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))

    # 3. Configurations that name our classes
    _, transformer = load_configs(backbone.family, backbone.pretrained, revision)
    pipeline = _pipeline_class(config)
    ours = classes.prophy_transformer
    lora = checkpoint.run["lora"] or {}
    said = {
        "physics": checkpoint.run["physics"],
        **{f"lora_{key}": value for key, value in lora.items()},
        "_class_name": ours.__name__,
    }
    _write_json(folder / "config.json", {**transformer, **said})
    model_index = json.loads((source / "model_index.json").read_text())
    model_index |= {
        "_class_name": pipeline.__name__,
        "transformer": [ours.__module__, ours.__name__],
        "max_sequence_length": backbone.max_sequence_length,
    }
    _write_json(output / "model_index.json", model_index)
    (output / "README.md").write_text(_model_card(config, checkpoint))


def _pipeline_class(config: Config) -> type[PhysicsPipeline]:
    backbone = config.backbone
    images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
    return FAMILIES[backbone.family].classes().pipeline_for(images)


def _trained(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """What was trained of a name in the transformer, or its moving average."""
    return checkpoint.tensor("ema" if "ema" in checkpoint.kinds else "parameter", _TRANSFORMER + name)


def _name_beside_an_adapter(checkpoint: Checkpoint, name: str) -> str:
    """What peft calls a tensor of the backbone: another name where the layer has an adapter."""
    layer, _, attribute = name.rpartition(".")
    has_adapter = f"{_TRANSFORMER}{layer}.lora_A.default.weight" in checkpoint.shapes
    return f"{layer}.base_layer.{attribute}" if has_adapter else name


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n")


def _backbone_says(checkpoint: Checkpoint) -> str:
    """What became of the backbone's weights."""
    if lora := checkpoint.run["lora"]:
        rank, alpha = lora["rank"], lora["alpha"]
        return f"are unchanged, beside an adapter (LoRA) of rank {rank} and alpha {alpha}, which is not fused"
    if all(name.startswith(_TRANSFORMER + BRANCH) for name in checkpoint.shapes):
        return "are unchanged"
    return "were trained too, and are float32"


def _model_card(config: Config, checkpoint: Checkpoint) -> str:
    name, physics = _backbone(checkpoint)["name"], checkpoint.run["physics"]
    pipeline = _pipeline_class(config)
    kind = "text" if pipeline is FAMILIES[config.backbone.family].classes().pipeline else "image"
    base_model = f"base_model: {name}\n" if is_hub_id(str(name)) else ""
    revision = _backbone(checkpoint)["revision"]
    blocks = (
        f"Physical Blocks beside the layers {physics['physics_layers']},"
        if physics["physical_blocks"]
        else "No Physical Blocks,"
    )
    return f"""---
library_name: diffusers
pipeline_tag: {kind}-to-video
{base_model}---
# {Path(str(name)).name} with a Physical Branch (ProPhy)

Trained for {checkpoint.step} steps with `prophy train` on {name}{f" at {revision}" if revision else ""}; the
backbone's weights {_backbone_says(checkpoint)}. {blocks}
{physics["num_semantic_experts"]} semantic and {physics["num_refinement_experts"]} refinement experts
({physics["top_k"]} per token). The method is that of https://arxiv.org/abs/2512.05564. The backbone's licence
holds for its weights.

```python
from {pipeline.__module__} import {pipeline.__name__}

pipeline = {pipeline.__name__}.from_pretrained("this/folder")
```
"""
