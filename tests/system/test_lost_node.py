"""Commands on a head and two nodes, of which one is lost with all its processes: they come to their end.

The pools of `prophy cache` fill what is left: encoders take the CPUs that the readers of lost clips would
need.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.caching.tables import file_names
from pipelines.caching.verify import verify
from pipelines.config import Config
from tests.caches import encodings_folder, priors_folder
from tests.conftest import NUM_CLIPS
from tests.killing import Run
from tests.nodes import Nodes, cluster

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

NODE_CPUS = 4
OVERRIDES = (
    "cache.rows_per_file=1",
    "cache.extract_batch_size=1",
    "cache.encode_batch_size=1",
    "cache.read.size=2",
    "cache.extract.size=2",
    "cache.extract.num_cpus=2",
    "cache.encode.size=2",
    "cache.encode.num_cpus=2",
)


@pytest.fixture
def nodes() -> Iterator[Nodes]:
    with cluster() as found:
        yield found


@pytest.mark.parametrize("lost_while", ["priors", "encodings"])
def test_a_node_is_lost_and_does_not_come_back(
    nodes: Nodes, tiny_cache: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, lost_while: str
) -> None:
    nodes.add(num_cpus=NODE_CPUS)
    doomed = nodes.add(num_cpus=NODE_CPUS)
    output = tmp_path / "run" / "cache"
    table = output / "priors"
    if lost_while == "encodings":
        shutil.copytree(priors_folder(tiny_cache), output / "priors")
        table = output / encodings_folder(tiny_cache).relative_to(tiny_cache.cache.output)
    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    run = Run("cache", tmp_path / "run", (f"cache.input={tiny_cache.cache.input}", *OVERRIDES), "ray::Map")
    monkeypatch.delenv("RAY_ADDRESS")
    try:
        run.wait_until(lambda: bool(file_names(table)))
        nodes.kill(doomed)
        run.finish()
    finally:
        run.clean_up()
    assert verify(output) == []
    for folder in (priors_folder(tiny_cache), encodings_folder(tiny_cache)):
        made = output / Path(folder).relative_to(tiny_cache.cache.output)
        assert sum(pq.read_metadata(made / name).num_rows for name in file_names(made)) == NUM_CLIPS
    assert not file_names(output / "quarantine")


def test_a_node_that_generates_is_lost(nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One actor on each node; what the other has made by then stays as it is."""
    nodes.add(num_cpus=1)
    doomed = nodes.add(num_cpus=1)
    prompts = [f"a ball falls {number} times" for number in range(12)]
    (tmp_path / "prompts.txt").write_text("\n".join(prompts))
    settings = ("generate.pool.size=2", "generate.pool.num_cpus=1", "sampling.num_inference_steps=8")
    videos = tmp_path / "run" / "videos"

    def made() -> dict[Path, int]:
        return {file: file.stat().st_ino for file in videos.glob("*.mp4")}

    monkeypatch.setenv("RAY_ADDRESS", nodes.address)
    run = Run(f"generate --prompts '{tmp_path}/prompts.txt'", tmp_path / "run", settings, "ray::Map")
    monkeypatch.delenv("RAY_ADDRESS")
    try:
        run.wait_until(lambda: len(made()) >= 3)
        before = made()
        nodes.kill(doomed)
        assert len(made()) < len(prompts), "it was lost before the end"
        run.finish()
    finally:
        run.clean_up()
    after = made()
    assert len(after) == len(prompts) and before.items() <= after.items()
    lines = (videos / "manifest.jsonl").read_text().splitlines()
    assert [json.loads(line)["prompt"] for line in lines] == prompts
