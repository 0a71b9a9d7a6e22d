"""`prophy cache` as users run it: real videos, real Ray Data, real tiny models."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.caching import cache
from pipelines.caching.progress import GraphReport
from pipelines.caching.sources import find_videos
from pipelines.caching.tables import exclusive
from pipelines.config import Config, load_config
from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.pretrained import resolve_pretrained
from prophy.errors import ProPhyError
from prophy.sandbox import simulate_clip
from prophy.schema import EMPTY_PROMPT, INDEX, INPUT, latents_of, text_of
from prophy.taxonomy import from_multi_hot
from prophy.training.cache import PriorCache
from prophy.video import read_frames, write_video
from tests.caches import encodings_folder, priors_folder
from tests.cogvideox import write_pipeline
from tests.conftest import tiny_config
from tests.wisa import PHENOMENA

NUM_GOOD, NUM_BAD = 4, 4


@pytest.fixture(scope="module")
def cached(ray_cluster: None, tmp_path_factory: pytest.TempPathFactory) -> tuple[Config, cache.CacheSummary]:
    """A folder without a manifest: four good videos, one of them with two clips in it, and four bad ones."""
    run_dir = tmp_path_factory.mktemp("cache") / "run"
    folder = run_dir / "clips"
    folder.mkdir(parents=True)
    for seed, num_frames in enumerate((17, 33, 17)):
        write_video(
            folder / f"good{seed}.mp4", simulate_clip(seed, num_frames=num_frames, fps=8, size=64).frames, 8
        )
    content = (folder / "good0.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(content[: len(content) // 2])
    (folder / "text.mp4").write_text("not a video\n" * 50)
    (folder / "empty.mp4").write_bytes(b"")
    write_video(folder / "one_frame.mp4", simulate_clip(0, num_frames=2, fps=8, size=64).frames[:1], 8)
    config = load_config("tiny", [f"run_dir={run_dir}", "cache.rows_per_file=2"])
    return config, cache.run(config)


def files(folder: Path) -> dict[str, int]:
    """Data files of a table and when they were written."""
    return {
        file.name: file.stat().st_mtime_ns
        for file in folder.glob("*.parquet")
        if file.name not in (INDEX, EMPTY_PROMPT, INPUT)
    }


def rows(folder: Path) -> dict[str, dict]:
    """All rows of a table, by plain pyarrow."""
    found = [row for name in files(folder) for row in pq.read_table(folder / name).to_pylist()]
    assert len({row["sample_id"] for row in found}) == len(found)
    return {row["sample_id"]: row for row in found}


def vlm_calls(summary: cache.CacheSummary) -> int:
    """Clips that went through the stage that holds the VLM, by Ray Data's own count."""
    stages = [*summary.added_priors.stages, *summary.added_encodings.stages]
    return sum(stage.rows for stage in stages if stage.name == "ExtractPriors")


def test_good_videos_are_cached_and_bad_ones_quarantined(cached: tuple[Config, cache.CacheSummary]) -> None:
    config, summary = cached
    assert (summary.num_videos, summary.num_priors, summary.num_encodings) == (7, NUM_GOOD, NUM_GOOD)
    assert (summary.added_priors.written, summary.added_priors.failed) == (NUM_GOOD, NUM_BAD)
    assert (summary.added_encodings.written, summary.added_encodings.failed) == (NUM_GOOD, 0)
    assert vlm_calls(summary) == NUM_GOOD + NUM_BAD  # a bad one passes it by
    stages = {stage.name: summary.added_priors.utilisation(stage) for stage in summary.added_priors.stages}
    assert list(stages) == ["CutVideo", "ReadClip", "ExtractPriors", "WriteRows"]
    assert min(stages.values()) > 0
    assert summary.added_priors.spilled_bytes == 0
    refused = pa.concat_tables(
        pq.read_table(file) for file in Path(config.cache.output, "quarantine").glob("*.parquet")
    ).to_pylist()
    assert {Path(row["source"]["uri"]).name for row in refused} == {
        "truncated.mp4",
        "text.mp4",
        "empty.mp4",
        "one_frame.mp4",
    }
    assert {(row["stage"], row["error_type"], row["attempts"]) for row in refused} == {
        ("CutVideo", "VideoError", 1)
    }
    assert sorted(summary.quarantined) == sorted(row["message"] for row in refused)


def test_both_tables_join_and_the_vlm_captions_what_has_no_caption(
    cached: tuple[Config, cache.CacheSummary],
) -> None:
    config, summary = cached
    priors, encodings = rows(priors_folder(config)), rows(encodings_folder(config))
    assert priors.keys() == encodings.keys()
    for sample_id, prior in priors.items():
        assert prior["caption"] is None
        assert encodings[sample_id]["caption"] == prior["vlm_caption"] != ""
    spans = sorted((Path(row["source"]["uri"]).name, row["start_s"], row["end_s"]) for row in priors.values())
    assert spans == [
        ("good0.mp4", 0.0, 2.0),
        ("good1.mp4", 0.0, 2.0),
        ("good1.mp4", 2.0, 4.0),
        ("good2.mp4", 0.0, 2.0),
    ]
    assert sum(summary.phenomena.values()) == sum(sum(row["phenomena"]) for row in priors.values())


def test_encodings_are_what_the_encoder_gives(cached: tuple[Config, cache.CacheSummary]) -> None:
    config, _ = cached
    backbone, folder = config.backbone, encodings_folder(config)
    encoder = VideoEncoder(
        backbone.pretrained,
        backbone.revision,
        backbone.dtype,
        backbone.autocast,
        backbone.max_sequence_length,
        backbone.family,
    )
    priors = rows(priors_folder(config))
    index = pq.read_table(folder / INDEX).to_pylist()
    assert [entry["sample_id"] for entry in index] == sorted(priors)
    for entry in index[:2]:
        [row] = pq.ParquetFile(folder / entry["file"]).read_row_group(entry["row_group"]).to_pylist()
        prior = priors[row["sample_id"]]
        frames = read_frames(prior["source"]["uri"], prior["start_s"], prior["end_s"], 17, 64, 64)
        latents = latents_of(row)
        assert list(latents.shape) == entry["latents_shape"] == [16, 5, 16, 16]
        # The VAE computes in bfloat16 here, and rounds otherwise in a batch of four than alone.
        torch.testing.assert_close(latents, encoder.encode_video(frames[None])[0], atol=0.05, rtol=0)
        assert text_of(row)["prompt_embeds"].shape == (32, 192)
        torch.testing.assert_close(text_of(row), first_of(encoder.encode_text([row["caption"]])))
    [empty] = pq.read_table(folder / EMPTY_PROMPT).to_pylist()
    torch.testing.assert_close(text_of(empty), first_of(encoder.encode_text([""])))
    settings = json.loads(pq.read_metadata(folder / EMPTY_PROMPT).metadata[b"prophy.settings"])
    assert settings["text"] == {"prompt_embeds": [32, 192]}


def first_of(text: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value[0] for name, value in text.items()}


def test_the_same_command_adds_nothing(cached: tuple[Config, cache.CacheSummary]) -> None:
    config, first = cached
    folders = (
        priors_folder(config),
        encodings_folder(config),
        Path(config.cache.output, "quarantine"),
    )
    before = [files(folder) for folder in folders]
    second = cache.run(config)
    assert [files(folder) for folder in folders] == before
    assert second.added_priors == second.added_encodings == GraphReport()
    assert (second.num_priors, second.num_encodings) == (first.num_priors, first.num_encodings)
    assert second.quarantined == first.quarantined


def test_what_a_lost_file_held_is_done_again_and_nothing_else(
    cached: tuple[Config, cache.CacheSummary],
) -> None:
    config, _ = cached
    folder = encodings_folder(config)
    priors_before, before, rows_before = files(priors_folder(config)), files(folder), rows(folder)
    lost = sorted(before)[0]
    num_lost = pq.read_metadata(Path(folder) / lost).num_rows
    (Path(folder) / lost).unlink()
    summary = cache.run(config)
    assert (summary.added_encodings.written, summary.added_priors.written) == (num_lost, 0)
    assert files(priors_folder(config)) == priors_before
    kept = {name: time for name, time in before.items() if name != lost}
    assert kept.items() <= files(folder).items()
    assert rows(folder).keys() == rows_before.keys()
    for sample_id, row in rows(folder).items():
        latents = latents_of(rows_before[sample_id])
        torch.testing.assert_close(latents_of(row), latents, atol=0.05, rtol=0)


def test_another_recipe_makes_nothing_new(cached: tuple[Config, cache.CacheSummary]) -> None:
    config, _ = cached
    train = config.train.model_copy(update={"recipe": "none"})
    summary = cache.run(config.model_copy(update={"train": train}))
    assert (vlm_calls(summary), summary.added_encodings.written) == (0, 0)


def test_another_backbone_asks_no_vlm_and_another_transformer_encodes_nothing(
    cached: tuple[Config, cache.CacheSummary], tmp_path: Path
) -> None:
    config, _ = cached
    priors_before, before = files(priors_folder(config)), files(encodings_folder(config))
    folder = Path(shutil.copytree(resolve_pretrained("tiny"), tmp_path / "other"))
    vae = folder / "vae" / "config.json"
    vae.write_text(vae.read_text() + "\n")  # another model by its files

    def with_backbone(**changes: Any) -> Config:
        backbone = config.backbone.model_copy(update=changes)
        return config.model_copy(update={"backbone": backbone, "run_dir": tmp_path / "run"})

    model, resolution = {"pretrained": str(folder)}, {"height": 48, "width": 48}
    other = with_backbone(**model, **resolution)
    each = (config, with_backbone(**model), with_backbone(**resolution), other)
    assert len({encodings_folder(one) for one in each}) == len(each)
    summary = cache.run(other)
    assert (vlm_calls(summary), summary.added_encodings.written) == (0, NUM_GOOD)
    assert files(priors_folder(config)) == priors_before
    assert files(encodings_folder(config)) == before
    shapes = {tuple(row["latents_shape"]) for row in rows(encodings_folder(other)).values()}
    assert shapes == {(16, 5, 12, 12)}

    (folder / "transformer/diffusion_pytorch_model.safetensors").write_bytes(b"of another training")
    (folder / "model_index.json").write_text((folder / "model_index.json").read_text() + "\n")
    assert cache.run(other).added_encodings == GraphReport()


def test_another_vlm_in_the_same_folder_is_refused(cached: tuple[Config, cache.CacheSummary]) -> None:
    config, _ = cached
    other = config.model_copy(
        update={
            "run_dir": config.run_dir.with_name("other"),
            "vlm": config.vlm.model_copy(update={"max_new_tokens": 8}),
        }
    )
    with pytest.raises(ProPhyError, match=r"made with other settings \(max_new_tokens"):
        cache.run(other)


def test_manifests_give_captions_and_labels(tiny_cache: Config) -> None:
    truth = {
        video["source"]["uri"]: video
        for video in find_videos(tiny_cache.cache.input, PHENOMENA).videos.to_pylist()
    }
    priors, encodings = rows(priors_folder(tiny_cache)), rows(encodings_folder(tiny_cache))
    assert len(priors) == len(encodings) == len(truth) == 12
    for sample_id, prior in priors.items():
        video = truth[prior["source"]["uri"]]
        assert prior["caption"] == encodings[sample_id]["caption"] == video["caption"]
        assert sum(prior["phenomena"]) == len(video["labels"]) == len(prior["map_phenomena"])
        assert prior["maps_shape"][0] == len(video["labels"]) + 1


@pytest.mark.slow
def test_what_changes_in_a_list_or_in_the_limits_is_done_anew_and_nothing_else(
    ray_cluster: None, tmp_path: Path
) -> None:
    """One caption is corrected, one video gets labels, one stays, one is too large at first, one no file."""
    manifest = tmp_path / "clips" / "manifest.parquet"
    manifest.parent.mkdir()
    for name, size in (("a", 64), ("b", 64), ("c", 64), ("large", 128)):
        clip = simulate_clip(ord(name[0]), num_frames=17, fps=8, size=size)
        write_video(manifest.parent / f"{name}.mp4", clip.frames, 8)
    (manifest.parent / "none.mp4").mkdir()
    names = ("a", "b", "c", "large", "none")
    listed: list[dict[str, Any]]
    listed = [{"path": f"{name}.mp4", "caption": f"{name} falls", "phenomena": None} for name in names]

    def cached(max_pixels: int) -> cache.CacheSummary:
        pq.write_table(pa.Table.from_pylist(listed), manifest)
        overrides = (f"cache.input={manifest}", f"cache.limits.max_pixels={max_pixels}")
        return cache.run(tiny_config(tmp_path / "run", *overrides))

    none = f"{manifest.parent / 'none.mp4'} cannot be opened (Is a directory)"
    summary = cached(max_pixels=5000)
    assert (summary.num_priors, summary.num_encodings) == (3, 3)
    [refused] = [message for message in summary.quarantined if message != none]
    assert "large.mp4" in refused and "over the limit" in refused and none in summary.quarantined

    listed[0]["caption"] = "a rises"
    listed[1]["phenomena"] = ["melting"]
    summary = cached(max_pixels=20_000)
    assert (summary.added_priors.written, summary.added_encodings.written) == (3, 2)
    assert summary.quarantined == [none]  # told each time
    config = tiny_config(tmp_path / "run")
    priors, encodings = (
        sorted(rows(folder).values(), key=lambda row: row["source"]["uri"])
        for folder in (priors_folder(config), encodings_folder(config))
    )
    captions = ["a rises", "b falls", "c falls", "large falls"]
    assert [row["caption"] for row in priors] == [row["caption"] for row in encodings] == captions
    assert [row["labels"] for row in priors] == [None, ["melting"], None, None]
    assert from_multi_hot(priors[1]["phenomena"], PHENOMENA) == ("melting",)


def test_the_current_input_alone_counts_and_each_content_once(
    ray_cluster: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    for seed, name in enumerate(("a", "c")):
        write_video(clips / f"{name}.mp4", simulate_clip(seed, num_frames=17, fps=8, size=64).frames, 8)
    shutil.copy(clips / "a.mp4", clips / "b copy.mp4")
    Path(os.fsdecode(bytes(clips) + b"/caf\xe9.mp4")).write_bytes(b"")

    def cached(place: Path) -> tuple[cache.CacheSummary, PriorCache, str]:
        config = tiny_config(tmp_path / "run", f"cache.input={place}")
        summary = cache.run(config)
        priors, encodings = priors_folder(config), encodings_folder(config)
        return summary, PriorCache(Path(priors), Path(encodings)), capsys.readouterr().out

    summary, samples, printed = cached(clips)
    assert (summary.num_videos, summary.num_priors, summary.num_encodings) == (3, 2, 2)
    assert (summary.added_priors.written, summary.added_encodings.written) == (3, 2)
    assert (summary.num_copies, summary.num_left_out, len(samples.sample_ids)) == (1, 0, 2)
    assert "1 video(s) have the content of others" in printed and r"caf\xe9.mp4' has a name that" in printed

    listed = [{"path": "c.mp4"}, {"path": str(clips / "c.mp4")}, {"path": 5}]
    (clips / "list.jsonl").write_text("\n".join(map(json.dumps, listed)))
    summary, samples, printed = cached(clips / "list.jsonl")
    assert summary.added_priors == summary.added_encodings == GraphReport()
    assert (summary.num_videos, summary.num_priors, summary.num_encodings) == (1, 1, 1)
    assert (summary.num_copies, summary.num_left_out) == (0, 2)
    assert (samples.num_videos, samples.num_left_out, len(samples.sample_ids)) == (1, 1, 1)
    assert "2 cached video(s) are not in the input" in printed
    assert summary.quarantined == [f"row 3 of {clips / 'list.jsonl'}: 'path' is no text (5)"]


@pytest.mark.parametrize(
    ("report", "message"),
    [
        (GraphReport(written=1, files=["a.parquet"]), r"^1 of 1 files that nodes wrote are not in "),
        (GraphReport(), r"^none of the 1 videos in .+ can be used$"),
    ],
)
def test_rows_that_are_nowhere_end_the_run(
    ray_cluster: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, report: GraphReport, message: str
) -> None:
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").touch()
    monkeypatch.setattr(cache, "execute", lambda *_: report)
    with pytest.raises(ProPhyError, match=message):
        cache.run(tiny_config(tmp_path / "run", f"cache.input={tmp_path / 'clips'}"))


def test_fingerprints_follow_what_decides_the_content(config: Config, tmp_path: Path) -> None:
    def with_backbone(**changes: Any) -> Path:
        backbone = config.backbone.model_copy(update=changes)
        return encodings_folder(config.model_copy(update={"backbone": backbone}))

    folder = encodings_folder(config)
    assert with_backbone() == folder
    assert with_backbone(attention="sage", compile="regional") == folder  # how the transformer runs
    changes: list[dict[str, Any]] = [
        {"height": 32},
        {"fps": 4.0},
        {"max_sequence_length": 16},
        {"autocast": None},
        {"dtype": "bfloat16"},
    ]
    cogvideox = [write_pipeline(tmp_path / str(patch_t), patch_size_t=patch_t) for patch_t in (None, 2)]
    changes += [{"family": "cogvideox", "pretrained": str(path)} for path in cogvideox]
    others = {with_backbone(**change) for change in changes}
    assert len(others | {folder}) == len(changes) + 1


def test_nothing_usable_is_an_error(config: Config) -> None:
    with pytest.raises(ProPhyError, match="does not exist"):
        cache.run(config)
    Path(config.cache.input).mkdir(parents=True)
    with pytest.raises(ProPhyError, match="no videos in"):
        cache.run(config)


def test_only_bad_videos_is_an_error_with_the_first_reason(
    cached: tuple[Config, cache.CacheSummary], tmp_path: Path
) -> None:
    config, _ = cached
    manifest = tmp_path / "bad.parquet"
    pq.write_table(pa.table({"path": [f"{config.cache.input}/text.mp4"]}), manifest)
    only_bad = config.model_copy(update={"cache": config.cache.model_copy(update={"input": str(manifest)})})
    with pytest.raises(ProPhyError, match=r"none of the 1 videos in .* can be used; the first: .*text\.mp4"):
        cache.run(only_bad)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_frames": 18, "fps": 8.5}, r"cannot encode 18 frames of 64x64; take 4 n \+ 1 frames"),
        ({"height": 60}, r"cannot encode 17 frames of 60x64; .* multiples of 8 and 8 pixels"),
        ({"aspect_buckets": [(64, 64), (32, 90)]}, r"cannot encode 17 frames of 32x90"),
    ],
)
def test_clips_that_the_backbone_cannot_encode(config: Config, changes: dict, message: str) -> None:
    backbone = config.backbone.model_copy(update=changes)
    with pytest.raises(ProPhyError, match=message):
        cache.run(config.model_copy(update={"backbone": backbone}))


def test_clip_and_backbone_must_last_equally(config: Config) -> None:
    backbone = config.backbone.model_copy(update={"num_frames": 25})
    with pytest.raises(ProPhyError, match=r"backbone.num_frames \(25\)"):
        cache.run(config.model_copy(update={"backbone": backbone}))


def test_the_tables_join_on_their_indices(tiny_cache: Config) -> None:
    priors = pq.read_table(priors_folder(tiny_cache) / INDEX)
    encodings = pq.read_table(encodings_folder(tiny_cache) / INDEX)
    joined = priors.select(["sample_id", "fps"]).join(encodings.select(["sample_id", "caption"]), "sample_id")
    assert len(joined) == 12
    assert pc.all(pc.is_valid(joined["caption"])).as_py()


def test_a_run_that_has_to_wait_leaves_the_configuration_of_the_other(tmp_path: Path) -> None:
    clips = tmp_path / "clips"
    clips.mkdir()
    (clips / "a.mp4").write_bytes(b"")
    config = tiny_config(tmp_path / "run", f"cache.input={clips}")
    with exclusive(config.cache.folder), pytest.raises(ProPhyError, match="another run writes to"):
        cache.run(config)
    assert not (config.run_dir / "cache.yaml").exists()
