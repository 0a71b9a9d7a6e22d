"""What training and caching tell Prometheus: each node's Ray exports it, with `ray_` before the name."""

from collections.abc import Mapping
from pathlib import Path

from ray.util.metrics import Counter, Gauge

TRAINING = {
    "step": "Optimizer steps taken",
    "loss": "Total loss (Eq. 6)",
    "diffusion": "Diffusion loss",
    "semantic_alignment": "Semantic alignment loss (Eq. 4)",
    "token_alignment": "Token alignment loss (Eq. 5)",
    "router_entropy": "Entropy of the refinement router, in nats",
    "gradient_norm": "Norm of the gradient, before it is clipped",
    "samples_per_s": "Clips that are trained on in a second",
    "mfu": "Model FLOPs utilisation",
}
"""Metrics of training, as its log calls them, and what they are."""

CACHING = {
    "clips": "Clips that were cached",
    "quarantined": "Videos and clips that cannot be used",
}
"""What caching counts."""


class TrainingMetrics:
    """Gauges of the newest step that was logged; they go when their process ends.

    Args:
        run_dir: tells runs apart; the last names of two may be the same.
    """

    def __init__(self, run_dir: Path) -> None:
        self._gauges = {
            name: Gauge(f"prophy_train_{name}", description, ("run",))
            for name, description in TRAINING.items()
        }
        for gauge in self._gauges.values():
            gauge.set_default_tags({"run": str(run_dir)})

    def show(self, row: Mapping[str, float]) -> None:
        """Shows those metrics that the row has."""
        for name, gauge in self._gauges.items():
            if name in row:
                gauge.set(row[name])


class CachingMetrics:
    """Counters of one table of the cache.

    Args:
        table: "priors" or "encodings".
    """

    def __init__(self, table: str) -> None:
        self._counters = {
            name: Counter(f"prophy_cache_{name}", description, ("table",))
            for name, description in CACHING.items()
        }
        for counter in self._counters.values():
            counter.set_default_tags({"table": table})

    def count(self, clips: int, quarantined: int) -> None:
        """Counts what has just been done."""
        for name, number in (("clips", clips), ("quarantined", quarantined)):
            if number:  # Ray refuses to count nothing
                self._counters[name].inc(number)
