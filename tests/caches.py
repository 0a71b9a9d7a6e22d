"""Where the tables of a cache lie on a disk."""

from pathlib import Path

from pipelines.caching.cache import encodings_table
from pipelines.config import Config
from pipelines.layout import CacheFolder


def priors_folder(config: Config) -> Path:
    """Where the priors lie."""
    return Path(str(CacheFolder(Path(config.cache.output)).priors))


def encodings_folder(config: Config) -> Path:
    """Where the encodings for this backbone lie."""
    return Path(str(encodings_table(config).folder))
