"""The dashboard shows what the endpoint exports, all of it and nothing else."""

import importlib.util
import json
import re

from prometheus_client.parser import text_string_to_metric_families

from pipelines.serving.metrics import Metrics
from tests.cluster.manifests import ROOT, built

FOLDER = ROOT / "cluster/monitoring"


def test_the_file_is_what_the_script_makes() -> None:
    spec = importlib.util.spec_from_file_location("dashboard", FOLDER / "dashboard.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert json.loads(module.FILE.read_text()) == module.dashboard()


def test_each_metric_has_a_panel_by_labels_that_it_has() -> None:
    metrics = Metrics()
    metrics.observe_stages({"denoise": 1.0}, 1)
    metrics.failures.labels("internal_error")
    metrics.http.labels("GET", "/v1/videos", "200").observe(1.0)
    metrics.errors.labels("not_found")
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(metrics.render({"queued": 1}, 1).decode()):
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    shown = set()
    for panel in json.loads((FOLDER / "dashboard.json").read_text())["panels"]:
        for target in panel["targets"]:
            [name] = set(re.findall(r"prophy_\w+", target["expr"])) & samples.keys()
            [by] = re.findall(r"by \(([^)]*)\)", target["expr"])
            assert set(filter(None, by.split(", "))) <= samples[name]
            shown.add(name)
    counted = {name for name in samples if not name.endswith(("_sum", "_count", "_created"))}
    assert shown == counted


def test_it_is_one_kustomization() -> None:
    kinds = sorted(found["kind"] for found in built(FOLDER))
    assert kinds == ["ConfigMap", "PodMonitor", "PodMonitor"]
