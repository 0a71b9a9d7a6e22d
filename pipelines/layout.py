"""The names of the files and folders of a run and of a cache, each in one place."""

from dataclasses import dataclass
from pathlib import Path

from prophy.places import Place

METRICS_FILE = "metrics.jsonl"
EVALUATION_FILE = "evaluation.jsonl"
SAMPLES_FOLDER = "samples"
TENSORBOARD_FOLDER = "tensorboard"
STOP_FILE = "stop"
"""In the folder of training: where it lies, the workers save a checkpoint, then leave."""
BEGUN_FILE = "begun"
"""There too: where it lies, the workers of this command have begun a step, so there may be one to save."""

CHECKPOINTS = "step-" + 8 * "[0-9]"
"""Glob of the folders of checkpoints; their names sort by step."""


def checkpoint_name(step: int) -> str:
    """Name of the folder of the checkpoint after `step` steps."""
    return f"step-{step:08d}"


def step_of(name: str) -> int:
    """The step that the name of a checkpoint's folder says."""
    return int(name.removeprefix("step-"))


@dataclass(frozen=True)
class RunFolder:
    """The places in a run's folder.

    Attributes:
        path: the folder, which configurations call `run_dir`.
    """

    path: Path

    @property
    def clips(self) -> Path:
        """Simulated clips, where the configuration names no other folder."""
        return self.path / "clips"

    @property
    def cache(self) -> Path:
        """The cache, where the configuration names no other folder."""
        return self.path / "cache"

    @property
    def training(self) -> Path:
        """All that training writes but the model; Ray Train's run is called like it."""
        return self.path / "train"

    @property
    def checkpoints(self) -> Path:
        """A folder for each checkpoint of training."""
        return self.training / "checkpoints"

    @property
    def metrics(self) -> Path:
        """One line of JSON for each logged step of training."""
        return self.training / METRICS_FILE

    @property
    def model(self) -> Path:
        """The trained branch."""
        return self.path / "model"

    @property
    def serve(self) -> Path:
        """Job database and videos of the endpoint, where the configuration names no other folder."""
        return self.path / "serve"

    @property
    def videos(self) -> Path:
        """Videos made offline, where the configuration names no other folder."""
        return self.path / "videos"

    @property
    def evaluation(self) -> Path:
        """Scores and report of a comparison, where the configuration names no other folder."""
        return self.path / "evaluation"

    @property
    def pretrained(self) -> Path:
        """The parts of the embedded default that are trained from nothing."""
        return self.path / "pretrain"

    @property
    def versions(self) -> Path:
        """The versions of Python and libraries that the last command ran with."""
        return self.path / "versions.yaml"

    def config(self, command: str) -> Path:
        """The configuration that `command` ran with."""
        return self.path / f"{command}.yaml"


@dataclass(frozen=True)
class CacheFolder:
    """The places in a cache's folder.

    Attributes:
        path: the folder, which configurations call `cache.output`.
    """

    path: Place

    @property
    def priors(self) -> Place:
        """The table of priors."""
        return self.path / "priors"

    @property
    def encodings(self) -> Place:
        """A table of encodings for each backbone and resolution, in a folder called by its fingerprint."""
        return self.path / "encodings"

    @property
    def quarantine(self) -> Place:
        """The table of what cannot be used."""
        return self.path / "quarantine"
