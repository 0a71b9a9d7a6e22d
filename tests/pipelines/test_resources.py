"""What has room in the cluster, and what is said of what has none."""

import logging
import subprocess
import sys
from pathlib import Path

import pytest
import ray

from pipelines.resources import Need, needs_of, room_for
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


@pytest.fixture
def nodes(monkeypatch: pytest.MonkeyPatch, ray_cluster: None) -> list[dict[str, float]]:
    """What `ray.nodes()` says that the nodes have, which are none to begin with."""
    found: list[dict[str, float]] = []
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": node} for node in found])
    return found


def test_all_have_room_on_the_session_s_ray(ray_cluster: None) -> None:
    assert room_for([Need("cache.read", 2, 0.5), Need("cache.encode", 4, 2)]) == [2, 4]


def test_what_is_wanted_is_cut_to_what_fits(
    nodes: list[dict[str, float]], caplog: pytest.LogCaptureFixture
) -> None:
    nodes += [{"CPU": 4.0}, {}]  # a lost node has left one of two; the head has nothing
    with caplog.at_level(logging.WARNING):
        assert room_for([Need("cache.read", 2, 1.0), Need("cache.encode", 2, 2.0)]) == [2, 1]
    assert caplog.messages == ["cache.encode: the cluster has room for 1 of 2"]


def test_one_of_each_comes_before_more_of_one(nodes: list[dict[str, float]]) -> None:
    nodes += [{"CPU": 3.0, "GPU": 2.0}]
    assert room_for([Need("cache.read", 8, 1.0), Need("cache.extract", 1, 1.0, 2.0)]) == [2, 1]


def test_gpus_of_two_nodes_do_not_make_one_actor(nodes: list[dict[str, float]]) -> None:
    nodes += [{"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}]
    with pytest.raises(
        ProPhyError,
        match=r"^cache.extract needs 1 x 1 CPU \+ 2 GPU; the cluster has 16 CPU and 2 GPU in 2 node",
    ):
        room_for([Need("cache.extract", 1, 1.0, 2.0)])


def test_an_evaluation_on_a_gpu_has_one_of_its_own(tmp_path: Path) -> None:
    on_gpus = ("train.gpus_per_worker=1", "train.num_held_out=2", "train.evaluation_gpus=1")
    config = tiny_config(tmp_path, *on_gpus)
    workers = Need("train.num_workers", 2, config.train.cpus_per_worker, 1, at_least=2)
    assert needs_of(config, "train") == [workers, Need("train.evaluation_gpus", 1, 1, 1)]
    assert len(needs_of(tiny_config(tmp_path, "train.num_held_out=2"), "train")) == 1


def test_processes_that_share_a_video_are_on_one_node(tmp_path: Path) -> None:
    each = ("serve.num_gpus=1", "serve.num_cpus=0.5")
    config = tiny_config(tmp_path, "serve.sequence_parallel=4", *each)
    assert needs_of(config, "serve") == [Need("serve.max_replicas", 2, 2.0, 4.0)]
    config = tiny_config(tmp_path, "serve.sequence_parallel=4", "serve.cfg_parallel=true", *each)
    assert needs_of(config, "serve") == [Need("serve.max_replicas", 2, 4.0, 8.0)]


@pytest.mark.heavy
def test_what_reserves_no_gpu_sees_none() -> None:
    """With GPUs that are not there: Ray hides them by a variable that it reads as it starts."""
    script = (
        "import os, ray\n"
        "from pipelines.runtime import WORKER_ENVIRONMENT\n"
        "os.environ.update(WORKER_ENVIRONMENT)\n"
        "ray.init('local', num_cpus=2, num_gpus=2, include_dashboard=False, log_to_driver=False)\n"
        "seen = ray.remote(lambda: os.environ.get('CUDA_VISIBLE_DEVICES'))\n"
        "print(ray.get([seen.options(num_gpus=count).remote() for count in (0, 1)]))\n"
    )
    printed = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    ).stdout
    assert printed.splitlines()[-1] in ("['', '0']", "['', '1']")


def test_workers_that_start_together_fit_all_or_none(nodes: list[dict[str, float]]) -> None:
    nodes += [{"CPU": 64.0, "GPU": 4.0}]
    assert room_for([Need("train.num_workers", 4, 4.0, 1.0, at_least=4)]) == [4]
    with pytest.raises(ProPhyError, match=r"^train.num_workers needs 8 x 4 CPU \+ 1 GPU; the cluster has"):
        room_for([Need("train.num_workers", 8, 4.0, 1.0, at_least=8)])
