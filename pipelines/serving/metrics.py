"""What the endpoint counts, for Prometheus. One object per application, with a registry of its own."""

from collections.abc import Mapping

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_STEP_BUCKETS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30)
_STAGE_BUCKETS = (0.1, 0.3, 1, 3, 10, 30, 100, 300, 1000, 3000)
_HTTP_BUCKETS = (0.003, 0.01, 0.03, 0.1, 0.3, 1, 3, 10, 100, 1000)  # of /v1/videos/sync, the last ones
FAILURES = ("generation_failed", "invalid_request", "replica_died")


class Metrics:
    """Counters, gauges and histograms, all named `prophy_*`."""

    def __init__(self) -> None:
        registry = self._registry = CollectorRegistry()
        self._jobs = Gauge("prophy_jobs", "Videos that are not finished", ["status"], registry=registry)
        self._replicas = Gauge("prophy_replicas", "Replicas that hold the model", registry=registry)
        self.wait = Histogram(
            "prophy_queue_wait_seconds",
            "From acceptance to a replica that began it",
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._stage = Histogram(
            "prophy_stage_seconds",
            "Time per video and stage",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=registry,
        )
        self._step = Histogram(
            "prophy_step_seconds",
            "Mean time per denoising step of a video",
            buckets=_STEP_BUCKETS,
            registry=registry,
        )
        self.completions = Counter("prophy_videos_completed", "Videos that were made", registry=registry)
        self.failures = Counter("prophy_videos_failed", "Videos that failed", ["code"], registry=registry)
        for code in FAILURES:  # a rate needs the zero before the first
            self.failures.labels(code)
        self.requeues = Counter("prophy_videos_requeued", "Videos whose replica died", registry=registry)
        self.http = Histogram(
            "prophy_http_request_seconds",
            "Time to the end of the answer",
            ["method", "route", "status"],
            buckets=_HTTP_BUCKETS,
            registry=registry,
        )
        self.errors = Counter(
            "prophy_http_errors", "Answers of the API whose status is not 2xx", ["code"], registry=registry
        )

    def observe_stages(self, durations: Mapping[str, float], num_steps: int) -> None:
        """Counts a video that was completed; `durations` in seconds per stage."""
        self.completions.inc()
        for stage, seconds in durations.items():
            self._stage.labels(stage).observe(seconds)
        self._step.observe(durations["denoise"] / num_steps)

    def render(self, num_jobs: Mapping[str, int], num_replicas: int) -> bytes:
        """The text that Prometheus scrapes."""
        for status, number in num_jobs.items():
            self._jobs.labels(status).set(number)
        self._replicas.set(num_replicas)
        return generate_latest(self._registry)
