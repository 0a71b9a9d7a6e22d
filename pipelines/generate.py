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
from pipelines.runtime import open_run, ray_session
from pipelines.spec import PhysicsSpec, VideoSpec
from prophy.errors import ProPhyError
from prophy.sandbox import film_sheet
from prophy.video import read_frames

logger = logging.getLogger(__name__)

MANIFEST = "manifest.jsonl"


class GenerateVideo:
    """Row callable `{"spec", "path"}` -> `{"path"}` that writes the mp4; holds the model.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        from pipelines.sampling import VideoSampler  # torch and diffusers: of no use to the driver

        self._sampler = VideoSampler(config)

    def __call__(self, row: dict[str, str]) -> dict[str, str]:
        """Makes one video; its file is there in whole or not at all."""
        path = Path(row["path"])
        partial = path.with_suffix(".partial")
        self._sampler.write(VideoSpec.model_validate_json(row["spec"]), partial)
        partial.rename(path)
        return {"path": row["path"]}


def run(config: Config, prompts: list[str]) -> list[Path]:
    """Makes one video per prompt, into `config.generate.output`, and lists them in its `manifest.jsonl`.

    Args:
        config: the run.
        prompts: one per video; a prompt that occurs again gets the next seed.

    Returns:
        The videos, in the order of the prompts.

    Raises:
        ProPhyError: no prompts, an empty one, or a checkpoint of another backbone.
    """
    if not prompts or not all(prompt.strip() for prompt in prompts):
        raise ProPhyError(f"cannot make videos from prompts {prompts}; give at least one, and none empty")
    from pipelines.sampling import check_model, model_fingerprint

    check_model(config)
    model = model_fingerprint(config)
    open_run(config, "generate")
    output = config.generate.output
    output.mkdir(parents=True, exist_ok=True)
    specs = [
        spec(config, prompt, occurrence=prompts[:index].count(prompt)) for index, prompt in enumerate(prompts)
    ]
    paths = [output / f"{_digest(video, model)}.mp4" for video in specs]
    missing = [
        {"spec": video.model_dump_json(), "path": str(path)}
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
        path: of the PNG.
    """
    backbone = config.backbone
    end_s = (backbone.num_frames - 1) / backbone.fps
    size = (backbone.num_frames, backbone.height, backbone.width)
    film_sheet({prompt: read_frames(video, 0.0, end_s, *size) for prompt, video in videos.items()}).save(path)
    logger.info("wrote %s", path)


def spec(config: Config, prompt: str, physics: PhysicsSpec | None = None, occurrence: int = 0) -> VideoSpec:
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


def _generate(config: Config, rows: list[dict[str, str]]) -> None:
    """One block per video: every actor of the pool has work, and each video is reported when it is there."""
    pool = config.generate.pool
    videos = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        GenerateVideo,  # type: ignore[arg-type]  # Ray's annotation knows functions only
        fn_constructor_args=(config,),
        compute=ray.data.ActorPoolStrategy(size=min(pool.size, len(rows))),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    for count, row in enumerate(videos.iter_rows(), start=1):
        logger.info("%d/%d %s", count, len(rows), row["path"])


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
