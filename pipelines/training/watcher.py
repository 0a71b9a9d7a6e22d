"""Has the checkpoints of a run evaluated while it trains, and says which is the best.

A Ray task of its own evaluates, beside the workers: they neither wait for it nor know of it.
"""

import logging
import math
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import ray

from pipelines.config import Config
from pipelines.layout import EVALUATION_FILE
from pipelines.training.checkpoint_places import open_checkpoints
from pipelines.training.checkpoint_store import CheckpointStore
from pipelines.training.json_lines import read_rows, write_rows
from pipelines.training.samples import describe_held_out
from prophy.errors import ProPhyError
from prophy.training.cache import PriorCache

logger = logging.getLogger(__name__)

_LAST_LOOKS = 6  # at the end of a run, where the store does not answer


@contextmanager
def evaluating(config: Config, cache: PriorCache, root: Path) -> Iterator[None]:
    """Evaluates the newest checkpoint, then the one that is the newest by then, and at the end the last.

    Before them the one that was the best so far, if its loss is of other clips than are held out now. It
    stays until there is a loss that compares.

    Where nothing is held out and no sample is asked for, it does nothing. A failure is logged, and the run
    goes on. After an error in the block no more is evaluated.

    Args:
        config: the run's.
        cache: its samples.
        root: folder of the results: `evaluation.jsonl`, `samples/`, and `tensorboard/evaluation/`.
    """
    if not config.train.evaluates:
        yield
        return
    ended, failed = threading.Event(), threading.Event()
    rows = read_rows(root / EVALUATION_FILE)
    write_rows(root / EVALUATION_FILE, rows)  # without a line that a kill cut short
    comparable = comparable_rows(config, cache, root)
    if len(comparable) < len(rows):
        logger.warning(
            "%d of the %d rows in %s are of other held-out clips than the cache now has, or do not say of "
            "which: the best checkpoint is looked for among the others, and what is measured from here on",
            len(rows) - len(comparable),
            len(rows),
            root / EVALUATION_FILE,
        )
    steps, best = {row["step"] for row in comparable}, best_step(config, cache, root)
    store = open_checkpoints(config.checkpoints)
    before = _best_of_before(config, store, steps)
    best = before if best is None else best
    if before is not None:
        logger.info("step %d, the best by losses of other clips, stays until a loss compares", before)
    store.pin(best=best, evaluating=before)  # what a killed run was evaluating may go
    arguments = (config, cache, root, steps, best, before, ended, failed)
    watcher = threading.Thread(target=_watch, args=arguments, daemon=True)
    watcher.start()
    try:
        yield
        ended.set()
        watcher.join()
    except BaseException:
        failed.set()
        raise


def comparable_rows(config: Config, cache: PriorCache, root: Path) -> list[dict[str, Any]]:
    """The rows of `evaluation.jsonl` that are of the clips that are held out now.

    The first ones did not say of which they are: those count only where no clips are held out.
    """
    held = describe_held_out(config, cache)
    return [row for row in read_rows(root / EVALUATION_FILE) if row.get("held_out") == held]


def best_step(config: Config, cache: PriorCache, root: Path) -> int | None:
    """Step of the checkpoint with the lowest held-out loss (Eq. 6) of those that are still there, if any.

    Losses of other clips than those that are held out now do not count.
    """
    if not config.train.keep_best:
        return None
    steps = set(open_checkpoints(config.checkpoints).committed())
    rows = [row for row in comparable_rows(config, cache, root) if row["step"] in steps and "loss" in row]
    best = min((row for row in rows if math.isfinite(row["loss"])), key=lambda row: row["loss"], default=None)
    return None if best is None else best["step"]


def _best_of_before(config: Config, store: CheckpointStore, steps: set[int]) -> int | None:
    """The checkpoint that is pinned as the best, if it is there and was not measured on today's clips."""
    best = store.pinned().get("best") if config.train.keep_best else None
    if best is None or best in steps:
        return None
    return best if best in store.committed() else None


def _due(config: Config, store: CheckpointStore, before: int | None) -> Iterator[int]:
    """The best of before, to be measured anew, then the checkpoint that is the newest by then."""
    if config.train.num_held_out and before is not None:
        yield before
    yield from store.committed()[:1]


def _watch(
    config: Config,
    cache: PriorCache,
    root: Path,
    seen: set[int],
    best: int | None,
    before: int | None,
    ended: threading.Event,
    failed: threading.Event,
) -> None:
    """Evaluates until the run has ended or failed; what is in `seen` was evaluated before.

    Until there is a loss that compares, `best` is what it is.
    """
    train = config.train
    task = ray.remote(_evaluate).options(
        num_cpus=train.evaluation_cpus, num_gpus=train.evaluation_gpus, max_retries=0
    )
    over, last_looks, store = False, 0, open_checkpoints(config.checkpoints)
    while not (over or failed.is_set()):
        is_last = ended.wait(store.look_every_s)
        last_looks += is_last
        try:
            for step in _due(config, store, before):
                if step in seen or failed.is_set():
                    continue
                store.pin(best=best, evaluating=step)
                seen.add(step)
                logger.info("evaluating step %d, as soon as there are the resources", step)
                try:
                    ray.get(task.remote(config, cache, root, step))
                    lowest = best_step(config, cache, root)
                    best = best if lowest is None else lowest
                    kept = "; its held-out loss is the lowest so far" if step == lowest else ""
                    logger.info("evaluated step %d: %s%s", step, root, kept)
                except Exception as error:
                    if not failed.is_set():
                        logger.warning("step %d was not evaluated: %s", step, error)
                store.pin(best=best)
            over = is_last
        except (ProPhyError, OSError) as error:  # the store, which may answer the next time
            logger.warning("checkpoints cannot be looked at, to evaluate them: %s", error)
            over = last_looks == _LAST_LOOKS
            if is_last and not over:
                failed.wait(store.look_every_s)


def _evaluate(config: Config, cache: PriorCache, root: Path, step: int) -> None:
    from pipelines.training.evaluation import evaluate  # torch and diffusers: of no use to the driver

    evaluate(config, cache, root, step)
