"""Offline generation: prompts become files, once."""

import json
from pathlib import Path

import pytest
from PIL import Image

from pipelines.generation import generate
from prophy.errors import ProPhyError
from prophy.video import probe
from tests.cogvideox import MAX_SEQUENCE_LENGTH, write_pipeline
from tests.conftest import tiny_config
from tests.wan import write_ti2v

SMALL = ("backbone.num_frames=5", "backbone.height=32", "backbone.width=32", "sampling.num_inference_steps=2")


def test_prompts_become_videos_and_are_not_made_again(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(tmp_path / "run", *SMALL)
    prompts = ["a red ball falls", "a yellow fire burns", "a red ball falls"]
    output = Path(config.generate.output)
    paths = [Path(path) for path in generate.run(config, prompts)]
    assert len(set(paths)) == 3, "a repeated prompt is another video"
    for path in paths:
        info = probe(path)
        assert (info.num_frames, info.height, info.width) == (5, 32, 32)
    manifest = output / "manifest.jsonl"
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == list(zip(prompts, [0, 0, 1], strict=True))
    assert [output.absolute() / line["path"] for line in lines] == paths
    assert lines[0]["num_inference_steps"] == 2

    kept, removed = paths[0].stat().st_mtime_ns, paths[1].read_bytes()
    paths[1].unlink()
    again = generate.run(config, prompts[1::-1])
    assert again == [str(path) for path in paths[1::-1]], "a video's name does not depend on the order"
    assert paths[0].stat().st_mtime_ns == kept
    assert paths[1].read_bytes() == removed, "the same seed makes the same video"
    assert manifest.read_text().splitlines() == [json.dumps(line) for line in lines]


def test_batches(ray_cluster: None, tmp_path: Path) -> None:
    config = tiny_config(
        tmp_path / "run",
        *SMALL,
        "generate.batch_size=3",
        "generate.num_videos_per_prompt=2",
        "sampling.step_cache.taylorseer=2",
    )
    prompts = ["a red ball falls", "a yellow fire burns"]
    paths = generate.run(config, prompts)
    assert len({Path(path).read_bytes() for path in paths}) == 4
    assert all(probe(path).num_frames == 5 for path in paths)
    manifest = Path(config.generate.output, "manifest.jsonl")
    lines = [json.loads(line) for line in manifest.read_text().splitlines()]
    assert [(line["prompt"], line["seed"]) for line in lines] == [
        (p, seed) for p in prompts for seed in (0, 1)
    ]
    generate.write_contact_sheet(config, prompts, paths, tmp_path / "sheet.png")
    assert Image.open(tmp_path / "sheet.png").height > 4 * 2 * 32

    for cache in ("first_block", "sea"):
        config = tiny_config(tmp_path, "generate.batch_size=2", f"sampling.step_cache.{cache}=0.1")
        with pytest.raises(
            ProPhyError, match="generate.batch_size of 2 .*; use sampling.step_cache.taylorseer"
        ):
            generate.run(config, ["a red ball falls"])


def test_names_of_videos_say_how_the_model_computes_and_how_they_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def name(*overrides: str) -> str:
        config = tiny_config(tmp_path, *overrides)
        return generate._digest(config, generate.video_spec(config, "a red ball falls"), "fingerprint")

    changes = ("dtype=bfloat16", "autocast=null", "max_sequence_length=17")
    names = {name(), *(name(f"backbone.{change}") for change in changes)}
    assert len(names) == 4, "each change makes another video"
    assert name("backbone.compile=regional", "backbone.offload=all") in names, "these change none"
    monkeypatch.setattr(generate, "WRITING_VERSION", generate.WRITING_VERSION + 1)
    assert name() not in names


def test_empty_prompts(tmp_path: Path) -> None:
    for prompts in ([], ["a ball", " "]):
        with pytest.raises(ProPhyError, match="give at least one, and none empty"):
            generate.run(tiny_config(tmp_path), prompts)


def test_images_that_do_not_fit_the_prompts_or_cannot_be_read(tmp_path: Path) -> None:
    backbone = write_ti2v(tmp_path / "backbone")
    config = tiny_config(tmp_path / "run", f"backbone.pretrained={backbone}", "checkpoint=null")
    image, text, missing = tmp_path / "a.png", tmp_path / "b.png", tmp_path / "c.png"
    Image.new("RGB", (8, 8)).save(image)
    text.write_text("no image")
    for images, reason in (
        ([image, image], "3 prompts and 2 images; give as many, or one image for all"),
        ([text], "b.png is no image that can be read"),
        ([missing], "cannot read the image .*c.png: No such file"),
    ):
        with pytest.raises(ProPhyError, match=reason):
            generate.run(config, ["a ball", "a candle", "ice"], images)
    sea = tiny_config(
        tmp_path / "run",
        f"backbone.pretrained={backbone}",
        "checkpoint=null",
        "sampling.step_cache.sea=0.1",
    )
    with pytest.raises(ProPhyError, match="leave the image out, or use first_block or taylorseer"):
        generate.run(sea, ["a ball"], [image])
    of_text = write_pipeline(tmp_path / "of-text")
    cogvideox = tiny_config(
        tmp_path / "run",
        "backbone.family=cogvideox",
        f"backbone.pretrained={of_text}",
        f"backbone.max_sequence_length={MAX_SEQUENCE_LENGTH}",
        "checkpoint=null",
    )
    with pytest.raises(ProPhyError, match="from text alone and takes no image"):
        generate.run(cogvideox, ["a ball"], [image])


def test_a_video_is_named_after_its_image_too(tmp_path: Path) -> None:
    backbone = write_ti2v(tmp_path / "backbone")
    config = tiny_config(tmp_path / "run", f"backbone.pretrained={backbone}", "checkpoint=null")
    images = [tmp_path / f"{color}.png" for color in ("red", "blue")]
    for image in images:
        Image.new("RGB", (8, 8), image.stem).save(image)
    prompts = ["a ball"] * 3
    of_each = generate._specs(config, prompts[:2], images)
    of_one = generate._specs(config, prompts, images[:1] * 3)
    assert [spec.seed for spec in of_each] == [0, 0] and [spec.seed for spec in of_one] == [0, 1, 2]
    assert of_each[0] == of_one[0] and of_each[0].image != of_each[1].image
    assert generate._specs(config, prompts[:1], [])[0].image is None


def test_a_model_that_changes_before_a_worker_loads_it(tmp_path: Path) -> None:
    config = tiny_config(tmp_path, "checkpoint=tiny")
    stage = generate.GenerateVideos(config, "what it was")
    with pytest.raises(ProPhyError, match=f"tiny, or {config.checkpoint}, has changed since this command"):
        stage({"specs": [], "names": [], "images": []})
