"""`prophy train` killed with SIGKILL: a worker, the driver, or its whole Ray, also during a save; then again.

Real processes with Rays of their own. The run that is left must hold the parameters, to the last bit, and
the losses of an undisturbed one. It trains an adapter beside the branch, on clips of two shapes; Wan, and
CogVideoX at tiny random weights.
"""

import json
import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from pipelines.caching import cache
from pipelines.config import Config
from pipelines.layout import METRICS_FILE
from pipelines.sandbox import simulate
from pipelines.training.checkpoint import MANIFEST
from pipelines.training.checkpoint_places import open_checkpoints
from prophy.stores import files_below
from prophy.training.cache import PriorCache
from prophy.video import read_frames, write_video
from tests.caches import encodings_folder, priors_folder
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config
from tests.killing import Run, kill_at_a_moment, starter
from tests.object_store import object_store

pytestmark = pytest.mark.slow

OVERRIDES = (
    "backbone.aspect_buckets=[[64,64],[48,80]]",
    "vlm.aspect_buckets=[[64,64],[48,80]]",
    "train.backbone=lora",
    "train.lora_rank=4",
    "train.start_from=null",
    "train.micro_batch_size=1",
    "train.num_steps=6",
    "train.save_every=2",
    "train.log_every=1",
    "physics.physics_layers=[0,2]",
)
MOMENTS = (("any", "driver"), ("any", "worker"), ("any", "node"), ("save", "node"))


def command(folder: Path, config: Config) -> tuple[str, Path, tuple[str, ...], str]:
    """The arguments of `Run` for another run of a configuration."""
    backbone = [
        f"backbone.{key}={getattr(config.backbone, key)}"
        for key in ("family", "pretrained", "max_sequence_length")
    ]
    overrides = (f"cache.output={config.cache.output}", *backbone, *OVERRIDES)
    return "train", folder, overrides, "ray::RayTrainWorker"


def steps(folder: Path) -> int:
    """Steps in the metrics of a run."""
    metrics = folder / "train" / METRICS_FILE
    return len(metrics.read_text().splitlines()) if metrics.exists() else 0


def is_saving(folder: Path) -> bool:
    """Whether a checkpoint of a run has files, and no manifest yet."""
    checkpoints = (folder / "train" / "checkpoints").glob("step-*")
    return any(any(step.glob("rank-*")) and not (step / MANIFEST).exists() for step in checkpoints)


@pytest.fixture(scope="module")
def undisturbed(
    ray_cluster: None, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest
) -> Config:
    """A run of a family that nothing happened to; half of its clips are cropped to the wide shape."""
    folder = tmp_path_factory.mktemp("kill")
    videos = folder / "videos"
    videos.mkdir()
    overrides = ["simulate.num_clips=12", f"cache.input={videos}", *OVERRIDES]
    if request.param == "cogvideox":
        overrides += [
            "backbone.family=cogvideox",
            f"backbone.pretrained={write_pipeline(folder / 'backbone')}",
            f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}",
        ]
    config = tiny_config(folder / "run", *overrides)
    simulate.run(config)
    for number, clip in enumerate(sorted(config.simulate.output.rglob("*.mp4"))):
        frames = read_frames(clip, 0.0, 2.0, 17, 64, 64)
        write_video(videos / clip.name, frames[:, 13:51] if number % 2 else frames, 8)
    cache.run(config)
    samples = PriorCache(priors_folder(config), encodings_folder(config))
    assert [*map(len, samples.by_shape(samples.sample_ids).values())] == [6, 6]
    Run(*command(config.run_dir, config)).finish()
    return config


@pytest.fixture
def runs(undisturbed: Config, tmp_path: Path) -> Iterator[Callable[[], Run]]:
    """Starts the same command, any number of times."""
    with starter(*command(tmp_path / "run", undisturbed)) as start:
        yield start


def losses(folder: Path) -> list[tuple[float, ...]]:
    rows = [json.loads(line) for line in (folder / "train" / METRICS_FILE).read_text().splitlines()]
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in rows]


def assert_equal_runs(folder: Path, undisturbed: Config) -> None:
    for name in ("physics_branch.safetensors", "pytorch_lora_weights.safetensors"):
        expected = load_file(undisturbed.run_dir / "model" / name)
        found = load_file(folder / "model" / name)
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], value) for key, value in expected.items())
    assert losses(folder) == losses(undisturbed.run_dir)


@pytest.mark.parametrize("undisturbed", ["wan", "cogvideox"], indirect=True)
def test_killed_during_a_save_and_a_worker_killed_later(
    runs: Callable[[], Run], undisturbed: Config, tmp_path: Path
) -> None:
    first = runs()
    first.wait_until(lambda: is_saving(first.folder))
    first.kill("node")
    first.process.wait()
    second = runs()
    second.wait_until(lambda: steps(second.folder) >= 3)
    assert second.kill("worker") == 1
    second.finish()
    assert_equal_runs(tmp_path / "run", undisturbed)


@pytest.mark.parametrize("undisturbed", ["wan"], indirect=True)
def test_checkpoints_in_s3(undisturbed: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed during a save that is not the first; the undisturbed run has its checkpoints in a folder."""
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path / "home"))
    name, folder, overrides, workers = command(tmp_path / "run", undisturbed)
    overrides = (*overrides, "train.checkpoints=s3://bucket/deep/run")
    with object_store() as store, starter(name, folder, overrides, workers) as start:
        store.mkdir("bucket")
        checkpoints = open_checkpoints("s3://bucket/deep/run")

        def names() -> set[str]:
            return set(files_below("s3://bucket/deep/run"))

        def is_saving_again() -> bool:
            saved = {name.partition("/")[0] for name in names() if "/rank-" in name}
            return bool(0 < len(checkpoints.committed()) < len(saved))

        first = start()
        first.wait_until(is_saving_again)
        first.kill("node")
        first.process.wait()
        [last, *_] = checkpoints.committed()
        said = start().finish()
        assert "taking over s3://bucket/deep/run from a run that ended without" in said
        assert f"resumed from step {last}" in said
        assert_equal_runs(tmp_path / "run", undisturbed)
        for file in (undisturbed.run_dir / "model").iterdir():
            assert (folder / "model" / file.name).read_bytes() == file.read_bytes()
        assert checkpoints.committed() == [6, 4]
        assert len(names()) == 2 + 2 * 3, (
            "the name of the run, its lease, and of each checkpoint two parts and a manifest"
        )
        assert "step 6 of 6 was reached before" in start().finish()
    left = (path for path in (tmp_path / "home" / "checkpoints").rglob("*") if path.is_file())
    assert {path.name for path in left} == {".lock"}
    assert not (folder / "train" / "checkpoints").exists()


@pytest.fixture(scope="module")
def usual_seconds(undisturbed: Config, tmp_path_factory: pytest.TempPathFactory) -> float:
    start = time.monotonic()
    Run(*command(tmp_path_factory.mktemp("usual") / "run", undisturbed)).finish()
    return time.monotonic() - start


@pytest.mark.parametrize("trial", range(6))
@pytest.mark.parametrize("undisturbed", ["wan", "cogvideox"], indirect=True)
def test_a_kill_at_any_moment_costs_nothing(
    runs: Callable[[], Run], undisturbed: Config, usual_seconds: float, tmp_path: Path, trial: int
) -> None:
    random.seed(trial)
    moment, victim = MOMENTS[trial % len(MOMENTS)]
    if moment == "save":
        first = runs()
        first.wait_until(lambda: is_saving(first.folder))
        assert first.kill(victim)
    else:
        first, _, _ = kill_at_a_moment(runs, victim, usual_seconds)
    first.process.wait()
    runs().finish()
    assert_equal_runs(tmp_path / "run", undisturbed)
