"""Training for real: two workers of Ray Train on a tiny cache, resumed by the same command; and bad input."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from pipelines.config import Config
from pipelines.train import METRICS_FILE, TENSORBOARD_FOLDER, MetricsLog, build_module, run
from prophy.backbones import load_pipeline, resolve_pretrained
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


def train_config(tiny_cache: Config, run_dir: Path, *overrides: str) -> Config:
    """Two workers, two accumulation steps of one sample each; the cache of the whole session."""
    return tiny_config(
        run_dir,
        f"cache.output={tiny_cache.cache.output}",
        "cache.rows_per_file=4",
        "train.micro_batch_size=1",
        "train.gradient_accumulation_steps=2",
        "train.log_every=1",
        "train.save_every=2",
        "train.max_failures=0",
        *overrides,
    )


def weights(model: Path) -> dict[str, torch.Tensor]:
    [file] = model.glob("*.safetensors")
    return load_file(file)


@pytest.fixture(scope="module")
def resumed(tiny_cache: Config, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A run that was stopped after 4 steps and resumed to 6 by the same command."""
    run_dir = tmp_path_factory.mktemp("resumed") / "run"
    run(train_config(tiny_cache, run_dir, "train.num_steps=4"))
    config = train_config(tiny_cache, run_dir, "train.num_steps=6")
    assert run(config) == run_dir / "model"
    return config


def test_every_step_is_in_the_metrics_once(resumed: Config) -> None:
    folder = resumed.run_dir / "train"
    rows = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    board = EventAccumulator(str(folder / TENSORBOARD_FOLDER)).Reload()
    for name in set(rows[0]) - {"step"}:
        assert [event.step for event in board.Scalars(name)] == [1, 2, 3, 4, 5, 6]
    weights = resumed.train.loss_weights
    for row in rows:
        assert row["learning_rate"] == pytest.approx(1e-3 * row["step"] / 10)
        assert row["loss"] == pytest.approx(
            row["diffusion"]
            + weights.semantic_alignment * row["semantic_alignment"]
            + weights.token_alignment * row["token_alignment"]
            + weights.load_balancing * row["load_balancing"]
        )
        assert row["gradient_norm"] > 0 and row["samples_per_s"] > 0
        assert row["samples_per_s"] * row["step_time_s"] == pytest.approx(4)


def test_old_checkpoints_go(resumed: Config) -> None:
    names = sorted(folder.name for folder in (resumed.run_dir / "train").glob("step-*"))
    assert names == ["step-00000004", "step-00000006"]


def test_resumed_run_equals_one_that_ran_through(resumed: Config, tiny_cache: Config, tmp_path: Path) -> None:
    through = weights(run(train_config(tiny_cache, tmp_path / "run", "train.num_steps=6")))
    stopped = weights(resumed.run_dir / "model")
    assert through.keys() == stopped.keys()
    assert all(torch.equal(through[name], stopped[name]) for name in through)


def test_finished_run_only_exports_again(resumed: Config) -> None:
    model, metrics = resumed.run_dir / "model", resumed.run_dir / "train" / METRICS_FILE
    before, lines = weights(model), metrics.read_text()
    shutil.rmtree(model)
    run(resumed)
    after = weights(model)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert metrics.read_text() == lines


def test_trained_branch_loads_into_the_pipeline(resumed: Config) -> None:
    pipeline = load_pipeline(
        "wan",
        "tiny",
        None,
        torch.float32,
        resumed.run_dir / "model",
        vae=None,
        text_encoder=None,
        tokenizer=None,
    )
    start = build_module(resumed, torch.zeros(32, 384)).transformer
    loaded = dict(pipeline.transformer.named_parameters())
    for name, parameter in start.named_parameters():
        moved = not torch.equal(parameter, loaded[name])
        assert moved == name.startswith("physics_branch."), name


def test_only_the_branch_is_trained(config: Config) -> None:
    transformer = build_module(config, torch.zeros(32, 384)).transformer
    for name, parameter in transformer.named_parameters():
        assert parameter.requires_grad == name.startswith("physics_branch.")


def test_other_workers_than_the_checkpoints(resumed: Config, tiny_cache: Config) -> None:
    config = train_config(tiny_cache, resumed.run_dir, "train.num_workers=1", "train.num_steps=8")
    with pytest.raises(ProPhyError, match=r"saved by 2 workers, and train\.num_workers is 1"):
        run(config)


def test_run_folder_of_another_run(resumed: Config, tiny_cache: Config) -> None:
    with pytest.raises(ProPhyError, match=r"belongs to another run: train\.seed is 0 there and 1 here"):
        run(train_config(tiny_cache, resumed.run_dir, "train.num_steps=8", "train.seed=1"))


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
    with pytest.raises(ProPhyError, match="holds 12 samples .* fewer than the global batch of 16"):
        run(train_config(tiny_cache, tmp_path, "train.micro_batch_size=4"))


def test_unknown_recipe(tiny_cache: Config, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no recipe 'magic'"):
        run(train_config(tiny_cache, tmp_path, "train.recipe=magic"))


def test_log_drops_what_came_after_the_checkpoint(config: Config, tmp_path: Path) -> None:
    losses = dict.fromkeys(("diffusion", "semantic_alignment", "token_alignment", "load_balancing"), 1.0)
    log = MetricsLog(tmp_path, 0, config.train)
    for step in (1, 2, 3, 4):
        log.write(step, losses)
    with (tmp_path / METRICS_FILE).open("a") as file:
        file.write('{"step": 5, "lo')  # a worker killed while it wrote
    log = MetricsLog(tmp_path, 2, config.train)
    log.write(3, losses)
    rows = [json.loads(line) for line in (tmp_path / METRICS_FILE).read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3]
