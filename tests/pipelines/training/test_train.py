"""Training for real: two workers of Ray Train on a tiny cache, resumed by the same command; and bad input."""

import itertools
import json
import math
import os
import shutil
import signal
import threading
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from ray.train.torch import TorchTrainer
from safetensors.torch import load_file, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.config import Config
from pipelines.layout import METRICS_FILE, TENSORBOARD_FOLDER
from pipelines.metrics import TRAINING
from pipelines.training import train
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.json_lines import read_rows
from pipelines.training.metrics import MetricsLog
from pipelines.training.model import build_module
from pipelines.training.train import alone, run
from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import resolve_pretrained
from prophy.errors import ProPhyError
from prophy.schema import INDEX
from prophy.tiny import bundled
from prophy.training.cache import PriorCache
from prophy.training.data import BatchPlan, TrainBatch
from tests.caches import encodings_folder
from tests.conftest import tiny_config
from tests.object_store import object_store
from tests.wisa import PHENOMENA

NULL_TEXT = {"prompt_embeds": torch.zeros(32, 192)}


def train_config(tiny_cache: Config, run_dir: Path, *overrides: str) -> Config:
    """Two workers, two accumulation steps of one sample each; the cache of the whole session."""
    return tiny_config(
        run_dir,
        f"cache.output={tiny_cache.cache.output}",
        "cache.rows_per_file=4",
        "train.micro_batch_size=1",
        "train.log_every=1",
        "train.save_every=2",
        "train.max_failures=0",
        *overrides,
    )


def weights(model: Path) -> dict[str, torch.Tensor]:
    [file] = model.glob("*.safetensors")
    return load_file(file)


def rows(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "train" / METRICS_FILE).read_text().splitlines()]


def saved_steps(run_dir: Path) -> list[int]:
    return FolderStore(str(run_dir / "train" / "checkpoints")).committed()


@pytest.fixture(scope="module")
def through(tiny_cache: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that SIGTERM stopped after the fifth step: `train.num_steps` is how far it came."""
    run_dir = tmp_path_factory.mktemp("through") / "run"
    config = train_config(tiny_cache, run_dir, "train.num_steps=500")

    def terminate() -> None:
        while len(read_rows(run_dir / "train" / METRICS_FILE)) < 5:
            time.sleep(0.1)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=terminate, daemon=True).start()
    with pytest.raises(SystemExit) as left:
        run(config)
    assert left.value.code == 143
    return train_config(tiny_cache, run_dir, f"train.num_steps={saved_steps(run_dir)[0]}")


def stopped(through: Config, run_dir: Path) -> Path:
    """The same run, killed during its last save: the last good checkpoint is the one before."""
    shutil.copytree(through.run_dir, run_dir)
    [file, _] = sorted((run_dir / "train" / "checkpoints" / last_step(through)).glob("rank-*"))
    file.write_bytes(file.read_bytes()[:-1])
    return run_dir


def last_step(config: Config) -> str:
    return f"step-{config.train.num_steps:08d}"


def last_checkpoint(config: Config) -> Checkpoint:
    with FolderStore(config.checkpoints).open(config.train.num_steps) as checkpoint:
        return checkpoint


class Ended(NamedTuple):
    """A run that met a sample without finite values at `step`, counted from 1."""

    config: Config
    sample_id: str
    step: int
    error: ProPhyError


@pytest.fixture(scope="module")
def resumed(through: Config, tiny_cache: Config, tmp_path_factory: pytest.TempPathFactory) -> Ended:
    """The run that was killed, resumed; it goes on to where the other came, and then to a spoilt sample."""
    folder = tmp_path_factory.mktemp("resumed")
    cache = folder / "cache"
    shutil.copytree(tiny_cache.cache.output, cache)
    overrides = (
        f"cache.output={cache}",
        "train.num_steps=50",
        "train.num_to_keep=50",
        "train.max_failures=2",
    )
    by_time = ("train.save_every=1000", "train.save_every_s=1e-9")  # at every step
    config = train_config(tiny_cache, stopped(through, folder / "run"), *overrides, *by_time)
    table = encodings_folder(config)
    samples = PriorCache(cache / "priors", table)
    plan = BatchPlan(samples.by_shape(samples.sample_ids), 4, config.train.seed)
    compared = range(saved_steps(through.run_dir)[1], through.train.num_steps)  # counted from 0
    seen = {sample_id for step in compared for sample_id in plan(step)}
    sample_id = max({*samples.sample_ids.to_pylist()} - seen)
    spoil_latents(table, sample_id)
    step = next(step for step in itertools.count(compared.stop) if sample_id in plan(step))
    with pytest.raises(ProPhyError) as error:
        run(config)
    return Ended(config, sample_id, step + 1, error.value)


@pytest.fixture(scope="module")
def on_one_worker(through: Config, tiny_cache: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """The run that was killed, brought to where the other came by one worker."""
    run_dir = stopped(through, tmp_path_factory.mktemp("one") / "run")
    overrides = (f"train.num_steps={through.train.num_steps}", "train.num_workers=1")
    config = train_config(tiny_cache, run_dir, *overrides)
    assert run(config) == run_dir / "model"
    return config


def test_sigterm_saves_first(through: Config) -> None:
    steps = [row["step"] for row in rows(through.run_dir)]
    assert steps == list(range(1, through.train.num_steps + 1)) and 5 <= len(steps) < 500
    assert not (through.run_dir / "model").exists()


def test_every_step_is_in_the_metrics_once(on_one_worker: Config) -> None:
    folder, lines = on_one_worker.run_dir / "train", rows(on_one_worker.run_dir)
    steps = list(range(1, on_one_worker.train.num_steps + 1))
    assert [row["step"] for row in lines] == steps
    board = EventAccumulator(str(folder / TENSORBOARD_FOLDER)).Reload()
    for name in set(lines[0]) - {"step"}:
        assert [event.step for event in board.Scalars(name)] == steps
    weights = on_one_worker.train.loss_weights
    for row in lines:
        assert row["learning_rate"] == pytest.approx(1e-3 * min(1, row["step"] / 10))
        assert row["loss"] == pytest.approx(
            row["diffusion"]
            + weights.semantic_alignment * row["semantic_alignment"]
            + weights.token_alignment * row["token_alignment"]
            + weights.load_balancing * row["load_balancing"]
        )
        assert row["gradient_norm"] > 0 and row["samples_per_s"] > 0
        assert row["samples_per_s"] * row["step_time_s"] == pytest.approx(4)
        assert row["tokens_per_s"] == pytest.approx(row["samples_per_s"] * 5 * 8 * 8)
        phases = [row[f"{phase}_time_s"] for phase in ("data", "forward", "backward", "optimizer")]
        assert min(phases) > 0 and sum(phases) < row["step_time_s"]
        assert row["mfu"] > 0 and row["peak_rss_gb"] > 0.1
        assert sum(row[f"expert_load/{index}"] for index in range(8)) == pytest.approx(1)
        assert 0 < row["router_entropy"] <= math.log(8)
        assert TRAINING.keys() <= row.keys()


def test_old_checkpoints_go(through: Config, on_one_worker: Config) -> None:
    last = through.train.num_steps
    for config in (through, on_one_worker):
        assert saved_steps(config.run_dir) == [last, 2 * ((last - 1) // 2)]


def test_resumed_run_equals_one_that_ran_through(through: Config, resumed: Ended) -> None:
    with FolderStore(resumed.config.checkpoints).open(through.train.num_steps) as after:
        expected = last_checkpoint(through)
    assert expected.shapes == after.shapes and expected.kinds == after.kinds
    for name in expected.shapes:
        for kind in expected.kinds:
            assert torch.equal(expected.tensor(kind, name), after.tensor(kind, name)), (kind, name)
    before, again = rows(through.run_dir), rows(resumed.config.run_dir)
    measured = {"samples_per_s", "tokens_per_s", "mfu", "peak_rss_gb"}
    measured |= {key for key in before[0] if key.endswith("time_s")}
    assert len(again) == resumed.step - 1 >= len(before)
    for old, new in zip(before, again, strict=False):
        assert {key: old[key] for key in old.keys() - measured} == {
            key: new[key] for key in new.keys() - measured
        }


def test_one_worker_goes_on_where_two_stopped(through: Config, on_one_worker: Config) -> None:
    expected = last_checkpoint(through)
    for name, value in weights(on_one_worker.run_dir / "model").items():
        before = expected.tensor("parameter", f"transformer.physics_branch.{name}")
        # Adam makes a whole step of a gradient that is nothing but rounding, so single numbers may differ.
        assert torch.linalg.vector_norm(value - before) <= 1e-3 * torch.linalg.vector_norm(before), name
    for old, new in zip(rows(through.run_dir), rows(on_one_worker.run_dir), strict=True):
        assert old["step"] == new["step"]
        # After a step of Adam a rounding may send a token to another expert: shares move by whole choices, of
        # which there are 2560 in a step, and the losses jump. Where no token moved, nothing does.
        moved = sum(abs(new[f"expert_load/{index}"] - old[f"expert_load/{index}"]) for index in range(8))
        bound = 1e-3 + moved if moved > 1e-6 else 1e-5
        for key in ("loss", "diffusion", "token_alignment", "semantic_alignment"):
            assert new[key] == pytest.approx(old[key], rel=bound)
        # E times the sum of f_i P_i, where P_i is 1 at most and f_i the share.
        assert new["load_balancing"] == pytest.approx(old["load_balancing"], rel=bound, abs=8 * moved)


def test_a_loss_that_is_not_finite(through: Config, resumed: Ended) -> None:
    """Names the step and the sample, does not restart, keeps the checkpoint before."""
    _, sample_id, step, error = resumed
    assert f"the loss of the samples {sample_id} is not finite at step {step}; " in str(error)
    assert f"; the checkpoint of step {step - 1} is kept: train in another run_dir" in str(error)
    assert saved_steps(resumed.config.run_dir)[0] == step - 1
    boards = [
        list((run_dir / "train" / TENSORBOARD_FOLDER).glob("events*"))
        for run_dir in (through.run_dir, resumed.config.run_dir)
    ]
    assert [len(files) for files in boards] == [1, 2]


def spoil_latents(table: Path, sample_id: str) -> None:
    [row] = [row for row in pq.read_table(table / INDEX).to_pylist() if row["sample_id"] == sample_id]
    file = table / row["file"]
    content, footer = pq.read_table(file), pq.read_schema(file)
    samples = content.to_pylist()
    for sample in samples:
        if sample["sample_id"] == sample_id:
            sample["latents"] = np.full(sample["latents_shape"], np.nan, np.float32).tobytes()
    pq.write_table(pa.Table.from_pylist(samples, footer), file, row_group_size=1)


def test_finished_run_only_exports_again(on_one_worker: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchTrainer, "fit", None)  # no workers
    model, metrics = on_one_worker.run_dir / "model", on_one_worker.run_dir / "train" / METRICS_FILE
    before, lines = weights(model), metrics.read_text()
    in_the_way = model.with_name("model.partial")
    in_the_way.touch()
    with pytest.raises(ProPhyError, match=f"cannot export to {model}: .*; mend that"):
        run(on_one_worker)
    in_the_way.unlink()
    for is_there in (True, False):
        if not is_there:
            shutil.rmtree(model)
        run(on_one_worker)
        assert [path.name for path in model.parent.glob("model*")] == ["model"]
        after = weights(model)
        assert all(torch.equal(after[name], before[name]) for name in before)
    assert metrics.read_text() == lines


def test_last_checkpoint_is_seen_late_or_never(
    through: Config, tiny_cache: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a shared file system, where another node has written it."""
    overrides = f"train.num_steps={through.train.num_steps}"
    config = train_config(tiny_cache, tmp_path / "run", overrides)
    written = [Path(run.checkpoints) / last_step(through) for run in (through, config)]

    def fit(_: TorchTrainer) -> SimpleNamespace:
        threading.Timer(1.0, shutil.copytree, written).start()
        return SimpleNamespace(return_value=None)

    monkeypatch.setattr(TorchTrainer, "fit", fit)
    assert weights(run(config)).keys()
    monkeypatch.setattr(TorchTrainer, "fit", lambda _: SimpleNamespace(return_value=None))
    monkeypatch.setattr(train, "_VISIBLE_WITHIN_S", 0.0)
    with pytest.raises(ProPhyError, match=r"the checkpoint of step \d+ in .* is missing or damaged"):
        run(train_config(tiny_cache, tmp_path / "other", overrides))


def test_trained_branch_loads_into_the_pipeline(on_one_worker: Config) -> None:
    pipeline = load_pipeline(
        "wan",
        "tiny",
        None,
        torch.float32,
        on_one_worker.run_dir / "model",
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    start = build_module(on_one_worker, NULL_TEXT, PHENOMENA).transformer
    loaded = dict(pipeline.transformer.named_parameters())
    for name, parameter in start.named_parameters():
        moved = not torch.equal(parameter, loaded[name])
        assert moved == name.startswith("physics_branch."), name


def test_only_the_branch_is_trained(config: Config) -> None:
    transformer = build_module(config, NULL_TEXT, PHENOMENA).transformer
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == name.startswith("physics_branch.")


def test_run_folder_of_another_run(on_one_worker: Config, tiny_cache: Config) -> None:
    with pytest.raises(ProPhyError, match=r"belongs to another run: train\.seed is 0 there and 1 here"):
        run(train_config(tiny_cache, on_one_worker.run_dir, "train.num_steps=50", "train.seed=1"))


@pytest.mark.parametrize("schedule", ["cosine", "constant"])
def test_more_steps_than_before_change_a_cosine(
    schedule: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def config(num_steps: int) -> Config:
        return tiny_config(
            tmp_path, f"train.num_steps={num_steps}", f"train.lr_schedule={schedule}", "train.warmup_steps=0"
        )

    folder = Path(config(100).checkpoints) / "step-00000100"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(json.dumps({"run": {"num_steps": 100}}))
    train.compare_schedule(config(100))
    assert not caplog.messages
    train.compare_schedule(config(200))
    said = "was 100 and is 200: by train.lr_schedule cosine the learning rate after step 100 jumps from 0 to"
    assert (said in caplog.text) == (schedule == "cosine")
    assert ("from 0 to 0.0005, and" in caplog.text) == (schedule == "cosine")


def test_another_process_writes_checkpoints_there(tiny_cache: Config, tmp_path: Path) -> None:
    place = tmp_path / "checkpoints"
    place.mkdir()
    config = train_config(tiny_cache, tmp_path / "run", f"train.checkpoints={place}")
    said = f"another run writes to {place}; wait for it, or choose another train.checkpoints"
    with FolderStore(str(place)).alone(), pytest.raises(ProPhyError, match=said):
        run(config)
    assert not (tmp_path / "run" / "train.yaml").exists()  # a run at work keeps its own


def test_a_run_folder_that_cannot_be_written_to(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    root = tmp_path / "file" / "train"
    with pytest.raises(ProPhyError, match=f"cannot write to run_dir {root.parent}: .*"), alone(root):
        pass


def test_no_cache(config: Config) -> None:
    with pytest.raises(ProPhyError, match="no cache in .*priors; run `prophy cache`"):
        run(config)


def test_encodings_of_another_grid(tiny_cache: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="made for another backbone or other clips"):
        run(train_config(tiny_cache, tmp_path, "backbone.height=32"))


def test_encodings_of_another_vae(tiny_cache: Config, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(resolve_pretrained("tiny"), other)
    settings = json.loads((other / "vae" / "config.json").read_text())
    (other / "vae" / "config.json").write_text(json.dumps(settings | {"latents_std": [2.0] * 16}))
    with pytest.raises(ProPhyError, match="made for another backbone or other clips"):
        run(train_config(tiny_cache, tmp_path / "run", f"backbone.pretrained={other}"))


def test_fewer_samples_than_a_batch(tiny_cache: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="holds 12 samples, fewer than the global batch of 16"):
        run(train_config(tiny_cache, tmp_path, "train.global_batch_size=16"))


def test_log_drops_what_came_after_the_checkpoint(config: Config, tmp_path: Path) -> None:
    losses = dict.fromkeys(("diffusion", "semantic_alignment", "token_alignment", "load_balancing"), 1.0)
    log = MetricsLog(tmp_path, 0, config.train, {}, 1.0)
    for step in (1, 2, 3, 4):
        log.write(step, losses, {})
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # a worker killed while it wrote
    log = MetricsLog(tmp_path, 2, config.train, {}, 1.0)
    log.write(3, losses, {})
    lines = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in lines] == [1, 2, 3]


def test_utilisation_is_of_all_workers(config: Config, tmp_path: Path) -> None:
    """Two workers with a peak of 100 operations per second and two micro-batches of 50 each per step."""
    losses = dict.fromkeys(("diffusion", "semantic_alignment", "token_alignment", "load_balancing"), 1.0)
    batch = TrainBatch(["a"], torch.zeros(1, 4, 3, 8, 8), {}, *[torch.zeros(1, 48, 17)] * 7)
    log = MetricsLog(tmp_path, 0, config.train, {(4, 3, 8, 8): 50}, 100.0)
    for _ in range(3):
        log.count([batch, batch])
    log.write(3, losses, {"data": 3.0})
    [row] = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert row["mfu"] * row["step_time_s"] == pytest.approx(1.0)
    assert row["tokens_per_s"] * row["step_time_s"] == pytest.approx(2 * 2 * 48)
    assert row["data_time_s"] == 1.0


@pytest.mark.slow
def test_a_run_goes_on_from_a_branch_in_s3(tiny_cache: Config, tmp_path: Path) -> None:
    start = {name: value + 0.1 for name, value in weights(bundled("branch")).items()}
    with object_store() as store:
        store.mkdir("branches")
        store.put(f"{bundled('branch')}/", "branches/mine/", recursive=True)
        [name] = (file.name for file in bundled("branch").glob("*.safetensors"))
        store.pipe_file(f"branches/mine/{name}", save(start))
        settings = ("train.start_from=s3://branches/mine", "train.num_steps=1", "train.learning_rate=1e-9")
        trained = weights(run(train_config(tiny_cache, tmp_path / "run", *settings)))
    assert trained.keys() == start.keys()
    assert all(torch.allclose(trained[name], value.float(), atol=1e-6) for name, value in start.items())
