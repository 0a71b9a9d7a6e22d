"""`prophy generate`: videos from prompts, offline, with Ray Data: prompts -> pool of actors -> mp4 files.

A video's file is named after all that decides it, so that a second run makes only what is missing.
"""

import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import ray.data

from pipelines.config import Config
from pipelines.generation.limits import check_model, model_fingerprint
from pipelines.generation.spec import PhysicsSpec, VideoSpec
from pipelines.pictures import save_picture
from pipelines.resources import guard, needs_of, room_for
from pipelines.runtime import open_run, ray_session
from prophy.errors import ProPhyError
from prophy.sheets import film_sheet
from prophy.video import read_frames, write_video

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


class GenerateVideos:
    """Row callable `{"specs", "paths"}` -> `{"paths"}` that writes the mp4 files of a batch; holds the model.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        from pipelines.generation.sampler import VideoSampler  # torch and diffusers: of no use to the driver

        self._sampler = VideoSampler(config)

    def __call__(self, row: dict[str, list[str]]) -> dict[str, list[str]]:
        """Makes the videos at once; a file is there in whole or not at all."""
        specs = [VideoSpec.model_validate_json(spec) for spec in row["specs"]]
        for path, spec, frames in zip(row["paths"], specs, self._sampler.sample_batch(specs), strict=True):
            partial = Path(path).with_suffix(".partial")
            write_video(partial, frames, spec.fps)
            partial.rename(path)
        return {"paths": row["paths"]}


def run(config: Config, prompts: list[str]) -> list[Path]:
    """Makes one video per prompt, into `config.generate.output`, and lists them in its `manifest.jsonl`.

    Args:
        config: the run.
        prompts: one per video; a prompt that occurs again gets the next seed.

    Returns:
        The videos, in the order of the prompts.

    Raises:
        ProPhyError: no prompts, an empty one, a checkpoint of another backbone, or batches with a step cache
            that would have a video depend on the others of its batch.
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
    model = model_fingerprint(config)
    open_run(config, "generate")
    output = config.generate.output
    output.mkdir(parents=True, exist_ok=True)
    specs = [
        video_spec(config, prompt, occurrence=prompts[:index].count(prompt))
        for index, prompt in enumerate(prompts)
    ]
    paths = [output / f"{_digest(video, model)}.mp4" for video in specs]
    missing = [
        (video.model_dump_json(), str(path))
        for video, path in zip(specs, paths, strict=True)
        if not path.exists()
    ]
    logger.info("%d of %d videos are already there", len(paths) - len(missing), len(paths))
    if missing:
        with ray_session(config):
            _generate(config, missing)
    _write_manifest(output / MANIFEST, dict(zip(paths, specs, strict=True)))
    return paths


def write_contact_sheet(config: Config, videos: dict[str, Path], path: Path) -> None:
    """Writes a PNG with a row of frames per video, under its prompt.

    Args:
        config: the run that made the videos.
        videos: by prompt.
        path: where to write the PNG.
    """
    backbone = config.backbone
    end_s = (backbone.num_frames - 1) / backbone.fps
    size = (backbone.num_frames, backbone.height, backbone.width)
    films = {prompt: read_frames(video, 0.0, end_s, *size) for prompt, video in videos.items()}
    save_picture(film_sheet(films), path)
    logger.info("wrote %s", path)


def video_spec(
    config: Config, prompt: str, physics: PhysicsSpec | None = None, occurrence: int = 0
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
        **config.sampling.model_dump(),
    )


def _digest(video: VideoSpec, model: str) -> str:
    return hashlib.sha256(f"{model} {video.model_dump_json()}".encode()).hexdigest()[:16]


def _generate(config: Config, videos: list[tuple[str, str]]) -> None:
    """One block per batch: every actor of the pool has work, and each batch is reported when it is there."""
    pool, size = config.generate.pool, config.generate.batch_size
    batches = [zip(*videos[start : start + size], strict=True) for start in range(0, len(videos), size)]
    rows = [{"specs": list(specs), "paths": list(paths)} for specs, paths in batches]
    [room] = room_for(needs_of(config, "generate"))
    made = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        GenerateVideos,  # type: ignore[arg-type]  # Ray's annotation knows functions only
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(room, len(rows))),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    guard(made)
    count = 0
    for row in made.iter_rows():
        for path in row["paths"]:
            count += 1
            logger.info("%d/%d %s", count, len(videos), path)


def _write_manifest(path: Path, videos: dict[Path, VideoSpec]) -> None:
    """One line per video of this folder, earlier ones first; paths are relative to the folder."""
    lines: dict[str, dict[str, Any]] = {}
    if path.exists():
        lines = {entry["path"]: entry for entry in map(json.loads, path.read_text().splitlines())}
    lines |= {
        file.name: {"path": file.name, **video.model_dump(mode="json")} for file, video in videos.items()
    }
    partial = path.with_suffix(".partial")
    partial.write_text("".join(json.dumps(line) + "\n" for line in lines.values()))
    partial.rename(path)
