"""`prophy cache inspect` and `prophy cache explain`: what a cache holds, and where a VLM looks, drawn."""

import logging
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from PIL import Image, ImageDraw
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from pipelines.caching.cache import encodings_table
from pipelines.caching.stages import decoder, prior_extractor
from pipelines.caching.summary import count_phenomena
from pipelines.caching.tables import file_names, read_quarantine
from pipelines.caching.video_files import LocalFiles
from pipelines.config import Config
from pipelines.layout import CacheFolder
from pipelines.pictures import check_picture, save_picture
from prophy.errors import ProPhyError
from prophy.evaluation.pictures import heat_overlay
from prophy.places import Place, sizes
from prophy.schema import INDEX, CacheInput, open_file, read_phenomena
from prophy.sheets import evenly, stacked
from prophy.taxonomy import from_multi_hot, load_taxonomy, parse_phenomena
from prophy.video import VideoError, nearest_shape

logger = logging.getLogger(__name__)

_COLUMNS = 6  # frames of a clip, from its first to its last
_HEIGHT = 96  # height of a frame, in pixels
_LABEL_WIDTH = 180
_LINE = 14  # height of a line of text, in pixels


def inspect(config: Config, num_clips: int, sheet: Path) -> None:
    """Prints what the cache holds, and draws some of its clips: frames, caption, phenomena, maps.

    Raises:
        ProPhyError: there is no cache, it is damaged, or the picture cannot be written.
    """
    check_picture(sheet)
    cache = CacheFolder(config.cache.folder)
    priors, encodings = cache.priors, encodings_table(config).folder
    if not (priors / INDEX).is_file():
        raise ProPhyError(f"no cache in {config.cache.output}; set cache.output, or run `prophy cache`")
    with open_file(priors / INDEX) as file:
        stored = file.read()
    current = CacheInput.read(encodings)
    index = stored.filter(pc.is_in(stored["sample_id"], current.samples(stored)))
    if not len(index):
        raise ProPhyError(f"no video of {current.location} is in {priors}; run `prophy cache`")
    console = Console()
    grid = Grid("table", "samples", "files", "MB", title=escape(str(config.cache.output)))
    for name, folder in (("priors", priors), ("encodings of this backbone", encodings)):
        samples = 0
        if (folder / INDEX).is_file():
            with open_file(folder / INDEX) as file:
                samples = file.metadata.num_rows
        files, of_files = file_names(folder), sizes(folder)  # `prophy cache` may be at work between
        num_bytes = [of_files[file] for file in files if file in of_files]
        grid.add_row(name, str(samples), str(len(num_bytes)), f"{sum(num_bytes) / 1e6:.1f}")
    console.print(grid)
    cached, counted = (pc.struct_field(rows["source"], "uri").unique() for rows in (stored, index))
    lines = [
        f"of {current.location}, the input of the last run: {len(counted)} videos, {len(index)} clips of "
        f"{pc.sum(pc.subtract(index['end_s'], index['start_s'])).as_py():.0f} s",
        f"{len(cached.filter(pc.invert(pc.is_in(cached, current.uris))))} videos that are not in it; "
        f"training leaves them out, `prophy cache prune` removes them",
        f"{index['caption'].null_count} clips without a given caption have the VLM's",
        f"{len(index.filter(pc.list_value_length(index['unparsed']).cast(pa.bool_())))} clips with an answer "
        f"that was not understood in full",
    ]
    names = read_phenomena(priors)
    lines += [f"{name:>28} {count:6d}" for name, count in count_phenomena(index, names).items()]
    refused = read_quarantine(cache.quarantine).to_pylist()
    kinds = Counter(f"{row['error_type']} in {row['stage']}" for row in refused)
    lines += [f"quarantined: {count} by {kind}" for kind, count in kinds.items()]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    places = np.linspace(0, len(index) - 1, min(num_clips, len(index))).round().astype(int)
    chosen = index.take(places).to_pylist()
    _save([strip for row in chosen for strip in _cached_clip(config, priors, names, row)], sheet)


def explain(config: Config, clip: str, phenomena: list[str], picture: Path) -> None:
    """Asks the VLM about the first clip of a video, and draws where it looks, layer by layer.

    Args:
        config: says which VLM, and how long a clip is.
        clip: path or URL of a video.
        phenomena: what to ask for; nothing lets the VLM name them.
        picture: the file to write.

    Raises:
        ProPhyError: no such video or VLM, a name that is no phenomenon, or the picture cannot be written.
    """
    check_picture(picture)
    vlm, limits = config.vlm, config.cache.limits
    taxonomy = load_taxonomy(config.taxonomy)
    given = parse_phenomena(phenomena, taxonomy.names) or None
    with _local(config, clip) as path:
        info = decoder(limits).probe(path)
    duration_s = min(config.cache.clip_duration_s, info.duration_s)
    if duration_s < config.cache.clip_duration_s:
        logger.info("%s lasts %.2f s, less than a clip; the VLM is shown all of it", clip, duration_s)
    frames = _read_frames(config, clip, 0.0, duration_s, (info.height, info.width))
    from prophy.priors.extractor import Clip
    from prophy.priors.questionnaire import BACKGROUND, describe_named

    extractor = prior_extractor(vlm, taxonomy)
    fps = (vlm.num_frames - 1) / duration_s
    [priors] = extractor([Clip(frames, fps, given)])
    questions = [*describe_named(taxonomy, priors.phenomena), BACKGROUND]
    video = extractor.vlm.watch([frames], [fps])
    asked = [[question.text for question in questions]]
    by_layer = [
        extractor.vlm.answer(video, asked, vlm.max_new_tokens, [layer], vlm.heads)[0]
        for layer in range(extractor.vlm.num_layers)
    ]
    strips = [_text(f"{clip}: {priors.vlm_caption}"), _strip(frames, "frames")]
    for number, question in enumerate(questions):
        strips.append(_text(f"{question.id}: {priors.answers[question.id]}"))
        strips.append(_strip(frames, "as configured", priors.maps[number]))
        for layer, answers in enumerate(by_layer):
            strips.append(_strip(frames, f"layer {layer}", answers[number].attention.numpy()))
    _save(strips, picture)


def _cached_clip(
    config: Config, priors: Place, phenomena: Sequence[str], entry: dict[str, Any]
) -> list[Image.Image]:
    """A row of the priors as it is stored, over the frames of its video."""
    with open_file(priors / entry["file"]) as file:
        [row] = file.read_row_group(entry["row_group"]).to_pylist()
    uri = row["source"]["uri"]
    labels = ", ".join(from_multi_hot(row["phenomena"], phenomena)) or "no phenomenon"
    caption = row["caption"] or f"{row['vlm_caption']} (by the VLM)"
    title = _text(f"{uri.rpartition('/')[2]} from {row['start_s']:g} s: {caption} [{labels}]")
    try:
        picture = row["height"], row["width"]
        frames = _read_frames(config, uri, row["start_s"], row["end_s"], picture)
    except ProPhyError as error:
        return [title, _text(str(error))]
    maps = np.float32(row["maps"]).reshape(row["maps_shape"])
    names = [*(phenomena[number] for number in row["map_phenomena"]), "background"]
    strips = [_strip(frames, name, heat) for name, heat in zip(names, maps, strict=True)]
    return [title, _strip(frames, "frames"), *strips]


def _read_frames(
    config: Config, uri: str, start_s: float, end_s: float, picture: tuple[int, int]
) -> np.ndarray:
    """What the VLM sees of a clip, uint8 `[T, H, W, 3]`; `picture` is the video's height and width."""
    vlm = config.vlm
    seen = nearest_shape(*picture, vlm.frame_shapes)
    with _local(config, uri) as path:
        return decoder(config.cache.limits).read_frames(
            path, start_s, end_s, vlm.num_frames, *seen, aspect_ratio=seen[1] / seen[0]
        )


@contextmanager
def _local(config: Config, uri: str) -> Iterator[str]:
    """A video as a local file."""
    try:
        with LocalFiles(config.cache.limits.max_bytes).open(uri) as path:
            yield path
    except OSError as error:
        raise VideoError(f"{uri} cannot be opened ({error.strerror or error})") from None


def _strip(frames: np.ndarray, label: str, heat: np.ndarray | None = None) -> Image.Image:
    """Some frames side by side, under a map if there is one, with a label before them."""
    pictures = frames if heat is None else heat_overlay(frames, heat, "slices")
    width = round(_HEIGHT * frames.shape[2] / frames.shape[1])
    strip = Image.new("RGB", (_LABEL_WIDTH + _COLUMNS * width, _HEIGHT))
    ImageDraw.Draw(strip).text((4, _HEIGHT // 2 - 6), label, fill="white")
    for place, picture in enumerate(evenly(pictures, _COLUMNS)):
        strip.paste(Image.fromarray(picture).resize((width, _HEIGHT)), (_LABEL_WIDTH + place * width, 0))
    return strip


def _text(text: str) -> Image.Image:
    lines = textwrap.wrap(text, 110)
    picture = Image.new("RGB", (_LABEL_WIDTH + _COLUMNS * _HEIGHT, _LINE * len(lines) + 8), "#334")
    ImageDraw.Draw(picture).multiline_text((4, 2), "\n".join(lines), fill="white", spacing=2)
    return picture


def _save(strips: list[Image.Image], path: Path) -> None:
    """Stacks the strips into one picture."""
    save_picture(stacked(strips), path)
    logger.info("the picture is %s", path.resolve())
