"""The rows of the ablation: what each trains, and that all are compared."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.config import Config, load_config
from pipelines.evaluation import ablation
from pipelines.evaluation.ablation import ROWS, config_of
from tests.conftest import tiny_config


def test_the_rows_differ_in_nothing_but_what_they_are_called_after(tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    rows = [config_of(row, config) for row in ROWS]
    assert len({row.run_dir for row in rows}) == len(rows) and all(
        row.train.start_from is None for row in rows
    )
    assert all(row.cache == config.cache and row.train.num_steps == config.train.num_steps for row in rows)
    parts = [
        (
            row.train.backbone,
            row.physics.physical_blocks,
            row.physics.num_semantic_experts,
            row.physics.num_refinement_experts,
            row.train.loss_weights.token_alignment > 0,
        )
        for row in rows
    ]
    assert parts == [
        ("lora", False, 0, 0, True),
        ("lora", False, 8, 0, True),
        ("lora", False, 0, 8, True),
        ("frozen", True, 8, 8, True),
        ("frozen", True, 8, 8, False),
    ]
    assert {row.train.checkpoints for row in rows} == {None}
    there = tiny_config(tmp_path, "train.checkpoints=s3://bucket/run")
    places = [config_of(row, there).checkpoints for row in ROWS]
    assert len(set(places)) == len(rows) and places[0] == "s3://bucket/run/ablation/lora"
    unaligned = rows[-1].train.loss_weights
    assert unaligned.semantic_alignment == 0 and unaligned.load_balancing == 0.01


@pytest.mark.slow
def test_rows_are_trained_and_compared(
    tiny_cache: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = load_config(
        "tiny",
        [
            f"run_dir={tmp_path / 'run'}",
            f"cache.input={tiny_cache.cache.input}",
            f"cache.output={tiny_cache.cache.output}",
            "cache.encode_batch_size=1",
            "train.num_steps=1",
            "train.num_workers=1",
            "evaluate.num_clips=6",
            "evaluate.noise_levels=[0.9]",
            "evaluate.measures=[loss]",
            "evaluate.pool.size=1",
        ],
    )
    monkeypatch.setattr(ablation, "ROWS", ROWS[-1:])
    report = ablation.run(config)
    rows = pq.read_table(config.evaluate.output / "scores.parquet").to_pylist()
    assert {row["contestant"] for row in rows} == {"backbone", ROWS[-1].name}
    assert "minus backbone" in report.read_text()
    checkpoints = Path(config_of(ROWS[-1], config).checkpoints)
    trained = {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*.safetensors")}
    ablation.run(config)
    assert trained == {path: path.stat().st_mtime_ns for path in checkpoints.rglob("*.safetensors")}
