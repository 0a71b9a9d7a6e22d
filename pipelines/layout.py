"""The names of the files and folders of a run and of a cache, each in one place."""

from dataclasses import dataclass
from pathlib import Path


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
    def serve(self) -> Path:
        """Job database and videos of the endpoint, where the configuration names no other folder."""
        return self.path / "serve"

    @property
    def videos(self) -> Path:
        """Videos made offline, where the configuration names no other folder."""
        return self.path / "videos"
