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
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from pipelines.config import Config
from pipelines.training.checkpoint import Checkpoint, find, latest, pinned
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import (
    check_unchanged,
    download,
    is_hub_id,
    load_configs,
    load_experts,
    takes_images,
)
from prophy.errors import ProPhyError
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.models.checkpoint import load_branch, write_branch, write_files
from prophy.models.description import ExpertName, branches_in, describe
from prophy.models.physics_transformer import BRANCH
from prophy.models.weights import INDEX, WeightFiles

_TRANSFORMER = "transformer."  # begins the names of its parameters in training

_FORMAT = {"format": "pt"}  # which diffusers looks for

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Trained:
    """What was trained beside one transformer, and the transformer too where that was.

    Attributes:
        physics: see `BranchCheckpoint`.
        lora: see `BranchCheckpoint`.
        shapes: each tensor's, by its name in the transformer.
        read: the tensor of a name.
    """

    physics: Mapping[str, Any]
    lora: Mapping[str, Any] | None
    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], torch.Tensor]


def run(
    config: Config,
    output: Path,
    step: int | Literal["best"] | None,
    complete: bool,
    other: Path | None = None,
) -> Path:
    """Writes what was trained, its moving average if there is one, into `output`.

    Args:
        config: the run.
        output: a folder that does not exist yet.
        step: which checkpoint; "best" is that of the lowest held-out loss; the latest if None.
        complete: a whole pipeline instead of branch and adapter alone.
        other: the branch of the backbone's other transformer, to go with this one.

    Raises:
        ProPhyError: no such checkpoint, or a damaged one; the folder exists, or cannot be written; the
            backbone is not the one that was trained; or `other` does not fit.
    """
    if output.exists():
        raise ProPhyError(f"{output} exists; choose another folder for the export")
    checkpoint = _open(config.checkpoints, step)
    beside = {} if other is None else _other_branch(checkpoint, other)
    if complete:
        check_unchanged(checkpoint.folder, _backbone(checkpoint), config.backbone.pretrained)
    with writing_model(output) as folder:
        if complete:
            _export_pipeline(config, checkpoint, beside, folder)
        elif beside:
            export_branch(checkpoint, folder / str(_expert(checkpoint)))
            for name, branch in beside.items():
                shutil.copytree(branch, folder / name)
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
    trained = _trained(checkpoint)
    write_branch(
        folder,
        checkpoint.run["physics"],
        _backbone(checkpoint),
        checkpoint.run["lora"],
        trained.shapes,
        trained.read,
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


def _expert(checkpoint: Checkpoint) -> ExpertName | None:
    """The transformer that was trained, of a backbone with two."""
    return _backbone(checkpoint).get("expert")  # type: ignore[return-value]  # of what is in a file


def _other_branch(checkpoint: Checkpoint, folder: Path) -> dict[ExpertName, Path]:
    """Where the branch for the other transformer of the backbone lies in `folder`, by its name.

    Raises:
        ProPhyError: the backbone has one, or there is no such branch, or it is of another backbone, or has
            other phenomena.
    """
    backbone, own = _backbone(checkpoint), _expert(checkpoint)
    if own is None:
        raise ProPhyError(f"{backbone['name']} has one transformer, and so one branch; leave --with out")
    [other] = (name for name in get_args(ExpertName) if name != own)
    branch = branches_in(folder).get(other)
    if branch is None:
        raise ProPhyError(
            f"{folder} holds no branch for {other}, and this run trained the one for {own}; give --with what "
            f"a run with train.expert={other} has trained"
        )
    theirs = describe(branch)
    if theirs["backbone"]["fingerprint"] != backbone["fingerprint"]:
        raise ProPhyError(
            f"{branch} was trained on another backbone ({theirs['backbone']['name']}) than this run "
            f"({backbone['name']}); give --with a branch of this one"
        )
    if theirs["physics"]["phenomena"] != checkpoint.run["physics"]["phenomena"]:
        raise ProPhyError(
            f"{branch} has other phenomena than this run; give --with a branch that was trained with the "
            f"same taxonomy"
        )
    return {other: branch}


def _export_pipeline(
    config: Config, checkpoint: Checkpoint, beside: Mapping[ExpertName, Path], output: Path
) -> None:
    backbone, classes = config.backbone, FAMILIES[config.backbone.family].classes()
    revision = _backbone(checkpoint)["revision"]
    source = download(backbone.pretrained, revision)
    experts = load_experts(backbone.family, backbone.pretrained, revision)
    trained = {_expert(checkpoint): _trained(checkpoint)}
    for other, branch in beside.items():
        trained[other] = _trained_before(branch)

    # 1. What is not a trained transformer's is taken as it is
    shutil.copytree(source, output, dirs_exist_ok=True, ignore=shutil.ignore_patterns(".*", "README.md"))
    pipeline, ours = _pipeline_class(config), classes.prophy_transformer
    model_index = json.loads((source / "model_index.json").read_text())
    model_index |= {
        "_class_name": pipeline.__name__,
        "max_sequence_length": backbone.max_sequence_length,
    }
    for name, made in trained.items():
        component = experts[name].component

        # 2. Weights of the transformer, with branch and adapter as more files
        _write_weights(made, source / component, output / component)

        # 3. Configurations that name our classes
        _, transformer = load_configs(backbone.family, backbone.pretrained, revision, component)
        said = {
            "physics": made.physics,
            **{f"lora_{key}": value for key, value in (made.lora or {}).items()},
            "_class_name": ours.__name__,
        }
        _write_json(output / component / "config.json", {**transformer, **said})
        model_index[component] = [ours.__module__, ours.__name__]
    _write_json(output / "model_index.json", model_index)
    (output / "README.md").write_text(_model_card(config, checkpoint, len(trained)))


def _write_weights(trained: _Trained, source: Path, folder: Path) -> None:
    """Puts what was trained into `folder`, a copy of `source`; files without any of it stay as they are."""
    weights = WeightFiles(source)
    weight_map: dict[str, str] = {}
    for file in sorted(set(weights.files.values())):
        own = [name for name, place in weights.files.items() if place == file]
        names = {name: _name_beside_an_adapter(trained, name) for name in own}
        if any(name in trained.shapes or name != names[name] for name in own):
            (folder / file).unlink()  # it may be a link
            tensors = {
                names[name]: trained.read(name) if name in trained.shapes else weights.read(name)
                for name in own
            }
            save_file(tensors, folder / file, _FORMAT)
        weight_map |= dict.fromkeys(names.values(), file)
    new = {name: shape for name, shape in trained.shapes.items() if name not in weights.files}
    weight_map |= write_files(folder, "physics_branch{suffix}.safetensors", new, trained.read)
    total = sum((folder / file).stat().st_size for file in set(weight_map.values()))
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index, indent=1))


def _pipeline_class(config: Config) -> type[PhysicsPipeline]:
    backbone = config.backbone
    images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
    return FAMILIES[backbone.family].classes().pipeline_for(images)


def _trained(checkpoint: Checkpoint) -> _Trained:
    """What a run trained, or its moving average."""
    kind = "ema" if "ema" in checkpoint.kinds else "parameter"
    return _Trained(
        checkpoint.run["physics"],
        checkpoint.run["lora"],
        {name.removeprefix(_TRANSFORMER): shape for name, shape in checkpoint.shapes.items()},
        lambda name: checkpoint.tensor(kind, _TRANSFORMER + name),
    )


def _trained_before(branch: Path) -> _Trained:
    """What `export_branch` wrote."""
    made = load_branch(branch)
    shapes = {name: value.shape for name, value in made.state_dict.items()}
    return _Trained(made.physics, made.lora, shapes, made.state_dict.__getitem__)


def _name_beside_an_adapter(trained: _Trained, name: str) -> str:
    """What peft calls a tensor of the backbone: another name where the layer has an adapter."""
    layer, _, attribute = name.rpartition(".")
    has_adapter = f"{layer}.lora_A.default.weight" in trained.shapes
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


def _model_card(config: Config, checkpoint: Checkpoint, num_branches: int) -> str:
    name, physics, expert = _backbone(checkpoint)["name"], checkpoint.run["physics"], _expert(checkpoint)
    whose = "" if expert is None else f" of the transformer for {expert.replace('_', ' ')}"
    another = "\nThe other transformer has a branch of its own, of another run." if num_branches > 1 else ""
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
backbone's weights{whose} {_backbone_says(checkpoint)}. {blocks}
{physics["num_semantic_experts"]} semantic and {physics["num_refinement_experts"]} refinement experts
({physics["top_k"]} per token). The method is that of https://arxiv.org/abs/2512.05564. The backbone's licence
holds for its weights.{another}

```python
from {pipeline.__module__} import {pipeline.__name__}

pipeline = {pipeline.__name__}.from_pretrained("this/folder")
```
"""
