"""Videos are read from an object store and written there, and models are read: S3, from a local server."""

import os
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image
from s3fs import S3FileSystem
from safetensors.torch import load_file, save

from pipelines.caching import cache
from pipelines.caching.sources import changed, find_videos
from pipelines.caching.tables import update_index
from pipelines.caching.verify import verify
from pipelines.generation import generate
from prophy.errors import ProPhyError
from prophy.models import stored
from prophy.video import write_video
from tests.conftest import tiny_config
from tests.hostile import FPS, moving_square
from tests.object_store import make_bucket, num_versions, object_store, refuse_puts
from tests.wisa import PHENOMENA, WISA


@pytest.fixture
def store() -> Iterator[S3FileSystem]:
    with object_store() as found:
        yield found


def put_video(store: S3FileSystem, name: str, scratch: Path, num_frames: int) -> None:
    write_video(scratch / "video.mp4", moving_square(num_frames), FPS)
    store.put_file(str(scratch / "video.mp4"), name)


@pytest.mark.slow
def test_a_prefix_is_cached_and_what_changes_in_it_is_seen(
    store: S3FileSystem, ray_cluster: None, tmp_path: Path
) -> None:
    store.mkdir("bucket")
    for name, num_frames in (("a.mp4", 17), ("deep/b.mp4", 18)):
        put_video(store, f"bucket/videos/{name}", tmp_path, num_frames)
    store.pipe_file("bucket/videos/broken.mp4", b"no video")
    store.pipe_file("bucket/elsewhere/c.mp4", b"no part of the prefix")
    config = tiny_config(tmp_path / "run", "cache.input=s3://bucket/videos")
    summary = cache.run(config)
    assert (summary.num_videos, summary.num_priors, summary.num_encodings) == (3, 2, 2)
    [refused] = summary.quarantined
    assert refused.startswith("s3://bucket/videos/broken.mp4 cannot be read as a video")
    priors = update_index(cache.priors_table(config, WISA))
    uris = {row["source"]["uri"]: row["sample_id"] for row in priors.to_pylist()}
    assert uris.keys() == {"s3://bucket/videos/a.mp4", "s3://bucket/videos/deep/b.mp4"}
    assert cache.run(config).added_priors.written == 0
    assert verify(Path(config.cache.output)) == []

    put_video(store, "bucket/videos/a.mp4", tmp_path, 19)
    S3FileSystem.clear_instance_cache()  # as a new process has it
    now = changed(priors, find_videos(config.cache.input, PHENOMENA).videos)
    assert now.to_pylist() == [uris["s3://bucket/videos/a.mp4"]]


def test_a_manifest_lies_beside_its_videos(store: S3FileSystem, tmp_path: Path) -> None:
    store.mkdir("listed")
    store.pipe_file("listed/videos/a.mp4", b"123")
    rows = pa.table({"path": ["a.mp4", "gone.mp4"], "caption": ["a ball", None]})
    pq.write_table(rows, tmp_path / "manifest.parquet")
    store.put_file(str(tmp_path / "manifest.parquet"), "listed/videos/manifest.parquet")
    here, gone = find_videos("s3://listed/videos", PHENOMENA).videos.to_pylist()
    assert (here["source"]["uri"], here["source"]["size"]) == ("s3://listed/videos/a.mp4", 3)
    assert here["caption"] == "a ball" and here["source"]["modified"] > 1.7e9
    assert gone["source"] == {"uri": "s3://listed/videos/gone.mp4", "size": 0, "modified": 0.0}


def test_a_store_that_does_not_let_us_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    Path(os.environ["AWS_CONFIG_FILE"]).write_text("[default]\nregion = us-east-1\n")
    S3FileSystem.clear_instance_cache()
    with pytest.raises(ProPhyError, match=r"cannot read cache.input: s3://bucket/videos .*NoCredentials"):
        find_videos("s3://bucket/videos", PHENOMENA)
    S3FileSystem.clear_instance_cache()


@pytest.mark.slow
def test_videos_lie_in_a_bucket_as_in_a_folder(
    store: S3FileSystem, ray_cluster: None, tmp_path: Path
) -> None:
    small = ("backbone.num_frames=5", "backbone.height=32", "backbone.width=32")
    settings = (*small, "sampling.num_inference_steps=2")
    prompts = ["a red ball falls", "a yellow fire burns"]
    folder = [Path(path) for path in generate.run(tiny_config(tmp_path / "here", *settings), prompts)]
    config = tiny_config(tmp_path / "there", *settings, "generate.output=s3://videos/mine")
    with pytest.raises(ProPhyError, match="cannot use s3://videos/mine/manifest.jsonl: .*bucket does not"):
        generate.run(config, prompts)

    make_bucket(store, "videos")
    refuse_puts(store, "videos", f"mine/{folder[1].name}")
    with pytest.raises(ProPhyError, match=f"cannot use s3://videos/mine/{folder[1].name}: Forbidden; mend"):
        generate.run(config, prompts)
    store.call_s3("delete_bucket_policy", Bucket="videos")
    paths = generate.run(config, prompts)
    assert paths == [f"s3://videos/mine/{path.name}" for path in folder]
    assert generate.run(config, prompts) == paths
    for path, here in zip(paths, folder, strict=True):
        assert store.cat_file(path) == here.read_bytes()
    manifest = (folder[0].parent / "manifest.jsonl").read_bytes()
    assert store.cat_file("s3://videos/mine/manifest.jsonl") == manifest
    written = num_versions(store, "videos")
    assert written.pop("mine/manifest.jsonl") > 1
    assert written == {f"mine/{path.name}": 1 for path in folder}, "nothing else, and nothing twice"

    generate.write_contact_sheet(config, prompts, paths, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 2 * 32


@pytest.mark.slow
def test_a_model_in_a_bucket_makes_the_videos_that_it_makes_in_a_folder(
    store: S3FileSystem, ray_cluster: None, branch_checkpoint: Path, tmp_path: Path
) -> None:
    small = ("backbone.num_frames=5", "backbone.height=32", "backbone.width=32")
    settings, prompts = (*small, "sampling.num_inference_steps=2"), ["a red ball falls"]

    def make(run: str, checkpoint: Path | str) -> Path:
        stored._copy_of.cache_clear()  # as a new command has it
        [video] = generate.run(tiny_config(tmp_path / run, *settings, f"checkpoint={checkpoint}"), prompts)
        return Path(video)

    here = make("here", branch_checkpoint)
    store.mkdir("models")
    store.put(f"{branch_checkpoint}/", "models/mine/", recursive=True)
    there = make("there", "s3://models/mine")
    assert (there.name, there.read_bytes()) == (here.name, here.read_bytes())

    [file] = branch_checkpoint.glob("*.safetensors")
    changed = {name: value + 0.1 for name, value in load_file(file).items()}
    store.pipe_file(f"models/mine/{file.name}", save(changed))
    again = make("there", "s3://models/mine")
    assert again.name != here.name and again.read_bytes() != here.read_bytes()
