"""Held-out clips and sample videos, measured and made beside a run."""

import json
import math
import shutil
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.caching import cache
from pipelines.config import Config
from pipelines.layout import EVALUATION_FILE, METRICS_FILE, SAMPLES_FOLDER, TENSORBOARD_FOLDER
from pipelines.sandbox import simulate
from pipelines.training import watcher
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.data import build_dataset
from pipelines.training.evaluation import QUANTILES, held_out_losses
from pipelines.training.json_lines import read_rows, write_rows
from pipelines.training.samples import describe_held_out, held_out
from pipelines.training.train import run
from pipelines.training.watcher import best_step, evaluating
from prophy.errors import ProPhyError
from prophy.training.cache import PriorCache
from prophy.video import probe
from tests.caches import encodings_folder, priors_folder
from tests.conftest import tiny_config


def evaluated_config(tiny_cache: Config, run_dir: Path, *overrides: str) -> Config:
    return tiny_config(
        run_dir,
        f"cache.output={tiny_cache.cache.output}",
        "cache.rows_per_file=4",
        "train.num_workers=1",
        "train.num_steps=4",
        "train.save_every=4",
        "train.num_held_out=2",
        "train.sample_prompts=[a red ball bounces on melting ice]",
        "sampling.num_inference_steps=2",
        *overrides,
    )


def read_cache(config: Config) -> PriorCache:
    return PriorCache(priors_folder(config), encodings_folder(config))


@pytest.fixture(scope="module")
def evaluated(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run on clips of 2 and of 1 s, one of each from every video."""
    run_dir = tmp_path_factory.mktemp("evaluated") / "run"
    overrides = ("simulate.num_clips=6", "simulate.num_frames=25", "cache.shorter_clips_s=[1.0]")
    clips = tiny_config(run_dir, *overrides)
    simulate.run(clips)
    assert cache.run(clips).num_encodings == 12
    config = evaluated_config(clips, run_dir, *overrides, "train.log_every=1")
    run(config)
    return config


def test_batches_are_of_one_length(evaluated: Config) -> None:
    cached = read_cache(evaluated)
    samples = {shape[1]: ids.to_pylist() for shape, ids in cached.by_shape(cached.sample_ids).items()}
    assert {num_frames: len(ids) for num_frames, ids in samples.items()} == {5: 6, 3: 6}
    assert all(sample_id.endswith("-0000000-0002000") for sample_id in samples[5])
    assert all(sample_id.endswith("-0002000-0003000") for sample_id in samples[3])
    rows = read_rows(evaluated.run_dir / "train" / METRICS_FILE)
    tokens = [round(row["tokens_per_s"] * row["step_time_s"]) for row in rows]
    assert Counter(tokens) == {4 * 3 * 64: 2, 4 * 5 * 64: 2}  # of the 8 samples that are not held out


def test_last_checkpoint_is_measured_on_held_out_clips(evaluated: Config) -> None:
    root = evaluated.run_dir / "train"
    [row] = [json.loads(line) for line in (root / EVALUATION_FILE).read_text().splitlines()]
    assert row.pop("step") == 4
    assert row.pop("held_out") == describe_held_out(evaluated, read_cache(evaluated))
    assert row == pytest.approx(
        held_out_losses(evaluated, read_cache(evaluated), evaluated.run_dir / "model"), rel=1e-5
    )
    assert {"semantic_alignment", "token_alignment", "load_balancing", "expert_load/7"} < row.keys()
    weights = evaluated.train.loss_weights
    assert row["loss"] == pytest.approx(
        row["diffusion"] + sum(weight * row[name] for name, weight in weights if name in row)
    )
    assert FolderStore(evaluated.checkpoints).pinned() == {"best": 4}
    by_quantile = [row[f"diffusion/quantile_{quantile}"] for quantile in QUANTILES]
    assert row["diffusion"] == pytest.approx(sum(by_quantile) / len(QUANTILES))
    assert len(set(by_quantile)) == len(QUANTILES)
    board = EventAccumulator(str(root / TENSORBOARD_FOLDER / "evaluation")).Reload()
    assert [event.value for event in board.Scalars("diffusion")] == [pytest.approx(row["diffusion"])]
    assert [event.step for event in board.Images("sample/0")] == [4]


def test_a_line_that_a_kill_cut_short(evaluated: Config, tmp_path: Path) -> None:
    """The checkpoint of that line is evaluated again, and the file stays one of JSON lines."""
    root = tmp_path / "train"
    shutil.copytree(evaluated.run_dir / "train" / "checkpoints", root / "checkpoints")
    (root / EVALUATION_FILE).write_text('{"step": 2}\n{"step": 4, "diffu')
    train = evaluated.train.model_copy(update={"sample_prompts": []})
    again = evaluated.model_copy(update={"run_dir": tmp_path, "train": train})
    with evaluating(again, read_cache(again), root):
        pass
    lines = (root / EVALUATION_FILE).read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [2, 4]


def test_best_is_the_lowest_loss_of_those_that_are_there(evaluated: Config, tmp_path: Path) -> None:
    config = evaluated.model_copy(update={"run_dir": tmp_path})
    saved = Path(evaluated.checkpoints) / "step-00000004" / MANIFEST
    for step in (2, 3, 4, 5):
        folder = Path(config.checkpoints) / f"step-{step:08d}"
        folder.mkdir(parents=True)
        shutil.copy(saved, folder)
    rows = [{"step": 1, "loss": 0.1}, {"step": 2, "loss": 0.5}, {"step": 3, "loss": 0.3}]
    rows += [{"step": 4, "loss": 0.4}, {"step": 5, "loss": math.nan}]
    cache = read_cache(evaluated)
    held = describe_held_out(config, cache)
    write_rows(tmp_path / EVALUATION_FILE, [{"held_out": held, **row} for row in rows])
    assert best_step(config, cache, tmp_path) == 3
    other = config.train.model_copy(update={"keep_best": False})
    assert best_step(config.model_copy(update={"train": other}), cache, tmp_path) is None


class Unanswering(FolderStore):
    """Answers some of the questions for what is committed with an error."""

    look_every_s = 0.001

    def __init__(self, location: str, num_errors: int) -> None:
        super().__init__(location)
        self._num_errors = num_errors

    def committed(self) -> list[int]:
        self._num_errors -= 1
        if self._num_errors >= 0:
            raise ProPhyError("S3 does not answer")
        return [4]


@pytest.mark.parametrize(("num_errors", "expected"), [(3, [4]), (1000, [])])
def test_the_last_checkpoint_is_looked_for_again(
    num_errors: int, expected: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tiny_config(tmp_path / "run", "train.num_held_out=2", "train.keep_best=false")
    (tmp_path / "run").mkdir()
    store, evaluated = Unanswering(str(tmp_path / "checkpoints"), num_errors), list[int]()
    monkeypatch.setattr(watcher, "open_checkpoints", lambda _: store)
    task = SimpleNamespace(remote=lambda *arguments: arguments[-1])
    ray = SimpleNamespace(remote=lambda _: SimpleNamespace(options=lambda **_: task), get=evaluated.append)
    monkeypatch.setattr(watcher, "ray", ray)
    cache: Any = SimpleNamespace(sample_ids=pa.array(["a-0", "b-0", "c-0"]))
    with evaluating(config, cache, tmp_path / "run"):
        pass
    assert evaluated == expected


def test_last_checkpoint_makes_a_video_and_its_maps(evaluated: Config) -> None:
    folder = evaluated.run_dir / "train" / SAMPLES_FOLDER / "step-00000004"
    assert probe(folder / "0.mp4").num_frames == 17
    width, height = Image.open(folder / "0.png").size
    assert width == 6 * 64 and 3 * 64 < height < 4 * 64  # frames, and the two maps that the prompt names


def test_held_out_clips_are_not_trained_on(tiny_cache: Config, tmp_path: Path) -> None:
    config = evaluated_config(tiny_cache, tmp_path / "run")
    samples = read_cache(config)
    kept_out = held_out(samples.sample_ids, 2).to_pylist()
    dataset = build_dataset(config, samples, rank=0)
    trained = {sample_id for step in range(5) for batch in dataset[step][0] for sample_id in batch.sample_ids}
    assert len(kept_out) == 2 and trained == {*samples.sample_ids.to_pylist()} - {*kept_out}


def test_everything_is_held_out(tiny_cache: Config, tmp_path: Path) -> None:
    config = evaluated_config(tiny_cache, tmp_path / "run", "train.num_held_out=12")
    with pytest.raises(ProPhyError, match=r"train\.num_held_out \(12\) leaves no video to train on"):
        run(config)
