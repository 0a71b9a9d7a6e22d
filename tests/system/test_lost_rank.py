"""`prophy train` on two nodes, of which one is lost without a notice: fewer workers go on, then all again."""

import json
import signal
from pathlib import Path

import pytest

from pipelines.config import Config
from pipelines.layout import METRICS_FILE
from pipelines.training import train
from pipelines.training.checkpoint_places import FolderStore
from tests.conftest import tiny_config
from tests.killing import Run
from tests.nodes import cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

OVERRIDES = (
    "train.num_workers=2",
    "train.min_workers=1",
    "train.cpus_per_worker=4",
    "train.save_every=10",
    "train.log_every=1",
)


def rows(run_dir: Path) -> list[dict[str, float]]:
    metrics = run_dir / "train" / METRICS_FILE
    return [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []


def test_a_node_is_lost_and_another_comes(
    tiny_cache: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    overrides = (f"cache.output={tiny_cache.cache.output}", *OVERRIDES)
    with cluster(head_cpus=2) as nodes:
        nodes.add(num_cpus=4)
        doomed = nodes.add(num_cpus=4)
        monkeypatch.setenv("RAY_ADDRESS", nodes.address)
        run = Run("train", tmp_path / "run", (*overrides, "train.num_steps=100000"), "ray::RayTrainWorker")
        monkeypatch.delenv("RAY_ADDRESS")
        try:
            checkpoints = FolderStore(str(run.folder / "train" / "checkpoints"))
            run.wait_until(lambda: bool(checkpoints.committed()))
            nodes.kill(doomed)
            run.wait_until(lambda: "1 of 2 workers have room" in run.log.read_text())
            before = run.log.read_text().count("resumed from step")
            nodes.add(num_cpus=4)
            run.wait_until(lambda: run.log.read_text().count("resumed from step") > before + 1)
            resumed = len(rows(run.folder))
            run.wait_until(lambda: len(rows(run.folder)) > resumed + 2)
            run.process.send_signal(signal.SIGTERM)
            assert run.process.wait() == 128 + signal.SIGTERM, run.log.read_text()[-3000:]
        finally:
            run.clean_up()

    found = rows(run.folder)
    undisturbed = tiny_config(tmp_path / "undisturbed", *overrides, f"train.num_steps={len(found)}")
    train.run(undisturbed)
    expected = rows(undisturbed.run_dir)
    assert [row["step"] for row in found] == [row["step"] for row in expected]
    for name in ("loss", "gradient_norm"):
        assert [row[name] for row in found] == pytest.approx([row[name] for row in expected], rel=1e-3)
