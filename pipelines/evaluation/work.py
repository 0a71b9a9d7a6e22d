"""What a comparison computes, and the files that hold it: each is named after all that decides it."""

import hashlib
import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import ray.data
from ray.data import ActorPoolStrategy, DataContext

import prophy
from pipelines.caching.cache import open_cache
from pipelines.caching.progress import show_progress
from pipelines.config import Config
from pipelines.evaluation.contestants import Entrant
from pipelines.evaluation.items import Item, find_items
from pipelines.resources import guard, needs_of, room_for
from prophy.backbones.pretrained import encoders_fingerprint, encoders_sha256
from prophy.errors import ProPhyError
from prophy.hashing import sources_sha256
from prophy.video import FRAMES_VERSION, WRITING_VERSION

_ITEMS_PER_FILE = 8
_METHOD, _OWN = Path(prophy.__file__).parent, Path(__file__).parent
# The code that decides what lies in each kind of file.
_SANDBOX = (_METHOD / "sandbox",)
_ENCODE = (
    _OWN / "stages.py",
    _METHOD / "backbones/encoding.py",
    _METHOD / "evaluation/localization.py",
    _METHOD / "token_frames.py",
)
_DENOISE = (
    _OWN / "stages.py",
    _METHOD / "evaluation/denoising.py",
    _METHOD / "evaluation/localization.py",
    _METHOD / "models",
    _METHOD / "priors/grounding.py",
    _METHOD / "token_frames.py",
    _METHOD / "training/objectives.py",
)
_SAMPLE = (_OWN.parent / "generation/sampler.py", _METHOD / "generation", _METHOD / "models")
_JUDGE = (
    _OWN / "videos.py",
    *_SANDBOX,
    *(_METHOD / f"evaluation/{name}.py" for name in ("motion", "semantics", "shapes")),
)

T = TypeVar("T")


class Denoising:
    """True clips, encoded once for all, and denoised by each contestant.

    Attributes:
        files: (entrant, path) of each file of scores.
        videos: names of those of the cache that are denoised.

    Args:
        config: the run.
        entrants: what is compared.

    Raises:
        ProPhyError: as `find_items`; or clips are the cache's, and a contestant has encoders of its own.
    """

    def __init__(self, config: Config, entrants: Sequence[Entrant]) -> None:
        self._config, self._entrants = config, entrants
        evaluate, items = config.evaluate, find_items(config)
        self.videos = {item.unit for item in items if item.clip is not None and item.clip.sample is not None}
        if self.videos:
            _check_encoders(config, entrants)
        code = sources_sha256(*_DENOISE)
        self._encode_code, self._sandbox_code = sources_sha256(*_ENCODE), sources_sha256(*_SANDBOX)
        self._rows: list[dict[str, Any]] = []
        for index, entrant in enumerate(entrants):
            encodings = [self._encoding(entrant, item) for item in items]
            for batch in _batches(range(len(items)), _ITEMS_PER_FILE):
                tensors = [encodings[place] for place in batch]
                identity = [code, entrant.identity, evaluate.noise_levels, tensors]
                self._rows.append(
                    {
                        "entrant": index,
                        "items": [items[place].model_dump_json() for place in batch],
                        "encodings": tensors,
                        "path": str(evaluate.output / "scores" / f"{_digest(identity)}.parquet"),
                    }
                )
        self.files = [(row["entrant"], Path(row["path"])) for row in self._rows]

    def run(self) -> None:
        """Makes the files of scores that are not there."""
        missing = _missing(self._rows)
        if missing:
            self._encode(missing)
            self._denoise(missing)

    def _encode(self, missing: Sequence[dict[str, Any]]) -> None:
        from pipelines.evaluation.stages import EncodeItems
        from pipelines.training.data import clip_shape

        for entrant in self._entrants:
            backbone = entrant.config.backbone
            items = {
                path: item
                for row in missing
                if self._entrants[row["entrant"]].encoders == entrant.encoders
                for item, path in zip(row["items"], row["encodings"], strict=True)
                if path.startswith("/") and not Path(path).exists()
            }
            rows = [
                {"items": [items[path] for path in batch], "paths": batch}
                for batch in _batches([*items], _ITEMS_PER_FILE)
            ]
            if rows:
                shape = clip_shape(backbone, backbone.num_frames, backbone.height, backbone.width)
                _execute(self._config, "encode", EncodeItems, (entrant.config, shape), rows)

    def _denoise(self, missing: list[dict[str, Any]]) -> None:
        from pipelines.evaluation.stages import DenoiseItems
        from pipelines.training.data import clip_shape

        config, backbone = self._config, self._config.backbone
        shape = clip_shape(backbone, backbone.num_frames, backbone.height, backbone.width)
        cache, shapes = None, []
        if config.evaluate.clips == "cache":
            cache = open_cache(config)
            shapes = [
                clip_shape(backbone, num_frames, *size)
                for _, num_frames in config.clip_lengths
                for size in backbone.frame_shapes
            ]
        arguments = (config, self._entrants, shape, cache, shapes)
        _execute(config, "denoise", DenoiseItems, arguments, missing)

    def _encoding(self, entrant: Entrant, item: Item) -> str:
        """The file of an item's tensors; of the cache's samples, what the sample is."""
        backbone = entrant.config.backbone
        settings = backbone.model_dump(mode="json", exclude={"pretrained", "revision"})
        made_by: list[object] = [self._encode_code, entrant.encoders, settings]
        if item.clip is not None and item.clip.parts:
            made_by.append(self._sandbox_code)
        if item.clip is not None and item.clip.path is not None:
            made_by.append(FRAMES_VERSION)
        key = item.key(made_by)
        if item.clip is not None and item.clip.sample is not None:
            return f"sample {key} {self._config.train.recipe}"
        return str(self._config.evaluate.output / "encodings" / f"{key}.safetensors")


def _check_encoders(config: Config, entrants: Sequence[Entrant]) -> None:
    for entrant in entrants:
        if not _encodes_alike(config, entrant):
            raise ProPhyError(
                f"the contestant {entrant.name!r} of evaluate.contestants has another VAE or text encoder "
                "than backbone.pretrained, which encoded the cache; set its pretrained to a model with the "
                "same ones, or evaluate.clips to 'sandbox'"
            )


def _encodes_alike(config: Config, entrant: Entrant) -> bool:
    ours, theirs = config.backbone, entrant.config.backbone
    if encoders_fingerprint(ours.family, ours.pretrained, ours.revision) == entrant.encoders:
        return True
    # The same files have another fingerprint in a folder than on the hub.
    return len({encoders_sha256(one.family, one.pretrained, one.revision) for one in (ours, theirs)}) == 1


class Filming:
    """Videos that each contestant makes from the same prompts and seeds, judged by the sandbox's truth.

    Attributes:
        files: (entrant, path) of each file of scores.
        videos: the video of each unit, for each entrant.

    Args:
        config: the run.
        entrants: what is compared.
    """

    def __init__(self, config: Config, entrants: Sequence[Entrant]) -> None:
        from pipelines.evaluation.requests import requests_of, spec_of, unit_of

        self._config, self._entrants = config, entrants
        evaluate, requests = config.evaluate, requests_of(config)
        step_cache = config.sampling.step_cache
        # A step cache with a threshold would have a video depend on the others of its batch.
        alone = step_cache.first_block is not None or step_cache.sea is not None
        self._rows: list[dict[str, Any]] = []
        self.videos: list[dict[str, Path]] = []
        sampled, judged = sources_sha256(*_SAMPLE), [sources_sha256(*_JUDGE), FRAMES_VERSION]
        for index, entrant in enumerate(entrants):
            specs = [
                spec_of(config, request).model_copy(update={"physics": entrant.knobs}).model_dump_json()
                for request in requests
            ]
            names = [_digest([sampled, WRITING_VERSION, entrant.identity, spec]) for spec in specs]
            videos = [str(evaluate.output / "videos" / f"{name}.mp4") for name in names]
            self.videos.append(dict(zip(map(unit_of, requests), map(Path, videos), strict=True)))
            for batch in _batches(range(len(requests)), 1 if alone else evaluate.batch_size):
                own = [videos[place] for place in batch]
                self._rows.append(
                    {
                        "entrant": index,
                        "requests": list(batch),
                        "specs": [specs[place] for place in batch],
                        "videos": own,
                        "path": str(evaluate.output / "scores" / f"{_digest([judged, own])}.parquet"),
                    }
                )
        self.files = [(row["entrant"], Path(row["path"])) for row in self._rows]

    def run(self) -> None:
        """Makes the videos and the files of scores that are not there."""
        from pipelines.evaluation.videos import JudgeVideos, MakeVideos

        unjudged = _missing(self._rows)
        unmade = [row for row in unjudged if not all(Path(video).exists() for video in row["videos"])]
        if unmade:
            _execute(self._config, "make videos", MakeVideos, (self._entrants,), unmade)
        if unjudged:
            _execute(self._config, "judge videos", JudgeVideos, (self._config,), unjudged)


def _missing(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows whose file of scores is not there; of those that make the same one, one."""
    return list({row["path"]: row for row in rows if not Path(row["path"]).exists()}.values())


def _execute(
    config: Config, name: str, stage: type, arguments: tuple[Any, ...], rows: list[dict[str, Any]]
) -> None:
    """Runs a stage on rows, a block each: every actor has work, and each row is reported when it is done."""
    pool = config.evaluate.pool
    [room] = room_for(needs_of(config, "evaluate"))
    context = DataContext.get_current()
    context.enable_progress_bars = context.print_on_execution_start = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    logging.getLogger("ray.data._internal.progress").setLevel(logging.ERROR)  # bars are off
    done = ray.data.from_items(rows, override_num_blocks=len(rows)).map(
        stage,
        fn_constructor_args=arguments,
        compute=ActorPoolStrategy(size=min(room, len(rows))),
        num_cpus=pool.num_cpus,
        num_gpus=pool.num_gpus,
    )
    guard(done)
    for _ in show_progress(done.iter_rows(), name, len(rows), "batches"):
        pass


def _batches(values: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    for start in range(0, len(values), size):
        yield values[start : start + size]


def _digest(identity: object) -> str:
    return hashlib.sha256(json.dumps(identity).encode()).hexdigest()[:24]
