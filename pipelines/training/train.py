"""`prophy train`: trains the Physical Branch on the cache with Ray Train and DeepSpeed.

The same command resumes from the last checkpoint in the run folder, with as many workers as it now says:
what a step draws depends on the number of the step and on the samples in the cache alone.
"""

import logging
import shutil
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from filelock import FileLock, Timeout

from pipelines.caching.cache import open_cache
from pipelines.config import Config
from pipelines.layout import BEGUN_FILE, STOP_FILE, RunFolder
from pipelines.resources import needs_of, room_for
from pipelines.runtime import open_run, ray_session
from pipelines.training.checkpoint import Checkpoint, DamagedError
from pipelines.training.checkpoint_places import open_checkpoints
from pipelines.training.checkpoint_store import CheckpointStore
from pipelines.training.samples import describe_samples
from pipelines.training.schedule import learning_rate_factor
from pipelines.training.start import start_folder
from pipelines.training.tracking import check_trackers, tracking
from pipelines.training.watcher import evaluating
from prophy.backbones.pretrained import (
    check_bare,
    check_unchanged,
    fingerprint,
    load_trained_expert,
    pinned_revision,
)
from prophy.errors import ProPhyError
from prophy.models.description import phenomena_of
from prophy.models.stored import local_folder
from prophy.taxonomy import difference, load_taxonomy
from prophy.training.cache import PriorCache

if TYPE_CHECKING:  # the module loads torch
    from ray.train.torch import TorchTrainer

logger = logging.getLogger(__name__)

_VISIBLE_WITHIN_S = 120.0  # a shared file system may show what another node wrote a minute late


def run(config: Config) -> Path:
    """Trains to `train.num_steps`, from the last checkpoint if there is one.

    SIGTERM saves what the last whole step made, then ends the process: at once where it comes again, and
    before the first step of the workers, also of those that Ray starts again. Until these have room, the
    process waits for them.

    Returns:
        Folder of the trained branch.

    Raises:
        ProPhyError: no cache, or one that does not fit; workers cannot share its clips as
            `train.sequence_parallel` says; the backbone does not take `train.expert` or `train.noise_levels`;
            what the run goes on from has another taxonomy, or as `start_folder`; the run folder or
            `train.checkpoints` belongs to another run, another process trains there, or it cannot be used; a
            tracker is not installed; or a loss is not finite.
    """
    check_trackers(config)
    store = open_checkpoints(config.checkpoints)
    if config.train.checkpoints is not None:
        store.claim(config.run_dir)
    model = config.backbone
    if store.newest_run() is None:  # a run that goes on was let in, and its hub may have moved on
        check_bare(model.family, model.pretrained, model.revision)
        load_trained_expert(model.family, model.pretrained, model.revision, config.train.expert)
    backbone = pin_backbone(config)
    pinned = _at_revision(config, backbone["revision"])
    expert = load_trained_expert(model.family, model.pretrained, backbone["revision"], config.train.expert)
    expert.trained_levels(config.train.noise_levels)
    start_folder(config.train)
    cache = open_cache(pinned)()
    tell_samples(cache)
    compare_phenomena(pinned, cache)
    compare_samples(pinned, cache)
    compare_schedule(pinned)
    # Loads torch, for seconds: after all that can be refused without it.
    from pipelines.training.data import build_dataset, check_sharing

    check_sharing(pinned)
    _ = build_dataset(pinned, cache, rank=0)[0]
    places = RunFolder(config.run_dir)
    root = places.training
    lease = nullcontext() if config.train.checkpoints is None else store.alone()
    with alone(root), obeying_sigterm(root / STOP_FILE), lease:
        open_run(config, "train")
        step = store.set_damaged_aside()  # before one of them is evaluated
        with ray_session(config), tracking(pinned, root), evaluating(pinned, cache, root):
            if step is None or step < config.train.num_steps:
                room_for(needs_of(config, "train"))
                _train(pinned, {"cache": cache, "backbone": backbone, "sound": step}, root / STOP_FILE)
                step = config.train.num_steps
                _wait_for(step, store)
            else:
                logger.info("step %d of %d was reached before", step, config.train.num_steps)
            try:
                with store.open(step) as last:
                    _export(last, places.model)
            except DamagedError as damage:
                store.set_aside(step)
                raise ProPhyError(f"{damage}, and is set aside; run the same command again") from None
            logger.info("trained branch after %d steps: %s", step, places.model)
    return places.model


@contextmanager
def alone(root: Path) -> Iterator[None]:
    """Holds the folder of training for one run: two would remove each other's unfinished checkpoints.

    Raises:
        ProPhyError: another run holds it, or it cannot be written.
    """
    lock = FileLock(root / ".lock", timeout=0)
    try:
        root.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ProPhyError(
            f"another run trains in {root.parent}; wait for it, or choose another run_dir"
        ) from None
    except OSError as error:
        raise ProPhyError(
            f"cannot write to run_dir {root.parent}: {error.strerror}; choose another run_dir"
        ) from None
    try:
        yield
    finally:
        lock.release()


def _train(config: Config, arguments: dict[str, Any], stop: Path) -> None:
    """Runs the workers to the last step; errors as in `_fit`.

    Args:
        config: with the revision of the backbone.
        arguments: the others of `build_trainer`.
        stop: see `_fit`.
    """
    from pipelines.training.trainer import build_trainer

    while (num_workers := _fit(build_trainer(config, **arguments), stop)) is not None:
        logger.warning(
            "the workers that have room do not divide train.global_batch_size (%d) into whole micro-batches: "
            "goes on with %d at most, until the same command is run again",
            config.train.global_batch_size,
            num_workers,
        )
        fewer = config.train.model_copy(update={"num_workers": num_workers})
        config, arguments = config.model_copy(update={"train": fewer}), arguments | {"sound": None}


def _fit(trainer: "TorchTrainer", stop: Path) -> int | None:
    """Runs the workers to the last step, or to SIGTERM: a file, which they look for between micro-batches.

    Returns:
        How many workers to go on with at most, where those that had room do not divide the batch.

    Raises:
        ProPhyError: what the user must mend.
        SystemExit: after SIGTERM.
    """
    try:
        outcome = trainer.fit().return_value  # type: ignore[attr-defined]  # mypy sees Ray Train V1
    finally:
        stop.with_name(BEGUN_FILE).unlink(missing_ok=True)
    if isinstance(outcome, str):
        raise ProPhyError(outcome)
    if stop.exists():
        logger.info("stopped on SIGTERM; the same command goes on")
        raise SystemExit(128 + signal.SIGTERM)
    return outcome


@contextmanager
def obeying_sigterm(stop: Path) -> Iterator[None]:
    """Ends the block on SIGTERM: at once, unless the workers have begun a step; then these save it first.

    Workers that Ray starts again have begun none, from the moment that they run. A second SIGTERM does not
    wait for them, and a third one for nothing.

    Args:
        stop: the file that tells the workers.

    Raises:
        SystemExit: on SIGTERM.
    """
    begun, ended = stop.with_name(BEGUN_FILE), False
    for file in (stop, begun):
        file.unlink(missing_ok=True)

    def on_sigterm(*_: object) -> None:
        nonlocal ended
        if begun.exists() and not stop.exists():
            stop.touch()
            logger.info(
                "SIGTERM: waits until the workers have ended the step at work and saved it, and where they "
                "wait for room, until they have it; a second SIGTERM ends this at once"
            )
            return
        ended = True
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        logger.info("SIGTERM: ends at once; the same command goes on from the last checkpoint")
        raise KeyboardInterrupt  # Ray lets it through where it waits

    previous = signal.signal(signal.SIGTERM, on_sigterm)
    try:
        yield
    except KeyboardInterrupt:
        if not ended:
            raise
        raise SystemExit(128 + signal.SIGTERM) from None
    finally:
        signal.signal(signal.SIGTERM, previous)


def _wait_for(step: int, store: CheckpointStore) -> None:
    """Waits for the checkpoint of the last step, which another node may have written.

    Raises:
        ProPhyError: it cannot be seen here, or is damaged.
    """
    deadline = time.monotonic() + _VISIBLE_WITHIN_S
    while True:
        try:
            return store.check(step)
        except DamagedError:
            if time.monotonic() > deadline:
                raise ProPhyError(
                    f"the checkpoint of step {step} in {store.location} is missing or damaged; run the same "
                    "command again"
                ) from None
        time.sleep(1)


def _export(checkpoint: Checkpoint, model: Path) -> None:
    """Puts the trained branch in the place of what an earlier run left there."""
    from pipelines.training.export import export_branch, writing_model

    aside = model.with_name(f"{model.name}.old")
    shutil.rmtree(aside, ignore_errors=True)
    with writing_model(model) as folder:
        export_branch(checkpoint, folder)
        if model.exists():
            model.rename(aside)
    shutil.rmtree(aside, ignore_errors=True)


def pin_backbone(config: Config) -> dict[str, str | None]:
    """`name`, `revision` and `fingerprint` of the backbone that every node, restart and resumption loads.

    And `expert`, of a backbone with two transformers: which of them is trained.

    The first start decides: a hub that moves on does not change what a run is trained on.

    Raises:
        ProPhyError: there is no such model, or the last checkpoint was trained on another one.
    """
    pretrained, store = config.backbone.pretrained, open_checkpoints(config.checkpoints)
    newest = store.newest_run()
    if newest is not None:
        step, saved = newest
        check_unchanged(store.place(step), saved["backbone"], pretrained)
        return saved["backbone"]
    revision = pinned_revision(pretrained, config.backbone.revision)
    pinned = {"name": pretrained, "revision": revision, "fingerprint": fingerprint(pretrained, revision)}
    return pinned if config.train.expert is None else pinned | {"expert": config.train.expert}


def tell_samples(cache: PriorCache) -> None:
    """Says what a run is trained on, and what of the cache it leaves out."""
    logger.info(
        "the samples: %d clips of %d videos in %s, the input of the last `prophy cache`",
        len(cache.sample_ids),
        cache.num_videos,
        cache.location,
    )
    if cache.num_left_out:
        logger.warning(
            "%d cached video(s) are not in that input and are left out; `prophy cache prune` removes them",
            cache.num_left_out,
        )
    cache.tell_staging()


def compare_phenomena(config: Config, cache: PriorCache) -> None:
    """Checks that all that a run goes on from has the phenomena of its taxonomy, in the same order.

    Raises:
        ProPhyError: the cache, the last checkpoint or the branch to start from has others.
    """
    start, store = config.train.start_from, open_checkpoints(config.checkpoints)
    newest = store.newest_run()
    found = [(f"the cache in {config.cache.output}", cache.phenomena, "cache.output")]
    if newest is not None:
        step, saved = newest
        found.append((f"the checkpoint {store.place(step)}", saved["physics"]["phenomena"], "run_dir"))
    if start is not None:
        found.append((f"the branch in {start}", tuple(phenomena_of(local_folder(start))), "train.start_from"))
    for what, theirs, key in found:
        if other := difference(theirs, load_taxonomy(config.taxonomy).names):
            raise ProPhyError(
                f"{what} was made with another taxonomy than {config.taxonomy}: {other}; set taxonomy to "
                f"that one, or choose another {key}"
            )


def compare_samples(config: Config, cache: PriorCache) -> None:
    """Warns if the cache has changed since the last checkpoint: that may be, but batches change with it."""
    newest, samples = open_checkpoints(config.checkpoints).newest_run(), describe_samples(config, cache)
    # A checkpoint need not say it: the first ones did not.
    before = samples if newest is None else newest[1].get("samples", samples)
    if before != samples:
        logger.warning(
            "the cache holds other samples to train on (%d) than at the last checkpoint (%d): batches from "
            "here on differ from those of a run without that change",
            samples["number"],
            before["number"],
        )


def compare_schedule(config: Config) -> None:
    """Says where another `num_steps` than at the last checkpoint changes the learning rate: cosine does."""
    newest, train = open_checkpoints(config.checkpoints).newest_run(), config.train
    if newest is None:
        return
    step, saved = newest
    # A checkpoint need not say it: the first ones did not.
    before = train.model_copy(update={"num_steps": saved.get("num_steps", train.num_steps)})
    was, now = (train.learning_rate * learning_rate_factor(of, step) for of in (before, train))
    if was != now:
        logger.warning(
            "train.num_steps was %d and is %d: by train.lr_schedule %s the learning rate after step %d jumps "
            "from %.3g to %.3g, and the steps that follow differ from those of a run of %d from its start",
            before.num_steps,
            train.num_steps,
            train.lr_schedule,
            step,
            was,
            now,
            train.num_steps,
        )


def _at_revision(config: Config, revision: str | None) -> Config:
    return config.model_copy(update={"backbone": config.backbone.model_copy(update={"revision": revision})})
