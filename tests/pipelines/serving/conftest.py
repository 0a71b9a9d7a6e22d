"""The two databases that jobs may be kept in; and the API with the real model, in this process."""

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from pipelines.config import Config
from pipelines.generation.limits import shape_limits
from pipelines.serving.replica import VideoGenerator
from tests.databases import new_database, postgres_server
from tests.servers import (
    http_server,
    save_checkpoint,
    serve_config,
)


@pytest.fixture(scope="session")
def postgres() -> Iterator[Path]:
    with postgres_server() as folder:
        yield folder


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'jobs.sqlite'}"
    return new_database(request.getfixturevalue("postgres"))


@pytest.fixture(scope="package")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    folder = tmp_path_factory.mktemp("api")
    allowed = "serve.allowed_origins=[https://studio.example]"
    return serve_config(folder / "run", save_checkpoint(folder / "model"), allowed)


@pytest.fixture(scope="package")
def generator(config: Config) -> VideoGenerator:
    return VideoGenerator(config, shape_limits(config))


@pytest.fixture(scope="package")
def client(config: Config, generator: VideoGenerator) -> Iterator[httpx.Client]:
    # One model in one thread: what is beyond the first video waits in its executor, as it does for a replica.
    with http_server(config, generator.generate) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client
