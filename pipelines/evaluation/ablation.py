"""`prophy evaluate --ablation`: the paper's rows, each trained on the same cache, then compared.

Every row is a run of its own in a folder of the run's: the same command goes on where it was cut off.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

from pipelines.config import Config, Contestant
from pipelines.evaluation import evaluate
from pipelines.training import train

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Row:
    """What a row of the ablation trains.

    Attributes:
        name: a contestant's.
        lacks: keys of `physics` that are off; where nothing is, the branch is the configuration's.
        adapter: whether the backbone has an adapter, else it is as the configuration says.
        aligned: whether there are alignment losses.
    """

    name: str
    lacks: tuple[str, ...] = ()
    adapter: bool = False
    aligned: bool = True


_BLOCKS, _SEMANTIC, _REFINEMENT = "physical_blocks", "num_semantic_experts", "num_refinement_experts"
_OFF = {_BLOCKS: False, _SEMANTIC: 0, _REFINEMENT: 0}
ROWS = (
    Row("LoRA", (_BLOCKS, _SEMANTIC, _REFINEMENT), adapter=True),
    Row("LoRA, SEB", (_BLOCKS, _REFINEMENT), adapter=True),
    Row("LoRA, REB", (_BLOCKS, _SEMANTIC), adapter=True),
    Row("PB, SEB, REB"),
    Row("PB, SEB, REB unaligned", aligned=False),
)


def run(config: Config) -> Path:
    """Trains the rows that are not trained, and compares them with the backbone.

    Returns:
        The report.

    Raises:
        ProPhyError: as `train.run` and `evaluate.run`.
    """
    contestants = {"backbone": Contestant()}
    for row in ROWS:
        own = config_of(row, config)
        logger.info("%s: training in %s", row.name, own.run_dir)
        train.run(own)
        contestants[row.name] = Contestant(checkpoint=str(own.run_dir))
    compared = config.evaluate.model_copy(update={"contestants": contestants})
    return evaluate.run(config.model_copy(update={"evaluate": compared}))


def config_of(row: Row, config: Config) -> Config:
    """The configuration of a row: that of the run, but for what it trains, and in a folder of its own."""
    train, physics = config.train, config.physics
    changes: dict[str, object] = {"start_from": None}
    if row.adapter:
        changes["backbone"] = "lora"
    if not row.aligned:
        weights = {"semantic_alignment": 0.0, "token_alignment": 0.0}
        changes["loss_weights"] = train.loss_weights.model_copy(update=weights)
    folder = row.name.lower().replace(",", "").replace(" ", "-")
    if train.checkpoints is not None:
        changes["checkpoints"] = f"{train.checkpoints}/ablation/{folder}"
    return config.model_copy(
        update={
            "run_dir": config.run_dir / "ablation" / folder,
            "physics": physics.model_copy(update={key: _OFF[key] for key in row.lacks}),
            "train": train.model_copy(update=changes),
        }
    )
