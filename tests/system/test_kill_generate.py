"""`prophy generate` into S3, killed with SIGKILL, driver and workers; then the same command again."""

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from prophy.video import probe
from tests.killing import starter
from tests.object_store import make_bucket, num_versions, object_store

pytestmark = pytest.mark.slow

SETTINGS = (
    "generate.output=s3://bucket/videos",
    "backbone.num_frames=9",
    "sampling.num_inference_steps=8",
)
PROMPTS = [f"a ball falls {number} times" for number in range(12)]


@pytest.fixture
def store() -> Iterator[S3FileSystem]:
    with object_store() as found:
        make_bucket(found, "bucket")
        yield found


def test_no_video_is_lost_and_none_is_made_twice(store: S3FileSystem, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    command = f"generate --prompts '{tmp_path}/prompts.txt'"

    def made() -> set[str]:
        return {name for name in num_versions(store, "bucket") if name.endswith(".mp4")}

    with starter(command, tmp_path / "run", SETTINGS, "ray::Map") as start:
        first = start()
        first.wait_until(lambda: bool(made()))
        first.kill("node")
        first.process.wait()
        before = made()
        assert 0 < len(before) < len(PROMPTS), "it was killed before its end"
        assert f"{len(before)} of {len(PROMPTS)} videos are already there" in start().finish()

    written = num_versions(store, "bucket")
    manifest = store.cat_file("bucket/videos/manifest.jsonl").splitlines()
    lines = [json.loads(line) for line in manifest]
    assert [line["prompt"] for line in lines] == PROMPTS
    assert written.pop("videos/manifest.jsonl") > 1
    assert written == {f"videos/{line['path']}": 1 for line in lines}
    for name in written:
        store.get_file(f"bucket/{name}", str(tmp_path / "video.mp4"))
        assert probe(tmp_path / "video.mp4").num_frames == 9
