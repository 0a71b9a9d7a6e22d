"""What the jobs and the service run: where, with which preset, on how many GPUs."""

import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema

from pipelines.config import Config, load_config
from pipelines.serving.serve import AppArguments
from tests.cluster.manifests import OVERLAYS, RAY_JOB, built, ray_clusters
from tests.cluster.submitter import run_submitter

JOB = yaml.safe_load(RAY_JOB.read_text())
PRESETS = sorted({overlay.parent.name for overlay in OVERLAYS})


def configured(command: str) -> Config:
    """The configuration of `prophy COMMAND --config X --set Y ...`."""
    _, _, *options = shlex.split(command)
    pairs = list(zip(options[::2], options[1::2], strict=True))
    assert {name for name, _ in pairs} <= {"--config", "--set"}
    [preset] = [value for name, value in pairs if name == "--config"]
    return load_config(preset, [value for name, value in pairs if name == "--set"])


def num_gpus(objects: list[dict[str, Any]]) -> int:
    """GPUs of the cluster at its largest."""
    [cluster] = [cluster for found in objects for cluster in ray_clusters(found)]
    [group] = cluster["workerGroupSpecs"]
    [container] = group["template"]["spec"]["containers"]
    return group["maxReplicas"] * int(container["resources"]["limits"]["nvidia.com/gpu"])


def check_room(config: Config, gpus: int) -> None:
    train, cache = config.train, config.cache
    assert train.num_workers * train.gpus_per_worker <= gpus
    for pool in (cache.extract, cache.encode):
        assert pool.size * pool.num_gpus <= gpus


def test_the_whole_job_runs_on_the_cluster(tmp_path: Path) -> None:
    ran, status = run_submitter(JOB, tmp_path)
    assert ran == [f"head: prophy {command} --config wan2.1-1.3b" for command in ("cache", "train")]
    assert status == "SUCCEEDED"
    check_room(configured(ran[1].removeprefix("head: ")), num_gpus([JOB]))


def test_a_cache_that_fails_is_not_trained_on(tmp_path: Path) -> None:
    ran, status = run_submitter(JOB, tmp_path, fails="cache")
    assert [line.split()[2] for line in ran] == ["cache"]
    assert status == "FAILED"


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_s_jobs_run_on_its_cluster(preset: str, tmp_path: Path) -> None:
    overlay = OVERLAYS[0].parent.parent / preset
    cluster = built(overlay / "cluster")
    [name] = [found["metadata"]["name"] for found in cluster if found["kind"] == "RayCluster"]
    for job in built(overlay / "jobs"):
        assert job["spec"]["clusterSelector"] == {"ray.io/cluster": name}
        folder = tmp_path / job["metadata"]["name"]
        folder.mkdir()
        [line], status = run_submitter(job, folder)
        assert status == "SUCCEEDED"
        assert line == f"head: {job['spec']['entrypoint']}"
        config = configured(line.removeprefix("head: "))
        assert config.run_dir.name == preset
        check_room(config, num_gpus(cluster))


@pytest.mark.parametrize("preset", PRESETS)
def test_each_preset_s_service_is_one_that_serve_can_build(
    preset: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    [service] = built(OVERLAYS[0].parent.parent / preset / "service")
    serve = ServeDeploySchema.model_validate(yaml.safe_load(service["spec"]["serveConfigV2"]))
    [application] = serve.applications
    assert application.import_path == "pipelines.serving.serve:app"
    monkeypatch.setenv("PROPHY_API_KEY_HASHES", f"[{64 * 'a'}, {64 * 'b'}]")
    arguments = AppArguments.model_validate(application.args)
    config = load_config(arguments.config, arguments.set)
    assert config.run_dir.name == preset
    assert config.serve.api_keys == [64 * "a", 64 * "b"]
    assert config.serve.max_replicas * config.serve.num_gpus <= num_gpus([service])
