"""`prophy generate`: videos of prompts and images, offline, with Ray Data: specs -> actors -> mp4 files.

A video's file is named after all that decides it, so that a second run makes only what is missing.
"""

import hashlib
import json
import logging
import tempfile
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import TypeVar

import ray.data

from pipelines.actors import told_by_the_first_call
from pipelines.config import Config
from pipelines.generation.limits import (
    check_batch,
    check_model,
    check_same_model,
    model_fingerprint,
    shape_limits,
)
from pipelines.generation.spec import PhysicsSpec, VideoSpec
from pipelines.pictures import save_picture
from pipelines.resources import guard, needs_of, room_for
from pipelines.runtime import open_run, ray_session
from prophy.errors import ProPhyError
from prophy.images import read_image
from prophy.places import Place, change, names, place_of, write_whole
from prophy.sheets import film_sheet
from prophy.stores import mendable, open_store
from prophy.video import WRITING_VERSION, read_frames, write_video

logger = logging.getLogger(__name__)

Item = TypeVar("Item")

MANIFEST = "manifest.jsonl"


@told_by_the_first_call
class GenerateVideos:
    """Row callable `{"specs", "names", "images"}` -> `{"names"}` that writes a batch; holds the model.

    Args:
        config: the run.
        model: its fingerprint, after which the videos are named.

    Raises:
        ProPhyError: from the first call, where another model lies there by now.
    """

    def __init__(self, config: Config, model: str) -> None:
        check_same_model(config, model)
        from pipelines.generation.sampler import VideoSampler  # torch and diffusers: of no use to the driver

        self._sampler = VideoSampler(config)
        self._output = _output(config)

    def __call__(self, row: dict[str, list[str]]) -> dict[str, list[str]]:
        """Makes the videos at once, unless they are there: Ray asks again for what a lost node had made."""
        files = [self._output / name for name in row["names"]]
        with _using(self._output):
            if all(file.exists() for file in files):
                return {"names": row["names"]}
        specs = [VideoSpec.model_validate_json(spec) for spec in row["specs"]]
        pairs = zip(row["images"], specs, strict=True)
        images = [_read(Path(image), spec.image) for image, spec in pairs if image]
        made = self._sampler.sample_batch(specs, images=images)
        with tempfile.TemporaryDirectory() as folder:
            for file, spec, frames in zip(files, specs, made, strict=True):
                written = Path(folder) / file.name
                write_video(written, frames, spec.fps)
                with _using(file):
                    write_whole(file, written.read_bytes())
        return {"names": row["names"]}


def run(config: Config, prompts: list[str], images: Sequence[Path] = ()) -> list[str]:
    """Makes the videos of each prompt, into `config.generate.output`, and lists them in its `manifest.jsonl`.

    Args:
        config: the run.
        prompts: what the videos show; one that occurs again, with the same image, gets the next seed.
        images: what videos begin with, in the order of the prompts; or one for all; or none.

    Returns:
        Paths or URLs of the videos, in the order of the prompts and, for each, of their seeds.

    Raises:
        ProPhyError: no prompts, an empty one, a checkpoint of another backbone, batches with a step cache
            that would have a video depend on the others of its batch, an output that cannot be written, or
            images that are not as many, cannot be read, or are nothing to this model, or not in batches.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ProPhyError(f"cannot make videos from prompts {prompts}; give at least one, and none empty")
    step_cache, batch_size = config.sampling.step_cache, config.generate.batch_size
    if batch_size > 1 and (step_cache.first_block is not None or step_cache.sea is not None):
        raise ProPhyError(
            f"with a generate.batch_size of {batch_size} a step cache with a threshold would have a video "
            "depend on the others of its batch; use sampling.step_cache.taylorseer, or a batch_size of 1"
        )
    check_model(config)
    if len(images) not in (0, 1, len(prompts)):
        raise ProPhyError(
            f"there are {len(prompts)} prompts and {len(images)} images; give as many, or one image for all"
        )
    check_batch(config, bool(images))
    number = config.generate.num_videos_per_prompt
    if len(images) == 1:
        images = [*images] * len(prompts)
    prompts, images = _each(prompts, number), _each(images, number)
    specs = _specs(config, prompts, images)
    model = model_fingerprint(config)
    open_run(config, "generate")
    output = _output(config)
    # Before anything is loaded: an output that cannot be written is told of at once.
    with _using(output / MANIFEST):
        change(output / MANIFEST, lambda lines: lines)
    files = [f"{_digest(config, video, model)}.mp4" for video in specs]
    with _using(output):
        there = set(names(output))
    starts = [str(image.absolute()) for image in images] or [""] * len(prompts)
    missing = [
        (video.model_dump_json(), name, image)
        for video, name, image in zip(specs, files, starts, strict=True)
        if name not in there
    ]
    logger.info("%d of %d videos are already there", len(files) - len(missing), len(files))
    if missing:
        with ray_session(config):
            _generate(config, model, missing)
    made = dict(zip(files, specs, strict=True))
    with _using(output / MANIFEST):
        change(output / MANIFEST, lambda lines: _with_lines_of(made, lines))
    return [f"{config.generate.output}/{name}" for name in files]


def _output(config: Config) -> Place:
    return place_of(config.generate.output, "generate.output")


def _using(place: Place) -> AbstractContextManager[None]:
    return mendable(f"generate.output: cannot use {place}")


def _specs(config: Config, prompts: list[str], images: Sequence[Path]) -> list[VideoSpec]:
    """The video of each prompt, and of its image where there are any.

    Raises:
        ProPhyError: see `run`.
    """
    digests: dict[Path, str] = {}
    shape_limits(config).check_image(bool(images), config.sampling.step_cache)
    for image in dict.fromkeys(images):
        content = _read(image)
        read_image(content, str(image))
        digests[image] = hashlib.sha256(content).hexdigest()
    of_each: list[str | None] = [digests[image] for image in images]
    specs, occurrences = list[VideoSpec](), Counter[tuple[str, str | None]]()
    for prompt, digest in zip(prompts, of_each or [None] * len(prompts), strict=True):
        specs.append(video_spec(config, prompt, occurrence=occurrences[prompt, digest], image=digest))
        occurrences[prompt, digest] += 1
    return specs


def _each(items: Sequence[Item], number: int) -> list[Item]:
    """So many of each item, side by side."""
    return [item for item in items for _ in range(number)]


def _read(image: Path, digest: str | None = None) -> bytes:
    """The content of an image's file.

    Raises:
        ProPhyError: it cannot be read, or is no longer the one that was asked for.
    """
    try:
        content = image.read_bytes()
    except OSError as error:
        raise ProPhyError(f"cannot read the image {image}: {error.strerror}") from None
    if digest is not None and hashlib.sha256(content).hexdigest() != digest:
        raise ProPhyError(f"the image {image} has changed since this run began; run the same command again")
    return content


def write_contact_sheet(config: Config, prompts: list[str], videos: list[str], path: Path) -> None:
    """Writes a PNG with a row of frames per video, under its prompt.

    Args:
        config: the run that made the videos.
        prompts: what the run was given.
        videos: what it made.
        path: where to write the PNG.
    """
    backbone = config.backbone
    end_s = (backbone.num_frames - 1) / backbone.fps
    size = (backbone.num_frames, backbone.height, backbone.width)
    captions = _each(prompts, config.generate.num_videos_per_prompt)
    films = []
    with tempfile.TemporaryDirectory() as folder:
        for caption, video in zip(captions, videos, strict=True):
            file = f"{folder}/video.mp4"
            store, place = open_store(video)
            store.get_file(place, file)
            films.append((caption, read_frames(file, 0.0, end_s, *size)))
    save_picture(film_sheet(films), path)
    logger.info("wrote %s", path)


def video_spec(
    config: Config,
    prompt: str,
    physics: PhysicsSpec | None = None,
    occurrence: int = 0,
    image: str | None = None,
) -> VideoSpec:
    """The video of a prompt as the configuration has it; a later occurrence of a prompt gets a later seed."""
    backbone = config.backbone
    return VideoSpec(
        prompt=prompt,
        seed=config.generate.seed + occurrence,
        num_frames=backbone.num_frames,
        height=backbone.height,
        width=backbone.width,
        fps=backbone.fps,
        physics=physics,
        image=image,
        **config.sampling.model_dump(),
    )


def _digest(config: Config, video: VideoSpec, model: str) -> str:
    """All that decides a video: the model, how it computes, what it is asked for, and how it is written."""
    backbone = config.backbone
    computes = f"{backbone.dtype} {backbone.autocast} {backbone.max_sequence_length}"
    decides = f"{model} {computes} {WRITING_VERSION} {video.model_dump_json()}"
    return hashlib.sha256(decides.encode()).hexdigest()[:16]


def _generate(config: Config, model: str, videos: list[tuple[str, str, str]]) -> None:
    """One block per batch: every actor of the pool has work, and each batch is reported when it is there.

    Args:
        config: the run.
        model: its fingerprint.
        videos: specification, name, and path of the image of each, empty where none has one.
    """
    pool, size = config.generate.pool, config.generate.batch_size
    batches = [zip(*videos[start : start + size], strict=True) for start in range(0, len(videos), size)]
    rows = [dict(zip(("specs", "names", "images"), map(list, batch), strict=True)) for batch in batches]
    [room] = room_for(needs_of(config, "generate"))
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        GenerateVideos,  # type: ignore[arg-type]  # Ray's annotation knows functions only
        fn_constructor_args=(config, model),
        compute=ray.data.ActorPoolStrategy(size=min(room, len(rows))),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    guard(made)
    count = 0
    for row in made.iter_rows():
        for name in row["names"]:
            count += 1
            logger.info("%d/%d %s/%s", count, len(videos), config.generate.output, name)


def _with_lines_of(videos: dict[str, VideoSpec], manifest: bytes) -> bytes:
    """One line per video, earlier ones first; paths are relative to the manifest."""
    lines = {entry["path"]: entry for entry in map(json.loads, manifest.splitlines())}
    lines |= {name: {"path": name, **video.model_dump(mode="json")} for name, video in videos.items()}
    return "".join(json.dumps(line) + "\n" for line in lines.values()).encode()
