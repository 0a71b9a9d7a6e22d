"""What is denoised: clips with their captions, and what is wrong beside each. Imports no networks."""

import hashlib
import itertools
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

import numpy as np
import pyarrow as pa
from pydantic import BaseModel, ConfigDict

from pipelines.caching.list_files import SUFFIXES, Row, read_rows
from pipelines.caching.manifests import RowError, locate, said_text, sentence_about, tell_unused
from pipelines.caching.video_files import sources_of
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.stores import asking, open_store

if TYPE_CHECKING:
    from prophy.training.cache import PriorCache

logger = logging.getLogger(__name__)

_PAIR_COLUMNS = ("path", "caption", "wrong_caption", "wrong_path", "kind")
_CAPTIONS_PER_PHENOMENON = 12
_STRIDE = 7  # prime to the numbers of held-out combinations: neighbours are of different phenomena
CORRELATED = (("combustion", "explosion"), ("explosion", "refraction"))
"""Phenomena whose semantic weights are compared: related ones, and unrelated ones (the paper's)."""


class Clip(BaseModel):
    """Where frames or latents come from: a simulation, a file, or a sample of the cache.

    Attributes:
        parts: (scene, colour, side) of a simulation.
        seed: draws what `parts` leave open.
        broken: a law that it breaks.
        path: a video file, of which the beginning is taken.
        sample: a sample of the cache, with its caption and its maps.
        version: which state of the file or sample.
    """

    model_config = ConfigDict(frozen=True)

    parts: tuple[tuple[str, str, str], ...] = ()
    seed: tuple[int, ...] = ()
    broken: str | None = None
    path: str | None = None
    sample: str | None = None
    version: str = ""


class Wrong(BaseModel):
    """One thing that is wrong: a caption, or a clip that breaks a law, or the caption of another sample."""

    model_config = ConfigDict(frozen=True)

    measure: Literal["captions", "laws"]
    kind: str
    caption: str | None = None
    clip: Clip | None = None


class Item(BaseModel):
    """A clip with its caption, or a caption alone.

    Attributes:
        unit: what is counted, and whose noise it is: a clip, all clips of a video in the cache, or all rows
            of a clip in a list.
        clip: None where only the semantic router is asked.
        caption: None where the cache has it.
        wrong: what the same noise is denoised by, or in, for comparison.
        is_measured: whether its own loss and routing count.
        phenomenon: what a caption alone is about.
    """

    model_config = ConfigDict(frozen=True)

    unit: str
    clip: Clip | None = None
    caption: str | None = None
    wrong: tuple[Wrong, ...] = ()
    is_measured: bool = False
    phenomenon: str | None = None

    def key(self, settings: object) -> str:
        """A name for all that decides its tensors, with the settings of the encoders."""
        return hashlib.sha256(json.dumps([self.model_dump(), settings]).encode()).hexdigest()[:24]


def find_items(config: Config) -> list[Item]:
    """All that is denoised in a comparison.

    Raises:
        ProPhyError: the frames are not square where the sandbox is asked for, there is no cache, or the list
            of pairs cannot be used.
    """
    wanted = set[str](config.evaluate.measures)
    if not wanted & {"loss", "captions", "laws", "routing"}:
        return []
    items: list[Item] = []
    if config.evaluate.clips == "sandbox":
        items += _sandbox(config, wanted)
    else:
        items += _cached(config, wanted)
    if config.evaluate.clips == "cache" and "laws" in wanted and config.evaluate.pairs is None:
        logger.warning("no law is broken in clips of the cache: the measure laws needs evaluate.pairs")
    if config.evaluate.pairs is not None:
        items += read_pairs(config.evaluate.pairs)
    if not items and config.evaluate.clips == "sandbox":
        raise ProPhyError(
            "there is nothing to denoise: evaluate.clips_per_law is 0, and 'laws' alone is measured; raise "
            "it, or set evaluate.pairs"
        )
    if not items:
        raise ProPhyError(
            "there is nothing to denoise: with evaluate.clips 'cache' the measure 'laws' needs a list of "
            "pairs; set evaluate.pairs, or evaluate.clips to 'sandbox'"
        )
    return items


def _sandbox(config: Config, wanted: set[str]) -> Iterator[Item]:
    from prophy.evaluation.captions import wrong_captions
    from prophy.sandbox import (
        COLOURS,
        FEWEST_FRAMES,
        SCENES,
        SIDES,
        Law,
        Part,
        describe,
        held_out_combinations,
    )

    backbone = config.backbone
    if backbone.height != backbone.width:
        raise ProPhyError(
            f"the sandbox simulates square clips, and the backbone's are {backbone.width}x{backbone.height}; "
            "set evaluate.clips to 'cache'"
        )
    if backbone.num_frames < FEWEST_FRAMES:
        raise ProPhyError(
            "the sandbox simulates what happens, and backbone.num_frames is 1; raise it, or set "
            "evaluate.clips to 'cache'"
        )
    if wanted & {"loss", "captions", "routing"}:
        combinations = held_out_combinations()
        alone = [parts for parts in combinations if len(parts) == 1]
        pairs = [parts for parts in combinations if len(parts) == 2]
        for index in range(config.evaluate.num_clips):
            # Things alone and pairs in turn; each kind spread over all that there are.
            kind, place = (alone, pairs)[index % 2], index // 2
            parts = kind[place * _STRIDE % len(kind)]
            right, wrong = wrong_captions(parts, np.random.default_rng((1, index)))
            things = "one thing" if len(parts) == 1 else "two things"
            yield Item(
                unit=f"clip {index}: {right}",
                clip=_simulated(parts, (1, index)),
                caption=right,
                wrong=tuple(
                    Wrong(measure="captions", kind=f"{changed}, {things}", caption=said)
                    for changed, said in wrong.items()
                    if "captions" in wanted
                ),
                is_measured=bool(wanted & {"loss", "routing"}),
            )
    if "laws" in wanted:
        for number, law in enumerate(Law):
            scenes = [scene for scene in SCENES if law in scene.laws]
            for index in range(config.evaluate.clips_per_law):
                rng = np.random.default_rng((2, number, index))
                colour, side = (str(rng.choice(list(names))) for names in (COLOURS, SIDES))
                parts = (Part(scenes[index % len(scenes)], colour, side),)
                said = str(rng.choice(describe(parts)))
                broken = _simulated(parts, (2, number, index), law)
                yield Item(
                    unit=f"{law} {index}: {said}",
                    clip=_simulated(parts, (2, number, index)),
                    caption=said,
                    wrong=(Wrong(measure="laws", kind=law, clip=broken),),
                )
    if "routing" in wanted:
        for phenomenon in dict.fromkeys(name for pair in CORRELATED for name in pair):
            said_all = [
                said
                for scene in SCENES
                if scene.phenomenon == phenomenon
                for colour in COLOURS
                for side in SIDES
                for said in describe((Part(scene, colour, side),))
            ]
            for said in said_all[:: len(said_all) // _CAPTIONS_PER_PHENOMENON][:_CAPTIONS_PER_PHENOMENON]:
                yield Item(unit=said, caption=said, phenomenon=phenomenon)


def _simulated(parts: Sequence, seed: tuple[int, ...], broken: str | None = None) -> Clip:
    named = tuple((part.scene.name, part.colour, part.side) for part in parts)
    return Clip(parts=named, seed=seed, broken=broken)


def num_held_out_of(config: Config) -> int:
    """`train.num_held_out`; 0 where a run has no training."""
    return config.train.num_held_out if "train" in config.__dict__ else 0


def _cached(config: Config, wanted: set[str]) -> Iterator[Item]:
    if not wanted & {"loss", "captions", "routing"}:
        return
    from pipelines.caching.cache import open_cache
    from pipelines.training.samples import held_out, videos_of

    cache = open_cache(config)()
    cache.tell_staging()
    num_held_out = num_held_out_of(config)
    if not num_held_out:
        logger.warning("train.num_held_out is 0: these clips of the cache may have been trained on")
    chosen = held_out(cache.sample_ids, num_held_out) if num_held_out else cache.sample_ids
    videos = dict(zip(chosen.to_pylist(), videos_of(chosen).to_pylist(), strict=True))
    samples = _in_turn(videos)[: config.evaluate.num_clips]
    logger.info(
        "%d clips of %d videos; those of one video count as one, since they are alike",
        len(samples),
        len({videos[sample] for sample in samples}),
    )
    if len(samples) < config.evaluate.num_clips:
        logger.warning("evaluate.num_clips is %d, and there are %d", config.evaluate.num_clips, len(samples))
    others = _others(cache, samples, videos) if "captions" in wanted else {}
    for sample in samples:
        wrong = [_of_cache(cache, others[sample])] if sample in others else []
        yield Item(
            unit=videos[sample],
            clip=_of_cache(cache, sample),
            wrong=tuple(Wrong(measure="captions", kind="another clip's", clip=clip) for clip in wrong),
            is_measured=bool(wanted & {"loss", "routing"}),
        )


def _others(cache: "PriorCache", samples: Sequence[str], videos: Mapping[str, str]) -> dict[str, str]:
    """For each sample one of its shape, of another video, with another caption; says how many have none.

    Args:
        cache: where they are.
        samples: whose are wanted; those behind each are looked at first.
        videos: the video of each sample that may be taken.
    """
    captions = dict(zip(cache.sample_ids.to_pylist(), cache.captions().to_pylist(), strict=True))
    by_shape = cache.by_shape(pa.array(videos))
    shapes = {sample: shape for shape, ids in by_shape.items() for sample in ids.to_pylist()}
    found = {}
    for index, sample in enumerate(samples):
        for other in (*samples[index + 1 :], *samples[:index], *videos):
            is_alike = captions[other] == captions[sample] or videos[other] == videos[sample]
            if shapes[other] == shapes[sample] and not is_alike:
                found[sample] = other
                break
    if len(found) < len(samples):
        logger.warning(
            "%d of %d clips have no wrong caption: no other video of their shape has another caption",
            len(samples) - len(found),
            len(samples),
        )
    return found


def _in_turn(videos: Mapping[str, str]) -> list[str]:
    """One sample of each video, then another of each, and so on; given the video of each sample."""
    of_videos: dict[str, list[str]] = {}
    for sample, video in videos.items():
        of_videos.setdefault(video, []).append(sample)
    turns = itertools.zip_longest(*of_videos.values())
    return [sample for turn in turns for sample in turn if sample is not None]


def _of_cache(cache: "PriorCache", sample: str) -> Clip:
    return Clip(sample=sample, version=cache.version(sample))


def read_pairs(location: str) -> list[Item]:
    """The pairs of a user's list.

    Raises:
        ProPhyError: it cannot be read, or a row lacks what a pair needs.
    """
    suffix = PurePosixPath(location).suffix.lower()
    if suffix not in SUFFIXES:
        raise ProPhyError(
            f"{location} is no list of pairs; set evaluate.pairs to a file that ends in {', '.join(SUFFIXES)}"
        )
    try:
        store, path = open_store(location)
        with asking(location), store.open(path, "rb") as file:
            content = file.read()
        rows = read_rows(content, suffix, set(_PAIR_COLUMNS))
    except (OSError, ValueError) as error:
        raise ProPhyError(f"{location} cannot be read as {suffix}: {str(error).splitlines()[0]}") from None
    tell_unused(location, rows, _PAIR_COLUMNS)
    items, refused = list[Item](), dict[str, list[tuple[Row, str]]]()
    for row in rows.rows:
        try:
            items.append(_pair(location, row))
        except RowError as error:
            refused.setdefault(str(error), []).append((row, error.detail))
    if refused:
        raise ProPhyError("; ".join(sentence_about(location, *reason) for reason in refused.items()))
    if not items:
        raise ProPhyError(f"{location} lists no pair; give each a row with 'path' and 'caption'")
    clips = len({item.unit for item in items})
    logger.info("%s: %d rows of %d clips; those of one clip count as one", location, len(items), clips)
    return items


def _pair(location: str, row: Row) -> Item:
    """Raises `RowError`."""
    if row.error:
        raise RowError(row.error, row.detail)
    values = {name: text for name in _PAIR_COLUMNS if (text := said_text(row.values, name)) is not None}
    if not {"path", "caption"} <= values.keys():
        raise RowError("it has no 'path' or no 'caption'; give both, and wrong_caption or wrong_path")
    clip, wrong = _file(location, "path", values), []
    if "wrong_caption" in values:
        if values["wrong_caption"].split() == values["caption"].split():
            raise RowError("its wrong_caption is its caption; give it one with something wrong")
        kind = values.get("kind", "your captions")
        wrong.append(Wrong(measure="captions", kind=kind, caption=values["wrong_caption"]))
    if "wrong_path" in values:
        broken = _file(location, "wrong_path", values)
        if broken.path == clip.path:
            raise RowError("its wrong_path is its path; give it a video with something wrong")
        wrong.append(Wrong(measure="laws", kind=values.get("kind", "your videos"), clip=broken))
    if not wrong:
        raise RowError("it names nothing that is wrong; give it wrong_caption or wrong_path")
    # As it is written: in another folder it is the same clip in the same noise.
    unit = values["path"] if "://" in values["path"] else str(PurePosixPath(values["path"]))
    return Item(unit=unit, clip=clip, caption=values["caption"], wrong=tuple(wrong))


def _file(location: str, column: str, values: Mapping[str, str]) -> Clip:
    place = locate(location, column, values[column])
    [source] = sources_of([place]).to_pylist()
    return Clip(path=place, version=f"{source['size']} {source['modified']}")
