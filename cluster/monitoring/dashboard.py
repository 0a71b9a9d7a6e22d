"""Writes `dashboard.json` for Grafana: a panel for each metric that endpoint, training and caching export.

python cluster/monitoring/dashboard.py
"""

import json
from pathlib import Path
from typing import Any

from prometheus_client.metrics_core import Metric
from prometheus_client.parser import text_string_to_metric_families

from pipelines.metrics import CACHING, TRAINING
from pipelines.serving.metrics import Metrics

FILE = Path(__file__).with_name("dashboard.json")
_PANELS_PER_ROW, _WIDTH, _HEIGHT = 2, 12, 8
_LABELS = {
    "prophy_jobs": ["status"],
    "prophy_stage_seconds": ["stage"],
    "prophy_videos_failed": ["code"],
    "prophy_http_request_seconds": ["route"],
    "prophy_http_errors": ["code"],
    "ray_prophy_cache_clips": ["table"],
    "ray_prophy_cache_quarantined": ["table"],
    **{f"ray_prophy_train_{name}": ["run"] for name in TRAINING},
}


def dashboard() -> dict[str, Any]:
    """The dashboard as Grafana imports it."""
    exported = text_string_to_metric_families(Metrics().render({}, 0).decode())
    families = [family for family in exported if not family.name.endswith("_created")]  # when counting began
    # Ray's agents write its prefix before a name.
    families += [Metric(f"ray_prophy_train_{name}", text, "gauge") for name, text in TRAINING.items()]
    families += [Metric(f"ray_prophy_cache_{name}", text, "counter") for name, text in CACHING.items()]
    return {
        "uid": "prophy",
        "title": "ProPhy",
        "refresh": "10s",
        "time": {"from": "now-3h", "to": "now"},
        "panels": [_panel(number, family) for number, family in enumerate(families)],
    }


def _panel(number: int, family: Metric) -> dict[str, Any]:
    """A counter as its rate, a histogram as its median and its 95th percentile, by what tells cases apart."""
    labels = _LABELS.get(family.name, [])
    by, shown = ", ".join(labels), " ".join(f"{{{{{label}}}}}" for label in labels)
    if family.type == "histogram":
        buckets = f"rate({family.name}_bucket[5m])"
        targets = [
            (
                f"histogram_quantile({share}, sum by ({', '.join(['le', *labels])}) ({buckets}))",
                f"{name} {shown}",
            )
            for share, name in ((0.5, "median"), (0.95, "95 %"))
        ]
    elif family.type == "counter":
        targets = [(f"sum by ({by}) (rate({family.name}_total[5m]))", shown)]
    else:
        targets = [(f"sum by ({by}) ({family.name})", shown)]
    row, column = divmod(number, _PANELS_PER_ROW)
    return {
        "type": "timeseries",
        "title": family.documentation,
        "gridPos": {"x": column * _WIDTH, "y": row * _HEIGHT, "w": _WIDTH, "h": _HEIGHT},
        "fieldConfig": {"defaults": {"unit": "s" if family.type == "histogram" else "short"}},
        "targets": [
            {"refId": chr(ord("A") + index), "expr": expression, "legendFormat": legend.strip()}
            for index, (expression, legend) in enumerate(targets)
        ],
    }


if __name__ == "__main__":
    FILE.write_text(json.dumps(dashboard(), indent=2) + "\n")
