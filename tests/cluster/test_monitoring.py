"""The dashboard shows what endpoint, training and caching export, all of it and nothing else."""

import importlib.util
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
import ray
from prometheus_client.parser import text_string_to_metric_families

from pipelines import metrics
from pipelines.config import load_config
from pipelines.metrics import CACHING, TRAINING, CachingMetrics, TrainingMetrics
from pipelines.serving.metrics import Metrics
from tests.cluster.manifests import ROOT, built, ray_clusters, templates

FOLDER = ROOT / "cluster/monitoring"
PATIENCE_S = 240


def shown() -> Iterator[tuple[str, set[str]]]:
    """The metric of each line that is drawn, and the labels that it is told apart by."""
    for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            [name] = re.findall(r"(?:ray_)?prophy_\w+", target["expr"])
            [by] = re.findall(r"by \(([^)]*)\)", target["expr"])
            yield name, set(filter(None, by.split(", ")))


def labels_of(text: str) -> dict[str, set[str]]:
    """The labels of each metric in what Prometheus scrapes, but for those that say when counting began."""
    labels: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if "prophy_" in sample.name and not sample.name.endswith(("_sum", "_count", "_created")):
                labels.setdefault(sample.name, set()).update(sample.labels)
    return labels


def test_the_file_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", FOLDER / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(module.FILE.read_text()) == module.dashboard()


def test_each_metric_of_the_endpoint_is_shown_by_labels_that_it_has() -> None:
    endpoint = Metrics()
    endpoint.observe_stages({"denoise": 1.0}, 1)
    endpoint.failures.labels("internal_error")
    endpoint.http.labels("GET", "/v1/videos", "200").observe(1.0)
    endpoint.errors.labels("not_found")
    exported = labels_of(endpoint.render({"queued": 1}, 1).decode())
    lines = [(name, by - {"le"}) for name, by in shown() if not name.startswith("ray_")]
    assert {name for name, _ in lines} == exported.keys()
    assert all(by <= exported[name] for name, by in lines)


def test_each_metric_that_ray_s_agents_export_is_shown_by_labels_that_it_has(ray_cluster: None) -> None:
    training, caching = TrainingMetrics(Path("run")), CachingMetrics("priors")
    training.show(dict.fromkeys(TRAINING, 1.0))
    caching.count(3, 1)
    lines = [(name, by) for name, by in shown() if name.startswith("ray_")]
    exported = scrape(len(TRAINING) + len(CACHING))
    assert {name for name, _ in lines} == exported.keys()
    assert all(by <= exported[name] for name, by in lines)


def test_runs_whose_folders_have_the_same_last_name_are_told_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    tags = list[dict[str, str]]()

    class Gauge:
        def __init__(self, *_: object) -> None: ...

        def set_default_tags(self, told: dict[str, str]) -> None:
            tags.append(told)

    monkeypatch.setattr(metrics, "Gauge", Gauge)
    for preset in ("wan2.2-t2v-a14b", "wan2.2-i2v-a14b"):
        TrainingMetrics(load_config(preset).run_dir)
    assert {tag["run"] for tag in tags} == {
        "/mnt/shared/runs/wan2.2-t2v-a14b/high_noise",
        "/mnt/shared/runs/wan2.2-i2v-a14b/high_noise",
    }


def scrape(count: int) -> dict[str, set[str]]:
    """What this node's agent exports of ours, once there is as much."""
    [node] = ray.nodes()
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    deadline = time.monotonic() + PATIENCE_S
    found: dict[str, Any] = {}
    while len(found) < count:
        assert time.monotonic() < deadline, f"after {PATIENCE_S} s there are only {sorted(found)}"
        found = {
            name: by for name, by in labels_of(httpx.get(url).text).items() if name.startswith("ray_prophy")
        }
        time.sleep(0.5)
    return found


def test_each_port_that_is_scraped_is_one_that_containers_name() -> None:
    [service] = built(ROOT / "cluster/overlays/wan2.1-1.3b/service")
    [cluster] = ray_clusters(service)
    containers = [container for pod in templates(cluster) for container in pod["containers"]]
    ports = {port["name"]: port["containerPort"] for each in containers for port in each.get("ports", [])}
    monitors = [found for found in built(FOLDER) if found["kind"] == "PodMonitor"]
    scraped = {each["port"] for found in monitors for each in found["spec"]["podMetricsEndpoints"]}
    assert scraped <= ports.keys()
    # KubeRay gives the head's Service no other ports once one is named, and `metrics` to all containers.
    assert ports == {"gcs-server": 6379, "dashboard": 8265, "client": 10001, "serve": 8000, "metrics": 8080}


def test_it_is_one_kustomization() -> None:
    kinds = sorted(found["kind"] for found in built(FOLDER))
    assert kinds == ["ConfigMap", "PodMonitor", "PodMonitor"]
