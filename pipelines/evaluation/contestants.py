"""What is compared: which model, with which knobs. Imports no networks unless a checkpoint is exported."""

import logging
from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.config import Config, Contestant
from pipelines.generation.limits import check_model, model_fingerprint
from pipelines.generation.spec import PhysicsSpec
from pipelines.layout import RunFolder, checkpoint_name
from pipelines.training.record import Training, find_training, read_training
from prophy.backbones.pretrained import (
    branch_configs,
    encoders_fingerprint,
    load_experts,
    takes_images,
)
from prophy.errors import ProPhyError
from prophy.models.description import phenomena_of
from prophy.models.stored import local_folder
from prophy.stores import is_in_s3

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Entrant:
    """A contestant whose model is there.

    Attributes:
        name: the configuration's.
        config: the run's, with this model as its checkpoint and backbone.
        knobs: the branch's; None where there is no branch.
        model: fingerprint of the model.
        encoders: fingerprint of VAE and text encoder.
        trained: how it was trained; None where that is not written beside it, or nothing was.
    """

    name: str
    config: Config
    knobs: PhysicsSpec | None
    model: str
    encoders: str
    trained: Training | None

    @property
    def identity(self) -> list[str]:
        """All that decides what it computes; its name plays no part."""
        knobs = self.knobs.model_dump_json() if self.knobs else ""
        backbone = self.config.backbone
        text = str(backbone.max_sequence_length)
        return [self.model, knobs, backbone.dtype, str(backbone.autocast), text]


def enter(config: Config) -> list[Entrant]:
    """The contestants of a run, the first of which the others are compared with.

    Raises:
        ProPhyError: a model is not there, is of another backbone, always takes an image, has two transformers
            where clips are denoised, or has no branch for its knobs.
    """
    wanted = config.evaluate.contestants
    if not wanted:
        own = Contestant(checkpoint=config.checkpoint)
        wanted = {"model": own}
        if config.checkpoint is not None:
            wanted = {"branch off": own.model_copy(update={"scale": 0.0}), "branch on": own}
    return [_enter(name, contestant, config) for name, contestant in wanted.items()]


def _enter(name: str, contestant: Contestant, config: Config) -> Entrant:
    backbone = config.backbone
    if contestant.pretrained is not None:
        backbone = backbone.model_copy(update={"pretrained": contestant.pretrained, "revision": None})
    checkpoint = contestant.checkpoint
    try:
        if checkpoint is not None and not is_in_s3(checkpoint):
            checkpoint = str(_model_of(Path(checkpoint), config.evaluate.output))
        own = config.model_copy(update={"backbone": backbone, "checkpoint": checkpoint})
        if takes_images(backbone.family, backbone.pretrained, backbone.revision) == "always":
            raise ProPhyError(
                f"{backbone.pretrained} always takes an image, and models are compared without; choose one "
                "that makes videos of text alone"
            )
        experts = load_experts(backbone.family, backbone.pretrained, backbone.revision)
        if len(experts) > 1 and config.evaluate.measures != ["videos"]:
            raise ProPhyError(
                f"{backbone.pretrained} has two transformers, and clips are denoised with one; set "
                "evaluate.measures to [videos]"
            )
        check_model(own)
        knobs = {"scale": contestant.scale, "strength": contestant.strength}
        knobs["invert_refinement"] = contestant.invert_refinement
        spec = PhysicsSpec.model_validate(knobs)
        if spec != PhysicsSpec():
            _check_knobs(spec, own)
        trained = find_training(own)
        if trained is not None:
            logger.info("the contestant %r was trained for %d steps", name, trained.step)
    except ProPhyError as error:
        raise ProPhyError(f"the contestant {name!r} of evaluate.contestants: {error}") from None
    return Entrant(
        name,
        own,
        spec if spec != PhysicsSpec() else None,
        model_fingerprint(own),
        encoders_fingerprint(backbone.family, backbone.pretrained, backbone.revision),
        trained,
    )


def notes_on_training(entrants: Sequence[Entrant], videos: Set[str]) -> list[str]:
    """Whose run did not hold out all of these videos of the cache, or does not say so: a sentence each."""
    notes = []
    for entrant in entrants:
        backbone = entrant.config.backbone
        if entrant.config.checkpoint is None and not branch_configs(
            backbone.family, backbone.pretrained, backbone.revision
        ):
            continue
        held_out = None if entrant.trained is None else entrant.trained.held_out
        if held_out is None:
            notes.append(f"it is not known whether contestant {entrant.name!r} was trained on these clips")
        elif seen := videos - set(held_out):
            notes.append(
                f"contestant {entrant.name!r} may have been trained on {len(seen)} of these {len(videos)} "
                "videos: its run did not hold them out"
            )
    return notes if videos else []


def _check_knobs(knobs: PhysicsSpec, config: Config) -> None:
    backbone = config.backbone
    if config.checkpoint is not None:
        phenomena = phenomena_of(local_folder(config.checkpoint))
    else:
        branches = branch_configs(backbone.family, backbone.pretrained, backbone.revision)
        if not branches:
            raise ProPhyError("it has knobs of a branch and no branch; give it a checkpoint")
        phenomena = branches[0]["phenomena"]
    for phenomenon in knobs.strength:
        if phenomenon not in phenomena:
            raise ProPhyError(
                f"strength names {phenomenon!r}, which is no phenomenon of its branch; those are "
                f"{', '.join(phenomena)}"
            )


def _model_of(folder: Path, output: Path) -> Path:
    """The folder of a trained branch: itself, or what a run has trained.

    Of a run whose newest checkpoint its `model` does not hold, that is exported into the folder of the
    comparison. Where no checkpoint can be read, `model` is taken.
    """
    places = RunFolder(folder)
    if not places.training.is_dir():
        return places.model if places.model.is_dir() else folder
    from pipelines.training.checkpoint_places import checkpoints_of
    from pipelines.training.export import export_branch, writing_model

    has_model = places.model.is_dir()
    try:
        store = checkpoints_of(folder)
        newest = store.newest_run()
    except ProPhyError as error:
        if not has_model:
            raise
        logger.warning("%s is compared, whether it is the newest or not: %s", places.model, error)
        return places.model
    if has_model and (newest is None or _holds(places.model, *newest)):
        return places.model
    with store.latest() as checkpoint:
        if checkpoint is None and has_model:
            logger.warning("%s holds no whole checkpoint: %s is compared", store.location, places.model)
            return places.model
        if checkpoint is None:
            raise ProPhyError(f"{store.location} holds no whole checkpoint yet; wait for the first")
        model = output / "models" / f"{checkpoint_name(checkpoint.step)}-{checkpoint.fingerprint[:8]}"
        if not model.is_dir():
            model.parent.mkdir(parents=True, exist_ok=True)
            with writing_model(model) as partial:
                export_branch(checkpoint, partial)
    return model


def _holds(model: Path, step: int, run: Mapping[str, Any]) -> bool:
    """Whether the model of a run is of its newest checkpoint, given that one's step and what it knows."""
    exported = read_training(model)
    if exported is None:  # earlier versions wrote no record, and a model at the end alone
        return step >= run.get("num_steps", step)
    return step <= exported.step
