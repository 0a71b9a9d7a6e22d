"""Sends what training and its evaluations write to trackers of experiments. Knows no Ray, no torch.

The command follows the files of metrics, a thread for each tracker: training neither waits for one nor fails
with one. What a tracker does not take it gets later, from the same command at the latest, in the same run.
"""

import json
import logging
import os
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from http import HTTPStatus
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from pipelines.config import Config
from pipelines.layout import EVALUATION_FILE, METRICS_FILE
from pipelines.training.json_lines import read_rows
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

LOOK_EVERY_S = 10.0
_LAST_WORDS_S = 60.0
_SECTIONS = {"backbone", "vlm", "physics", "train"}
_FILES = {METRICS_FILE: "", EVALUATION_FILE: "evaluation/"}
"""Files of rows, and what their names of metrics begin with at a tracker."""
_METRICS_AT_ONCE = 1000  # of MLflow's server
_PARAMETERS_AT_ONCE = 100


class Tracker(Protocol):
    """A run at a tracker.

    Attributes:
        run_id: what it is called there.
    """

    run_id: str

    def describe(self, config: Config) -> None:
        """Sends the configuration, where the run was not made with it."""

    def log(self, rows: list[dict[str, float]]) -> None:
        """Sends rows of `step` and metrics."""

    def close(self) -> None:
        """Says that no more rows come for now."""


@dataclass
class _State:
    """What a tracker has of a run, in the folder of training.

    Attributes:
        run_id: what the tracker calls the run.
        described: whether it took the configuration, but for values that it refuses.
        sent: the last step that it took of each file; of losses, for each set of held-out clips.
    """

    run_id: str | None = None
    described: bool = False
    sent: dict[str, int] = field(default_factory=dict)


class WandbRun:
    """A run of Weights & Biases; without a connection, files for `wandb sync` in the folder of training."""

    def __init__(self, config: Config, root: Path, run_id: str | None) -> None:
        wandb: Any = import_module("wandb")
        self.run_id = run_id or uuid.uuid4().hex
        self._run = wandb.init(
            project=config.train.tracking_project,
            name=config.run_dir.name,
            id=self.run_id,
            resume="allow",
            dir=root,
            config=config.model_dump(mode="json", include=_SECTIONS),
            settings=wandb.Settings(console="off", silent=True),
        )
        self._run.define_metric("*", step_metric="step")

    def describe(self, config: Config) -> None:
        """See `Tracker`."""

    def log(self, rows: list[dict[str, float]]) -> None:
        """See `Tracker`."""
        for row in rows:
            self._run.log(row)

    def close(self) -> None:
        """See `Tracker`."""
        self._run.finish()


class MlflowRun:
    """A run of MLflow, at the server of MLFLOW_TRACKING_URI."""

    def __init__(self, config: Config, root: Path, run_id: str | None) -> None:
        mlflow: Any = import_module("mlflow")
        self._refusal = mlflow.exceptions.MlflowException
        self._metric, self._parameter = mlflow.entities.Metric, mlflow.entities.Param
        self._client = mlflow.MlflowClient(os.environ["MLFLOW_TRACKING_URI"])
        if run_id is None:
            name = config.train.tracking_project
            found = self._client.get_experiment_by_name(name)
            experiment = found.experiment_id if found else self._client.create_experiment(name)
            self.run_id: str = self._client.create_run(experiment, run_name=config.run_dir.name).info.run_id
        else:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")

    def describe(self, config: Config) -> None:
        """See `Tracker`."""
        parameters = [
            self._parameter(f"{section}.{key}", str(value))
            for section, values in config.model_dump(mode="json", include=_SECTIONS).items()
            for key, value in values.items()
        ]
        for start in range(0, len(parameters), _PARAMETERS_AT_ONCE):
            batch = parameters[start : start + _PARAMETERS_AT_ONCE]
            if self._refused(batch) is None:
                continue
            for parameter in batch:  # one that is refused loses all of its batch
                if (error := self._refused([parameter])) is not None:
                    said = " ".join(str(error).split())
                    logger.warning("mlflow does not take the parameter %s: %s", parameter.key, said)

    def _refused(self, parameters: list[Any]) -> Exception | None:
        """What the server says against values that it was sent; other errors are raised."""
        try:
            self._client.log_batch(self.run_id, params=parameters)
        except self._refusal as error:
            if error.get_http_status_code() != HTTPStatus.BAD_REQUEST:
                raise
            return error
        return None

    def log(self, rows: list[dict[str, float]]) -> None:
        """See `Tracker`."""
        now = int(1000 * time.time())
        metrics = [
            self._metric(name, value, now, int(row["step"]))
            for row in rows
            for name, value in row.items()
            if name != "step"
        ]
        for start in range(0, len(metrics), _METRICS_AT_ONCE):
            self._client.log_batch(self.run_id, metrics=metrics[start : start + _METRICS_AT_ONCE])

    def close(self) -> None:
        """See `Tracker`."""
        self._client.set_terminated(self.run_id)


_TRACKERS: dict[str, type[WandbRun] | type[MlflowRun]] = {"wandb": WandbRun, "mlflow": MlflowRun}


def check_trackers(config: Config) -> None:
    """Looks for the packages and settings that the trackers of a run need.

    Raises:
        ProPhyError: one is missing.
    """
    for name in config.train.trackers:
        if find_spec(name) is None:
            raise ProPhyError(
                f"train.trackers names {name}, which is not installed: `pip install 'prophy-ray[{name}]'`, "
                "or leave it out"
            )
    if "mlflow" in config.train.trackers and "MLFLOW_TRACKING_URI" not in os.environ:
        raise ProPhyError(
            "train.trackers names mlflow, and MLFLOW_TRACKING_URI is not set; set it to the server's URL"
        )


@contextmanager
def tracking(config: Config, root: Path) -> Iterator[None]:
    """Sends all rows to the trackers of a run while the block lasts, those of earlier starts first.

    Args:
        config: the run's.
        root: the folder of training.
    """
    ended = threading.Event()
    threads = {
        name: threading.Thread(target=_follow, args=(name, config, root, ended), daemon=True)
        for name in config.train.trackers
    }
    for thread in threads.values():
        thread.start()
    try:
        yield
    finally:
        ended.set()
        deadline = time.monotonic() + _LAST_WORDS_S
        for name, thread in threads.items():
            thread.join(max(0.0, deadline - time.monotonic()))
            if thread.is_alive():
                logger.warning("%s takes too long: the same command sends it what is missing", name)


def _follow(name: str, config: Config, root: Path, ended: threading.Event) -> None:
    file = root / f"{name}.json"
    # A state of before does not say it: it was written once the configuration was sent.
    state = _State(**{"described": True, **json.loads(file.read_text())}) if file.exists() else _State()
    tracker: Tracker | None = None
    told, over = set[str](), False

    def tell(error: Exception, what: str) -> None:
        if (said := f"{name} does not take {what}: {' '.join(str(error).split())}") not in told:
            told.add(said)
            logger.warning("%s", said)

    while not over:
        over = ended.wait(LOOK_EVERY_S)  # then one last look
        try:
            if tracker is None:
                tracker = _TRACKERS[name](config, root, state.run_id)
                state.run_id = tracker.run_id
                _save(state, file)
                try:
                    if not state.described:
                        tracker.describe(config)
                        state.described = True
                except Exception as error:  # it may refuse that, and take the metrics
                    tell(error, "the configuration")
            _send(tracker, state, root)
            _save(state, file)
            if over:
                tracker.close()
        except Exception as error:  # of a network, a server, a key: no reason to end a training
            tracker = None
            tell(error, f"the metrics, which stay in {root}")


def _send(tracker: Tracker, state: _State, root: Path) -> None:
    """Sends the rows after the last one that was taken; steps that are made again are not sent again.

    A checkpoint that is measured anew, on other held-out clips, is.
    """
    for file, prefix in _FILES.items():
        series: dict[str, list[dict[str, Any]]] = {}
        for row in read_rows(root / file):
            name = f"{file} {row['held_out']}" if "held_out" in row else file
            if row["step"] > state.sent.get(name, 0):
                series.setdefault(name, []).append(row)
        for name, rows in series.items():
            tracker.log([_named(row, prefix) for row in rows])
            state.sent[name] = max(row["step"] for row in rows)


def _named(row: dict[str, Any], prefix: str) -> dict[str, float]:
    """Its numbers, by their names at a tracker."""
    numbers = {name: value for name, value in row.items() if not isinstance(value, str)}
    return {name if name == "step" else f"{prefix}{name}": value for name, value in numbers.items()}


def _save(state: _State, file: Path) -> None:
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps(asdict(state)))
    partial.replace(file)
