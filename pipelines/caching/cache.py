"""`prophy cache`: videos in; priors of the VLM and encodings for the backbone out, by Ray Data.

Two graphs, one after the other: where a video has no caption, the VLM's is what gets encoded. Priors do not
depend on the backbone, so another backbone or resolution adds a folder of encodings and never asks the VLM
again. What is done is read from the files themselves; so the same command resumes, and repeats what belongs
to a video, a caption or labels that have changed.
"""

import itertools
import math
import operator
from functools import partial
from typing import Any, Literal

import pyarrow as pa
import pyarrow.compute as pc
import ray
from ray.data import ActorPoolStrategy, Dataset, ExecutionResources, TaskPoolStrategy

from pipelines.caching.manifests import Input
from pipelines.caching.progress import GraphReport, complete, execute
from pipelines.caching.shapes import check_shapes, misfits
from pipelines.caching.sources import (
    PLANNED,
    changed,
    clips_left,
    find_videos,
    of_videos,
    refusals,
    videos_left,
)
from pipelines.caching.stages import CutVideo, EncodeClip, ExtractPriors, ReadClip
from pipelines.caching.summary import CacheSummary, count_phenomena, print_summary
from pipelines.caching.tables import (
    ATTEMPTS_FOLDER,
    Table,
    WriteRows,
    check_written,
    drop_samples,
    exclusive,
    fingerprint_of,
    read_quarantine,
    update_index,
    write_file,
    writing,
)
from pipelines.caching.tasks import FileTasks
from pipelines.config import BackboneConfig, Config, PoolConfig, how_keys
from pipelines.layout import CacheFolder
from pipelines.resources import SMALL_CPUS, needs_of, room_for
from pipelines.runtime import open_run
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import (
    encoders_fingerprint,
    load_configs,
    pinned_revision,
    takes_images,
    vlm_fingerprint,
)
from prophy.errors import ProPhyError
from prophy.places import Place
from prophy.priors.fingerprint import priors_fingerprint
from prophy.schema import EMPTY_PROMPT, ENCODINGS, INPUT, PRIORS, QUARANTINE, TAXONOMY, CacheInput
from prophy.taxonomy import Taxonomy, load_taxonomy
from prophy.training.cache import PriorCache
from prophy.video import FRAMES_VERSION

_ENCODING_VERSION = 1  # raise it when the same models and settings would give other latents or embeddings
_CLIPS_PER_TASK = 8  # where there are many: Ray's books of a task take time and memory
_BLOCKS = 256, 4096  # least and most blocks of a work list; fewer only where there are fewer clips
_MAX_WAITING = 4  # tasks at each actor: with Ray Data's 2 it waits for the driver whenever clips are short
_MAX_DECODED = 64  # clips between the decoders and each actor that holds models


def run(config: Config) -> CacheSummary:
    """Adds to the cache what it lacks of the input, and prints what it then holds.

    Raises:
        ProPhyError: no video that can be used, another run at work, a cache made with other settings, or a
            node that does not see it.
    """
    _check_clips(config)
    taxonomy = load_taxonomy(config.taxonomy)
    found = find_videos(config.cache.input, taxonomy.names)
    with exclusive(config.cache.folder), FileTasks(config) as tasks:
        open_run(config, "cache")
        summary = _fill(_pinned(config), taxonomy, found, tasks)
    if not summary.num_priors:
        first = "".join(f"; the first: {message}" for message in summary.quarantined[:1])
        raise ProPhyError(
            f"none of the {len(found.videos)} videos in {config.cache.input} can be used{first}"
        )
    print_summary(summary, config.cache.input, _folder(config).quarantine)
    return summary


def priors_table(config: Config, taxonomy: Taxonomy) -> Table:
    """The priors of this VLM and these questions."""
    vlm = config.vlm
    parts = {
        "model": vlm_fingerprint(vlm.pretrained, vlm.revision),
        **vlm.model_dump(include={"dtype", "layers", "heads", "max_new_tokens", "num_frames"}),
        "shapes": [list(shape) for shape in vlm.frame_shapes],
        "video_frames": FRAMES_VERSION,
    }
    settings = parts | {
        "clip_durations_s": _clip_durations(config),
        TAXONOMY: [*taxonomy.names],
        "extraction": priors_fingerprint(taxonomy, **parts),
    }
    return Table(_folder(config).priors, PRIORS, settings, {"vlm": vlm.model_dump(mode="json")})


def encodings_table(config: Config) -> Table:
    """The encodings for this backbone, at this resolution and frame rate."""
    backbone, family = config.backbone, FAMILIES[config.backbone.family]
    _, transformer_config = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    text = family.text(transformer_config, backbone.max_sequence_length)
    images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
    settings = {
        # All that matters of the transformer: others of its shape go on with these encodings.
        "patch_size_t": family.patch_size(transformer_config)[0],
        "text": {name: [*shape] for name, shape in text.items()},
        "encoders": encoders_fingerprint(backbone.family, backbone.pretrained, backbone.revision),
        **({"images": images} if images == "always" else {}),
        **backbone.model_dump(mode="json", exclude={"pretrained", "revision", *how_keys(BackboneConfig)}),
        "clip_durations_s": _clip_durations(config),
        "version": _ENCODING_VERSION,
        "cut_to": [list(shape) for shape in config.vlm.frame_shapes],
        "video_frames": FRAMES_VERSION,
    }
    folder = _folder(config).encodings / fingerprint_of(settings)
    return Table(folder, ENCODINGS, settings, {"backbone": backbone.model_dump(mode="json")})


def quarantine_table(config: Config, table: Table) -> Table:
    """What cannot be used for `table` with these limits; for another table or others it is tried anew."""
    settings = {
        "table": fingerprint_of(table.settings),
        "limits": config.cache.limits.model_dump(mode="json"),
    }
    return Table(_folder(config).quarantine, QUARANTINE, settings, {})


def open_cache(config: Config) -> partial[PriorCache]:
    """What opens the cache for reading, here or in another process."""
    encodings = encodings_table(config).folder
    return partial(PriorCache, _folder(config).priors, encodings, config.cache.max_staged_bytes)


def build_priors_graph(config: Config, taxonomy: Taxonomy, table: Table, work: pa.Table) -> Dataset:
    """Videos to cut (`stages.SOURCES`) -> files of priors; counts of rows come out."""
    cache, vlm = config.cache, config.vlm
    lengths = [(cache.clip_duration_s, vlm.num_frames)]  # whatever the clip's length
    shapes = vlm.frame_shapes
    rows: Dataset = _read(work, cache.extract.size, vlm.num_frames, shapes)
    # Probe, limits, content hash: one row per clip from here on. Waits for the disk more than it computes.
    cut = PoolConfig(size=cache.read.size, num_cpus=SMALL_CPUS)
    rows = rows.map_batches(CutVideo, **_pool(cut, _clip_durations(config), cache.limits))
    # Decode what the VLM sees.
    rows = rows.map_batches(ReadClip, **_pool(cache.read, lengths, shapes, shapes, cache.limits))
    # The costly stage: each actor holds a VLM.
    vlms = _pool(cache.extract, vlm, taxonomy, _attempts(config), batch_size=cache.extract_batch_size)
    rows = rows.map_batches(ExtractPriors, **vlms)
    # Good rows go into a file of the table, errors into one of the quarantine.
    return _write(rows, config, table)


def build_encodings_graph(config: Config, table: Table, work: pa.Table) -> Dataset:
    """Clips with their captions (`stages.CLIPS`) -> files of encodings; counts of rows come out."""
    cache, backbone = config.cache, config.backbone
    rows: Dataset = _read(work, cache.encode.size, backbone.num_frames, backbone.frame_shapes)
    # Decode what the VLM saw, at the backbone's number of frames, in the backbone's shape nearest to that.
    seen = (config.clip_lengths, config.vlm.frame_shapes, backbone.frame_shapes, cache.limits)
    rows = rows.map_batches(ReadClip, **_pool(cache.read, *seen))
    # Each actor holds the VAE and the text encoder.
    encoders = _pool(cache.encode, backbone, table, _attempts(config), batch_size=cache.encode_batch_size)
    rows = rows.map_batches(EncodeClip, **encoders)
    # Good rows go into a file of the table, errors into one of the quarantine.
    return _write(rows, config, table)


def _read(work: pa.Table, num_actors: int, num_frames: int, shapes: list[tuple[int, int]]) -> Dataset:
    """The work list, in blocks so small that rows soon move on; `from_arrow` would start a task for each.

    Decoders would run ahead until their frames fill the share of the object store that Ray Data may use;
    they are held back at `_MAX_DECODED` clips of the largest shape for each actor.
    """
    clip_bytes = num_frames * 3 * max(map(math.prod, shapes))
    limits = ExecutionResources.for_limits(object_store_memory=_MAX_DECODED * num_actors * clip_bytes)
    num_blocks = min(max(len(work) // _CLIPS_PER_TASK, _BLOCKS[0]), _BLOCKS[1], len(work))
    ends = [len(work) * number // num_blocks for number in range(num_blocks + 1)]
    rows = ray.data.from_blocks([work[start:end] for start, end in itertools.pairwise(ends)])
    rows.context.execution_options.resource_limits = limits  # for this graph alone
    return rows


def _write(rows: Dataset, config: Config, table: Table) -> Dataset:
    """The sink, as tasks that wait for the disk more than they compute."""
    cache = config.cache
    return rows.map_batches(
        WriteRows(table, quarantine_table(config, table)),
        batch_size=cache.rows_per_file,
        batch_format="pyarrow",
        num_cpus=SMALL_CPUS,
        compute=TaskPoolStrategy(size=cache.read.size),
    )


def _pool(pool: PoolConfig, *arguments: Any, batch_size: int = 1) -> dict[str, Any]:
    """A pool of actors that take `batch_size` clips at a time, and the arguments of their constructor."""
    return {
        "batch_size": batch_size,
        "batch_format": "pyarrow",
        "compute": ActorPoolStrategy(size=pool.size, max_tasks_in_flight_per_actor=_MAX_WAITING),
        "num_cpus": pool.num_cpus,
        "num_gpus": pool.num_gpus,
        "fn_constructor_args": arguments,
    }


def _folder(config: Config) -> CacheFolder:
    return CacheFolder(config.cache.folder)


def _attempts(config: Config) -> Place:
    return config.cache.folder / ATTEMPTS_FOLDER


def _pinned(config: Config) -> Config:
    """With the commits that the revisions are now: actors load what the fingerprints say, also later on."""
    vlm, backbone = (
        model.model_copy(update={"revision": pinned_revision(model.pretrained, model.revision)})
        for model in (config.vlm, config.backbone)
    )
    return config.model_copy(update={"vlm": vlm, "backbone": backbone})


def _clip_durations(config: Config) -> list[float]:
    return [duration_s for duration_s, _ in config.clip_lengths]


def _check_clips(config: Config) -> None:
    """Whether the VLM and the backbone see the same seconds of a clip, and the backbone can encode them."""
    backbone, clip_duration_s = config.backbone, config.cache.clip_duration_s
    lasts = (backbone.num_frames - 1) / backbone.fps
    if abs(lasts - clip_duration_s) > 0.5 / backbone.fps:
        raise ProPhyError(
            f"cache.clip_duration_s is {clip_duration_s:g}, but backbone.num_frames ({backbone.num_frames}) "
            f"at backbone.fps ({backbone.fps:g}) last {lasts:g} s; make them equal"
        )
    configs = load_configs(backbone.family, backbone.pretrained, backbone.revision)
    time, *space = FAMILIES[backbone.family].shape_multiples(*configs)
    for (_, num_frames), shape in itertools.product(config.clip_lengths, backbone.frame_shapes):
        if (num_frames - 1) % time or any(map(operator.mod, shape, space)):
            raise ProPhyError(
                f"{backbone.pretrained} cannot encode {num_frames} frames of {shape[0]}x{shape[1]}; "
                f"take {time} n + 1 frames, and multiples of {space[0]} and {space[1]} pixels"
            )
    check_shapes(config)


def _fill(config: Config, taxonomy: Taxonomy, found: Input, tasks: FileTasks) -> CacheSummary:
    """Runs both graphs on what is left to do; where that is nothing, Ray is not even started."""

    def index_of(table: Table, columns: list[str]) -> pa.Table:
        return update_index(table, columns, read_parts=tasks)

    videos = found.videos
    current = CacheInput(config.cache.input, videos["source"])
    priors, encodings = priors_table(config, taxonomy), encodings_table(config)
    # Workers make no folder: on a node that does not see the cache it would be its own.
    written_to = [priors.folder, encodings.folder, _folder(config).quarantine]
    with writing(config.cache.folder):
        for folder in (*written_to, _attempts(config)):
            folder.mkdir(parents=True, exist_ok=True)
    drop_samples(priors, changed(index_of(priors, PLANNED), videos, ("caption", "labels")))
    drop_samples(encodings, changed(index_of(encodings, ["sample_id", "source"]), videos))
    # Before any work: training knows these videos by it, also where this run is killed.
    input_rows = current.to_table()
    write_file(encodings.folder, input_rows, {**encodings.footer, **input_rows.schema.metadata}, name=INPUT)
    if not (encodings.folder / EMPTY_PROMPT).exists():  # lost: encoding any clip brings it back
        samples = current.samples(index_of(priors, PLANNED))
        is_encoded = pc.is_in(samples, index_of(encodings, ["sample_id"])["sample_id"])
        drop_samples(encodings, samples.filter(is_encoded)[:1])

    def refused(table: Table) -> pa.Table:
        return read_quarantine(_folder(config).quarantine, quarantine_table(config, table).settings)

    def left() -> tuple[pa.Table, pa.Table]:
        index, encoded = index_of(priors, PLANNED), index_of(encodings, ["sample_id", "caption"])
        return (
            videos_left(videos, index, refused(priors), _clip_durations(config)),
            clips_left(videos, index, encoded, refused(encodings)),
        )

    def run_graph(graph: Dataset, name: str, work: pa.Table, workers: dict[str, int]) -> GraphReport:
        report = execute(graph, name, len(work), workers)
        check_written(report.files, written_to)
        return report

    def extract(work: pa.Table) -> GraphReport:
        fitting, workers = _fit_pools(config, "priors", "extract")
        return run_graph(build_priors_graph(fitting, taxonomy, priors, work), "priors", work, workers)

    def encode(work: pa.Table) -> GraphReport:
        drop_samples(encodings, work["sample_id"])  # those of another caption
        fitting, workers = _fit_pools(config, "encodings", "encode")
        return run_graph(build_encodings_graph(fitting, encodings, work), "encodings", work, workers)

    added_priors = added_encodings = GraphReport()
    if any(map(len, left())):
        tasks.start_ray()
        added_priors = complete(lambda: left()[0], extract)
        added_encodings = complete(lambda: left()[1], encode)
    index = index_of(priors, [*PLANNED, "unparsed", "phenomena"])
    clips = index.filter(pc.is_in(index["sample_id"], current.samples(index)))
    cut, stretched = misfits(clips, config)
    encoded, cached, counted = index_of(encodings, ["sample_id"]), _uris(index), _uris(clips)
    return CacheSummary(
        num_videos=len(videos),
        num_priors=len(clips),
        num_encodings=pc.sum(pc.is_in(clips["sample_id"], encoded["sample_id"])).as_py() or 0,
        num_copies=len(_uris(of_videos(index, videos))) - len(counted),
        num_left_out=pc.sum(pc.invert(pc.is_in(cached, current.uris))).as_py() or 0,
        quarantined=found.refused
        + refusals(pa.concat_tables(map(refused, (priors, encodings))), videos, left()),
        phenomena=count_phenomena(clips, taxonomy.names),
        branch_of=taxonomy.branch_of,
        unparsed=pc.sum(pc.greater(pc.list_value_length(clips["unparsed"]), 0)).as_py() or 0,
        cut=cut,
        stretched=stretched,
        added_priors=added_priors,
        added_encodings=added_encodings,
    )


def _uris(rows: pa.Table) -> pa.Array:
    """Names of the videos that the rows are of, each once."""
    return pc.struct_field(rows["source"], "uri").unique()


def _fit_pools(
    config: Config, table: Literal["priors", "encodings"], model: str
) -> tuple[Config, dict[str, int]]:
    """Cuts the pools to the room that the cluster has.

    Args:
        config: the run.
        table: "priors" or "encodings".
        model: the pool of the actors that hold its models, "extract" or "encode".

    Returns:
        The configuration with these pools, and the size of each stage's by the name of its callable.

    Raises:
        ProPhyError: there is no room for one of each.
    """
    sizes = dict(zip(("read", model), room_for(needs_of(config, table)), strict=True))
    pools = {name: getattr(config.cache, name).model_copy(update={"size": sizes[name]}) for name in sizes}
    workers = {stage.__name__: sizes["read"] for stage in (CutVideo, ReadClip, WriteRows)}
    workers |= {stage.__name__: sizes[model] for stage in (ExtractPriors, EncodeClip)}
    return config.model_copy(update={"cache": config.cache.model_copy(update=pools)}), workers
