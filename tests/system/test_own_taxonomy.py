"""A taxonomy of one's own, from outside the package, through the whole line; nothing is relabelled later."""

import copy
import json
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from pipelines.caching import cache
from pipelines.config import Config
from pipelines.generation.limits import shape_limits
from pipelines.generation.sampler import VideoSampler
from pipelines.generation.spec import MAPS_FILE
from pipelines.serving.errors import ApiError
from pipelines.serving.protocol import Settings, VideoRequest
from pipelines.training import train
from prophy.errors import ProPhyError
from prophy.models.description import describe
from prophy.sandbox import Phenomenon, simulate_clip
from prophy.schema import INDEX
from prophy.training.data import PriorCache
from prophy.video import write_video
from tests.caches import encodings_folder, priors_folder
from tests.conftest import tiny_config

# Neither names nor order of the built-in one.
NAMES = ("thawing", "hard impact", "burning")
SHOWN = dict(zip(NAMES, (Phenomenon.MELTING, Phenomenon.COLLISION, Phenomenon.COMBUSTION), strict=True))
SHORT = {"num_inference_steps": 1, "seed": 0, "seconds": "0.5", "size": "32x32"}


def write_taxonomy(path: Path, names: tuple[str, ...]) -> Path:
    entries = [f"  - {{name: {name}, branch: mine, wording: the {name}}}\n" for name in names]
    path.write_text("branches: [mine]\nphenomena:\n" + "".join(entries))
    return path


def own_config(folder: Path, *overrides: str) -> Config:
    return tiny_config(
        folder / "run",
        f"taxonomy={folder / 'mine.yaml'}",
        f"cache.input={folder / 'videos' / 'list.jsonl'}",
        "train.start_from=null",
        "train.num_steps=2",
        "train.save_every=2",
        "train.num_workers=1",
        "train.global_batch_size=2",
        "train.warmup_steps=1",
        *overrides,
    )


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def trained(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Two clips of each phenomenon, and one that the VLM is asked about, cached and trained on."""
    folder = tmp_path_factory.mktemp("own")
    write_taxonomy(folder / "mine.yaml", NAMES)
    videos = folder / "videos"
    videos.mkdir()
    rows = []
    for name, shown in SHOWN.items():
        for seed in range(2):
            clip = simulate_clip(seed, num_frames=17, fps=8.0, size=64, phenomena=[shown])
            path = f"{name}-{seed}.mp4".replace(" ", "-")
            write_video(videos / path, clip.frames, clip.fps)
            # The name as people write it.
            rows.append(
                {"path": path, "caption": clip.caption, "phenomena": [name.upper().replace(" ", "_")]}
            )
    del rows[-1]["phenomena"]
    (videos / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = own_config(folder)
    cache.run(config)
    train.run(config)
    return config.model_copy(update={"checkpoint": str(config.run_dir / "model")})


def test_the_cache_has_the_names_and_their_order(trained: Config) -> None:
    priors = priors_folder(trained)
    footer = json.loads(pq.read_metadata(priors / INDEX).metadata[b"prophy.settings"])
    assert footer["taxonomy"] == list(NAMES)
    for row in pq.read_table(priors / INDEX).to_pylist():
        assert len(row["phenomena"]) == len(NAMES)
        if row["labels"] is not None:
            [label] = row["labels"]
            assert row["phenomena"] == [float(name == label) for name in NAMES]
            assert row["map_phenomena"] == [NAMES.index(label)]
            assert row["source"]["uri"].rpartition("/")[2].startswith(label.replace(" ", "-"))


def test_the_branch_has_the_names_and_speaks_by_them(trained: Config) -> None:
    assert describe(Path(trained.checkpoint))["physics"]["phenomena"] == list(NAMES)
    # What serves knows nothing of the taxonomy's file: the branch says its names.
    serving = trained.model_copy(update={"taxonomy": "wisa"})
    limits = shape_limits(serving)
    assert limits.phenomena == NAMES
    settings = Settings.of_run(serving, limits)
    assert settings.has_physics and settings.phenomena == list(NAMES)

    asked = {"strength": {"Hard-Impact": 3.0}, "return_maps": True}
    spec = VideoRequest.parse({"prompt": "a ball", "physics": asked, **SHORT}, serving, limits).to_spec(
        serving, limits
    )
    assert spec.physics.strength == {"hard impact": 3.0}
    maps = json.loads(VideoSampler(serving).render(spec).files[MAPS_FILE])["maps"]
    assert tuple(maps) == NAMES and all(np.shape(map_) == (2, 4, 4) for map_ in maps.values())
    with pytest.raises(ApiError, match=r"unknown phenomenon 'collision'; did you mean"):
        strange = {"strength": {"collision": 1.0}}
        VideoRequest.parse({"prompt": "a ball", "physics": strange}, serving, limits).to_spec(serving, limits)


def test_another_order_is_refused(trained: Config) -> None:
    """By the cache, by training on it, by a resumption, and by a start from the branch."""
    folder = trained.run_dir.parent
    reordered = write_taxonomy(folder / "reordered.yaml", NAMES[::-1])
    config = own_config(folder, f"taxonomy={reordered}")
    with pytest.raises(ProPhyError, match=r"was made with other settings \(.*taxonomy.*\); set them back"):
        cache.run(config)
    apart = "phenomenon 1 is 'thawing' there and 'burning' here; set taxonomy to that one, or choose another"
    with pytest.raises(
        ProPhyError, match=f"^the cache in .* taxonomy than {reordered}: {apart} cache.output"
    ):
        train.run(config)

    samples = PriorCache(priors_folder(trained), encodings_folder(trained))
    another = copy.copy(samples)
    another.phenomena = NAMES[::-1]
    with pytest.raises(ProPhyError, match=f"^the checkpoint .*: {apart} run_dir"):
        train.compare_phenomena(config, another)
    start = [f"run_dir={folder / 'new'}", f"train.start_from={trained.checkpoint}"]
    fresh = own_config(folder, f"taxonomy={reordered}", *start)
    with pytest.raises(ProPhyError, match=f"^the branch in .*: {apart} train.start_from"):
        train.compare_phenomena(fresh, another)
    train.compare_phenomena(own_config(folder, *start), samples)


def test_a_file_that_changes_under_its_name_is_refused_too(trained: Config) -> None:
    path = trained.run_dir.parent / "mine.yaml"
    before = path.read_text()
    try:
        write_taxonomy(path, (NAMES[1], NAMES[0], NAMES[2]))
        with pytest.raises(ProPhyError, match="phenomenon 1 is 'thawing' there and 'hard impact' here"):
            train.run(own_config(path.parent))
    finally:
        path.write_text(before)
