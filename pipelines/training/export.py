"""`prophy export`: from a checkpoint of training to safetensors that need neither this run nor DeepSpeed.

What was trained alone (branch, adapter), as `serve` and `generate` take it, or a complete pipeline in
diffusers' layout, which loads like any other. What was trained is written as it was trained, in float32, and
an adapter stays beside the backbone's weights: in bfloat16 most of what it adds to them would round away.
Tensors are read one by one and written file by file, and what was not trained is copied: nothing is ever in
memory as a whole, and no GPU is needed.
"""

import json
import logging
import math
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
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import checkpoints_of, open_checkpoints
from pipelines.training.model_card import TRANSFORMER, backbone_says, model_card, pipeline_class
from pipelines.training.record import write_training
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import (
    check_unchanged,
    download,
    load_configs,
    load_experts,
)
from prophy.errors import ProPhyError
from prophy.models.checkpoint import load_branch, write_branch, write_files
from prophy.models.description import ExpertName, branches_in, describe
from prophy.models.weights import INDEX, WeightFiles

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


@dataclass(frozen=True)
class Export:
    """What `prophy export` writes.

    Attributes:
        config: the run.
        checkpoint: what it trained.
        beside: where the branch of the backbone's other transformer lies, by its name, if that goes along.
        complete: a whole pipeline instead of branch and adapter alone.
    """

    config: Config
    checkpoint: Checkpoint
    beside: Mapping[ExpertName, Path]
    complete: bool

    @property
    def num_bytes(self) -> int:
        """How much of a disk it takes, but for some kilobytes; less where the backbone was trained too."""
        folders = [*self.beside.values()]
        if self.complete:
            folders.append(download(self.config.backbone.pretrained, _backbone(self.checkpoint)["revision"]))
        files = [file for folder in folders for file in folder.rglob("*") if file.is_file()]
        trained = sum(math.prod(shape) for shape in self.checkpoint.shapes.values())
        return sum(file.stat().st_size for file in files) + 4 * trained

    def write(self, folder: Path) -> None:
        """Writes it into a new folder."""
        if self.complete:
            _export_pipeline(self.config, self.checkpoint, self.beside, folder)
        elif self.beside:
            export_branch(self.checkpoint, folder / str(_expert(self.checkpoint)))
            for name, branch in self.beside.items():
                shutil.copytree(branch, folder / name)
        else:
            export_branch(self.checkpoint, folder)

    def tell(self, place: Path | str) -> None:
        """Says that it is at `place` now."""
        said = backbone_says(self.checkpoint)
        logger.info("exported step %d; the backbone's weights %s: %s", self.checkpoint.step, said, place)


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
        step: see `find_export`.
        complete: see `find_export`.
        other: see `find_export`.

    Raises:
        ProPhyError: as `find_export`; or the folder exists, or cannot be written.
    """
    if output.exists():
        raise ProPhyError(f"{output} exists; choose another folder for the export")
    with find_export(config, step, complete, other) as export:
        with writing_model(output) as folder:
            export.write(folder)
        export.tell(output)
    return output


@contextmanager
def find_export(
    config: Config, step: int | Literal["best"] | None, complete: bool, other: Path | None
) -> Iterator[Export]:
    """What a run has to export, to be written within the block.

    Args:
        config: the run.
        step: which checkpoint; "best" is that of the lowest held-out loss; the latest if None.
        complete: a whole pipeline instead of branch and adapter alone.
        other: the branch of the backbone's other transformer, to go with this one.

    Raises:
        ProPhyError: no such checkpoint, or a damaged one; the backbone is not the one that was trained; or
            `other` does not fit.
    """
    with _open(config, step) as checkpoint:
        beside = {} if other is None else _other_branch(checkpoint, other)
        if complete:
            check_unchanged(checkpoint.place, _backbone(checkpoint), config.backbone.pretrained)
        yield Export(config, checkpoint, beside, complete)


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
    write_training(folder, checkpoint.step, checkpoint.run)


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


@contextmanager
def _open(config: Config, step: int | Literal["best"] | None) -> Iterator[Checkpoint]:
    named = None if "train" in config.lacking("train") else config.train.checkpoints
    store = checkpoints_of(config.run_dir) if named is None else open_checkpoints(named)
    if step == "best":
        if "best" not in store.pinned():
            raise ProPhyError(
                f"no checkpoint in {store.location} was measured on held-out clips, and kept; set "
                f"train.num_held_out and train.keep_best, or give the number of a step"
            )
        step = store.pinned()["best"]
    with store.latest() if step is None else store.find(step) as checkpoint:
        if checkpoint is None:
            which = "checkpoint" if step is None else f"undamaged checkpoint of step {step}"
            raise ProPhyError(
                f"no {which} in {store.location}; run `prophy train` with this configuration first"
            )
        yield checkpoint


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
    pipeline, ours = pipeline_class(config), classes.prophy_transformer
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
    (output / "README.md").write_text(model_card(config, checkpoint, len(trained)))
    write_training(output, checkpoint.step, checkpoint.run)


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


def _trained(checkpoint: Checkpoint) -> _Trained:
    """What a run trained, or its moving average."""
    kind = "ema" if "ema" in checkpoint.kinds else "parameter"
    return _Trained(
        checkpoint.run["physics"],
        checkpoint.run["lora"],
        {name.removeprefix(TRANSFORMER): shape for name, shape in checkpoint.shapes.items()},
        lambda name: checkpoint.tensor(kind, TRANSFORMER + name),
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
