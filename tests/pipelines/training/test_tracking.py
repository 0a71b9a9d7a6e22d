"""Metrics at a tracker of experiments: all of them, once, in one run, whatever restarts or is away."""

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import pytest

from pipelines.config import Config
from pipelines.layout import EVALUATION_FILE, METRICS_FILE
from pipelines.training import tracking
from pipelines.training.tracking import check_trackers
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "LOOK_EVERY_S", 0.01)


class Server:
    """A tracker's other side: the rows of each run; away for as many calls as it is told."""

    def __init__(self, away_for: int = 0) -> None:
        self.runs: dict[str, list[dict[str, float]]] = {}
        self.away_for = away_for

    def open(self, config: Config, root: Path, run_id: str | None) -> "Server":
        self._answer()
        self.run_id = run_id or f"run-{len(self.runs)}"
        self.runs.setdefault(self.run_id, [])
        return self

    def describe(self, config: Config) -> None:
        self._answer()

    def log(self, rows: list[dict[str, float]]) -> None:
        self._answer()
        self.runs[self.run_id] += rows

    def close(self) -> None:
        self._answer()

    def _answer(self) -> None:
        if self.away_for:
            self.away_for -= 1
            raise ConnectionError("nobody is there")


def append(file: Path, steps: Iterable[int], **values: float | str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("a") as rows:
        for step in steps:
            rows.write(json.dumps({"step": step, "loss": 1 / step, **values}) + "\n")


def tracked(tmp_path: Path, tracker: str) -> tuple[Config, Path]:
    config = tiny_config(tmp_path / "run", f"train.trackers=[{tracker}]")
    return config, config.run_dir / "train"


def test_each_row_is_sent_once_and_restarts_go_on_in_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = Server()
    monkeypatch.setitem(tracking._TRACKERS, "wandb", server.open)
    config, root = tracked(tmp_path, "wandb")
    with tracking.tracking(config, root):
        append(root / METRICS_FILE, range(1, 5))
    (root / METRICS_FILE).unlink()
    append(root / METRICS_FILE, range(1, 3))  # the checkpoint that a restart goes on from
    with tracking.tracking(config, root):
        append(root / METRICS_FILE, range(3, 8))
        append(root / EVALUATION_FILE, [2, 4], held_out="of before")
    with tracking.tracking(config, root):
        append(root / EVALUATION_FILE, [2], held_out="of now")  # measured anew
    [rows] = server.runs.values()
    trained = [row for row in rows if "loss" in row]
    assert [row["step"] for row in trained] == [1, 2, 3, 4, 5, 6, 7]
    measured = [(row["step"], row["evaluation/loss"]) for row in rows if "loss" not in row]
    assert measured == [(2, 0.5), (4, 0.25), (2, 0.5)]


def test_a_tracker_that_is_away_ends_nothing_and_gets_all_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Server(away_for=1000)
    monkeypatch.setitem(tracking._TRACKERS, "mlflow", server.open)
    config, root = tracked(tmp_path, "mlflow")
    append(root / METRICS_FILE, [1, 2])
    with tracking.tracking(config, root):
        pass
    assert not server.runs
    assert f"mlflow does not take the metrics, which stay in {root}: nobody is there" in caplog.text
    server.away_for = 0
    with tracking.tracking(config, root):
        pass
    assert server.runs == {"run-0": [{"step": 1, "loss": 1.0}, {"step": 2, "loss": 0.5}]}


class Mlflow:
    """What of the package is used, and a server that refuses parameters: all, or one that is too long."""

    class exceptions:  # noqa: N801
        class MlflowException(Exception):  # noqa: N818
            def get_http_status_code(self) -> int:
                return 400

    class entities:  # noqa: N801
        @staticmethod
        def Metric(name: str, value: float, time: int, step: int) -> tuple[str, float, int]:  # noqa: N802
            return name, value, step

        @staticmethod
        def Param(name: str, value: str) -> SimpleNamespace:  # noqa: N802
            return SimpleNamespace(key=name, value=value)

    def __init__(self, longest: int | None = None) -> None:
        self.longest = longest
        self.num_runs, self.num_refused = 0, 0
        self.metrics: list[Any] = []
        self.parameters: list[str] = []
        self.logged = Event()

    def MlflowClient(self, uri: str) -> "Mlflow":  # noqa: N802
        return self

    def get_experiment_by_name(self, name: str) -> Any:
        return SimpleNamespace(experiment_id="0")

    def create_run(self, experiment: str, run_name: str) -> Any:
        self.num_runs += 1
        return SimpleNamespace(info=SimpleNamespace(run_id=f"run-{self.num_runs}"))

    def update_run(self, run_id: str, status: str) -> None:
        pass

    def set_terminated(self, run_id: str) -> None:
        pass

    def log_batch(
        self, run_id: str, metrics: list[Any] | None = None, params: list[Any] | None = None
    ) -> None:
        if params is not None:
            if self.longest is None:
                self.num_refused += 1
                raise PermissionError("no parameters")
            if any(len(parameter.value) > self.longest for parameter in params):
                self.num_refused += 1
                raise self.exceptions.MlflowException("too long")
            self.parameters += [parameter.key for parameter in params]
        if metrics is not None:
            self.metrics += metrics
            self.logged.set()


def test_what_refuses_parameters_gets_one_run_and_the_metrics(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Mlflow()
    monkeypatch.setitem(sys.modules, "mlflow", server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    config, root = tracked(tmp_path, "mlflow")
    append(root / METRICS_FILE, [1, 2])
    for step in (3, 4, 5):
        server.logged.clear()
        with tracking.tracking(config, root):
            append(root / METRICS_FILE, [step])
            assert server.logged.wait(60)  # the second of two looks at least is the last one
    assert server.num_runs == 1 and server.num_refused == 3  # one a start
    assert server.metrics == [("loss", 1 / step, step) for step in range(1, 6)]
    assert json.loads((root / "mlflow.json").read_text())["run_id"] == "run-1"
    assert "mlflow does not take the configuration: no parameters" in caplog.text


def test_a_parameter_that_is_refused_is_left_out_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    server = Mlflow(longest=6000)
    monkeypatch.setitem(sys.modules, "mlflow", server)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://server")
    long = f"train.sample_prompts=[{'a ball ' * 1000}]"
    config = tiny_config(tmp_path / "run", "train.trackers=[mlflow]", long)
    root = config.run_dir / "train"
    root.mkdir(parents=True)
    for _ in range(2):
        with tracking.tracking(config, root):
            pass
    assert server.num_refused == 2  # the batch, then the value
    assert {"backbone.pretrained", "train.learning_rate"} <= {*server.parameters}
    assert len(server.parameters) == len({*server.parameters})
    assert "mlflow does not take the parameter train.sample_prompts: too long" in caplog.text


def test_what_a_tracker_needs_is_said_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tracking, "find_spec", lambda _: None)
    with pytest.raises(ProPhyError, match=r"names wandb, which is not installed: `pip install .*\[wandb\]"):
        check_trackers(tracked(tmp_path, "wandb")[0])
    monkeypatch.setattr(tracking, "find_spec", lambda _: object())
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(ProPhyError, match="MLFLOW_TRACKING_URI is not set; set it"):
        check_trackers(tracked(tmp_path, "mlflow")[0])


def test_a_run_of_mlflow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mlflow: Any = pytest.importorskip("mlflow", reason="mlflow-skinny is not installed")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/store")
    config, root = tracked(tmp_path, "mlflow")
    check_trackers(config)
    for steps in (range(1, 3), range(3, 6)):
        with tracking.tracking(config, root):
            append(root / METRICS_FILE, steps, **{"semantic_load/0": 0.5, "token_alignment": float("nan")})
    client = mlflow.MlflowClient(f"file:{tmp_path}/store")
    experiment = client.get_experiment_by_name("prophy")
    [run] = client.search_runs([experiment.experiment_id])
    assert (run.info.status, run.info.run_name) == ("FINISHED", "run")
    assert run.data.params["train.learning_rate"] == str(config.train.learning_rate)
    history = client.get_metric_history(run.info.run_id, "loss")
    assert [(metric.step, metric.value) for metric in history] == [(n, 1 / n) for n in range(1, 6)]
    assert "semantic_load/0" in run.data.metrics


def test_a_run_of_weights_and_biases_without_a_connection(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    config, root = tracked(tmp_path, "wandb")
    check_trackers(config)
    for steps in (range(1, 3), range(3, 6)):
        with tracking.tracking(config, root):
            append(root / METRICS_FILE, steps)
    run_id = json.loads((root / "wandb.json").read_text())["run_id"]
    folders = sorted((root / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(f"-{run_id}") for folder in folders)
    files = [folder / f"run-{run_id}.wandb" for folder in folders]
    assert all(b"loss" in file.read_bytes() for file in files)
