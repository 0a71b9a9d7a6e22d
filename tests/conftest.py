"""What tests share: a tmp home, one Ray per process, one cache, and small configurations of the real thing.

With `pytest -n`, each process has its home and its Ray, on ports of its own; the cache is made once for all.
"""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from filelock import FileLock

if TYPE_CHECKING:
    from s3fs import S3FileSystem

# Set before torch, ray and transformers are imported. Ray's sockets need a short path, hence this folder.
_SCRATCH = Path(tempfile.mkdtemp(prefix="prophy-"))
os.environ |= {
    "PROPHY_HOME": str(_SCRATCH / "home"),
    "RAY_TMPDIR": str(_SCRATCH),
    "RAY_AUTH_MODE": "disabled",
    "RAY_raylet_start_wait_time_s": "180",  # as pipelines/runtime.py, which says why
    "RAY_TRAIN_V2_ENABLED": "1",
    "HF_HUB_OFFLINE": "1",
    "AWS_CONFIG_FILE": str(_SCRATCH / "aws"),  # of the tests' own object store
    "RAY_prestart_worker_first_driver": "0",  # else an idle process per logical CPU, two seconds of work each
    "OMP_NUM_THREADS": "1",  # on tensors this small, two threads are slower than one beside other work
}
for name in ("RAY_ADDRESS", "AWS_ENDPOINT_URL", "AWS_PROFILE"):
    os.environ.pop(name, None)

from pipelines.config import Config, load_config  # noqa: E402

NUM_CLIPS, ROWS_PER_FILE = 12, 4  # of the tiny cache


def pytest_unconfigure() -> None:
    shutil.rmtree(_SCRATCH, ignore_errors=True)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks what starts a Ray, so that it can be left out, and puts the files with heavy tests in front.

    They take longest: two processes that share the files end together when these begin first.
    """
    heavy_files = set()
    for item in items:
        if "ray_cluster" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.heavy)
        if item.get_closest_marker("heavy"):
            heavy_files.add(item.path)
    items.sort(key=lambda item: item.path not in heavy_files)  # a stable sort


def tiny_config(run_dir: Path, *overrides: str) -> Config:
    """The embedded default with everything inside `run_dir`."""
    return load_config("tiny", [f"run_dir={run_dir}", *overrides])


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The embedded default, in this test's tmp folder."""
    return tiny_config(tmp_path / "run")


@pytest.fixture(scope="session")
def ray_cluster() -> Iterator[None]:
    """One local Ray for all tests of this process, with the dashboard that Ray Train's state API wants."""
    import ray

    from pipelines.serving import haproxy

    os.environ |= haproxy.environment(_SCRATCH / "serve")
    ray.init("local", num_cpus=16, include_dashboard=True)
    yield
    ray.shutdown()


@pytest.fixture(scope="session")
def tiny_cache(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A configuration whose cache holds some simulated clips: for reading, others use it too."""
    from pipelines.caching import cache
    from pipelines.sandbox import simulate

    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all processes of this session share
    config = tiny_config(
        folder / "tiny-cache",
        f"simulate.num_clips={NUM_CLIPS}",
        f"cache.rows_per_file={ROWS_PER_FILE}",
        "cache.extract_batch_size=1",  # a batch rounds as a whole: another run must give the same bits
        "cache.encode_batch_size=1",
    )
    made = folder / "tiny-cache-is-made"
    with FileLock(folder / "tiny-cache.lock"):
        if not made.exists():
            simulate.run(config)
            cache.run(config)
            made.touch()
    return config


@pytest.fixture(scope="module")
def s3_server() -> Iterator["S3FileSystem"]:
    """An empty object store for the tests of a file."""
    from tests.object_store import object_store

    with object_store() as store:
        yield store


@pytest.fixture
def bucket(s3_server: "S3FileSystem") -> Iterator["S3FileSystem"]:
    """That store, with a bucket called so that is empty."""
    s3_server.mkdir("bucket")
    yield s3_server
    s3_server.rm("bucket", recursive=True)


@pytest.fixture(scope="session")
def branch_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of an untrained branch of the embedded default."""
    import torch

    from pipelines.training.model import branch_config
    from prophy.backbones.loading import load_pipeline
    from prophy.backbones.pretrained import fingerprint
    from prophy.models.checkpoint import save_branch
    from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
    from tests.wisa import PHENOMENA

    folder = tmp_path_factory.mktemp("branch") / "model"
    parts = {"vae": None, "text_encoder": None, "tokenizer": None}
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, None, **parts)
    physics = branch_config(tiny_config(folder).physics, (5, 16, 16), PHENOMENA).model_dump()
    model = ProPhyWanTransformer3DModel.from_transformer(pipeline.transformer, physics)
    save_branch(model, folder, {"name": "tiny", "revision": None, "fingerprint": fingerprint("tiny", None)})
    return folder
