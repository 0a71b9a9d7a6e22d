"""A cache in S3: its run is killed with SIGKILL and goes on, is verified, and is trained on."""

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from s3fs import S3FileSystem

from pipelines.caching.verify import verify
from pipelines.config import Config
from pipelines.layout import RunFolder
from prophy.schema import EMPTY_PROMPT, INDEX
from tests.caches import encodings_folder, priors_folder
from tests.conftest import NUM_CLIPS, ROWS_PER_FILE
from tests.killing import Run, starter
from tests.object_store import make_bucket, num_versions, object_store

pytestmark = pytest.mark.slow

PLACE = "s3://bucket/cache"
CACHING = (  # as the tiny cache
    f"cache.output={PLACE}",
    f"cache.rows_per_file={ROWS_PER_FILE}",
    "cache.extract_batch_size=1",
    "cache.encode_batch_size=1",
)
TRAINING = ("train.num_steps=3", "train.save_every=3", "train.log_every=1", "train.num_held_out=2")


@pytest.fixture
def store() -> Iterator[S3FileSystem]:
    with object_store() as found:
        make_bucket(found, "bucket")
        yield found


def rows(folder: Path) -> dict[str, dict]:
    files = [file for file in folder.glob("*.parquet") if re.fullmatch("[0-9a-f]{64}", file.stem)]
    found = [row for file in files for row in pq.read_table(file).to_pylist()]
    assert len({row["sample_id"] for row in found}) == len(found), "a row is there twice"
    return {row["sample_id"]: row for row in found}


def in_one_line(log: str) -> str:
    return " ".join(log.split())


def metrics(run_dir: Path) -> list[tuple[float, ...]]:
    lines = [json.loads(line) for line in RunFolder(run_dir).metrics.read_text().splitlines()]
    return [(line["step"], line["loss"], line["gradient_norm"]) for line in lines]


def test_killed_it_goes_on_and_trains_as_a_copy_on_a_disk(
    store: S3FileSystem, tiny_cache: Config, tmp_path: Path
) -> None:
    def whole() -> set[str]:
        return {key for key in num_versions(store, "bucket") if re.search("/[0-9a-f]{64}.parquet$", key)}

    settings = (f"cache.input={tiny_cache.cache.input}", *CACHING)
    with starter("cache", tmp_path / "run", settings, "ray::Map") as start:
        first = start()
        first.wait_until(lambda: bool(whole()))
        first.kill("node")
        first.process.wait()
        before = whole()
        second = in_one_line(start().finish())
    assert f"taking over {PLACE} from a run that ended without releasing it" in second
    written = num_versions(store, "bucket")
    assert before < whole()
    assert {key: written[key] for key in whole()} == dict.fromkeys(whole(), 1), "none was written twice"
    assert written[f"cache/encodings/{encodings_folder(tiny_cache).name}/{EMPTY_PROMPT}"] == 1

    config = tiny_cache.model_copy(update={"cache": tiny_cache.cache.model_copy(update={"output": PLACE})})
    assert verify(config.cache.folder) == []
    copy = tmp_path / "copy"
    store.get(f"{PLACE}/", f"{copy}/", recursive=True)
    assert {path.name for path in copy.rglob("*.*") if path.suffix != ".parquet"} == {".lease"}
    for theirs in (priors_folder(tiny_cache), encodings_folder(tiny_cache)):
        ours = copy / theirs.relative_to(tiny_cache.cache.output)
        assert rows(ours) == rows(theirs) and len(rows(ours)) == NUM_CLIPS
        assert pq.read_metadata(ours / INDEX).num_rows == NUM_CLIPS

    for name, place in (("there", PLACE), ("here", str(copy))):
        run = Run("train", tmp_path / name, (f"cache.output={place}", *TRAINING), "ray::")
        try:
            said = in_one_line(run.finish())
        finally:
            run.clean_up()
        assert ("are copied from S3 to" in said) == (name == "there")
    assert metrics(tmp_path / "there") == metrics(tmp_path / "here")
    assert len(metrics(tmp_path / "here")) == 3
    assert not any(Path.cwd().glob("s3:*")), "a local folder"
