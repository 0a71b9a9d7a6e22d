"""Claim: what the driver does before any work grows with the rows and no faster, up to a million clips.

Each step runs in a process of its own, on made-up indices with one clip of each video, as they lie on the
disk: CPU seconds, the peak of its memory with the libraries in it, and the exponent of the growth since the
size before (1 is linear). "All" and "none" is what is left to do. Files of 32 rows are written, indexed and
verified where there are at most 100,000 clips: by tasks of Ray, whose own seconds and bytes are not in it.

    python tests/benchmarks/growth.py                     # 10,000 and 100,000 clips
    python tests/benchmarks/growth.py --clips 10000 100000 1000000
"""

import argparse
import json
import math
import multiprocessing
import pickle
import re
import sys
import tempfile
import time
from collections.abc import Callable
from functools import cached_property, partial
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as csv
import pyarrow.parquet as pq
from rich import box
from rich.console import Console
from rich.table import Table as Printed

from pipelines.caching import tables
from pipelines.caching.manifests import VIDEOS
from pipelines.caching.parts import ReadParts
from pipelines.caching.sources import PLANNED, changed, clips_left, find_videos, refusals, videos_left
from pipelines.caching.tasks import FileTasks
from pipelines.caching.verify import find_damage
from pipelines.config import load_config
from pipelines.training.samples import describe_samples
from prophy.schema import (
    ENCODINGS,
    INDEX,
    INPUT,
    PRIORS,
    QUARANTINE,
    SOURCE,
    TAXONOMY,
    VERSION_FOOTER,
    CacheInput,
)
from prophy.training.cache import PriorCache
from prophy.training.data import BatchPlan

SHAPE, ROWS_PER_FILE, MOST_FILES = [16, 5, 16, 16], 32, 100_000
SETTINGS = {TAXONOMY: ["collision", "melting"]}
FILES = pa.schema([field for field in PRIORS if field.name in ("sample_id", "source", "caption")])


def table_of(folder: Path, name: str, schema: pa.Schema) -> tables.Table:
    return tables.Table(folder / name, schema, SETTINGS, {})


def write(folder: Path, num_clips: int) -> None:
    """The indices of a cache that has a clip of each video, and a table of files without an index."""
    numbers = np.arange(num_clips)
    hashes = pa.array([f"{number * 0x9E3779B97F4A7C15 % 2**64:016x}" * 4 for number in numbers.tolist()])
    uris = pa.array([f"s3://bucket/{number // 1000:05d}/{number:08d}.mp4" for number in numbers.tolist()])
    sizes, modified = pa.array(numbers + 1_000_000), pa.array(numbers + 1.5)
    source = pa.StructArray.from_arrays([uris, sizes, modified], fields=list(SOURCE))
    caption = pa.array([f"a red ball falls, take {number}" for number in numbers.tolist()])
    same = {
        "start_s": 0.0, "end_s": 2.0, "fps": 8.0, "num_frames": 17, "height": 64, "width": 64,
        "labels": None, "vlm_caption": "", "unparsed": [], "phenomena": [1.0, 0.0], "map_phenomena": [0],
        "maps_shape": [2, 4, 4, 4], "slice_times": [], "latents_shape": SHAPE, "latents_dtype": "bfloat16",
    }  # fmt: skip
    own = {
        "sample_id": pa.array([f"{key[:32]}-0000000-0002000" for key in hashes.to_pylist()]),
        "source": source,
        "content_hash": hashes,
        "caption": caption,
        "file": pa.array([f"{number // ROWS_PER_FILE:064x}.parquet" for number in numbers.tolist()]),
        "row_group": pa.array(numbers % ROWS_PER_FILE, pa.int32()),
    }
    for name, schema in (("priors", PRIORS), ("encodings", ENCODINGS)):
        table = table_of(folder, name, schema)
        table.folder.mkdir(parents=True, exist_ok=True)
        index = tables._index_schema(table)
        columns = [
            own[field.name].cast(field.type)
            if field.name in own
            else pa.array([same[field.name]], field.type).take(pa.array(numbers * 0))
            for field in index
        ]
        rows = pa.table(columns, schema=index).sort_by("sample_id")
        tables.write_file(table.folder, rows, table.footer, name=INDEX)
        for file in rows["file"].unique().to_pylist():
            (table.folder / file).touch()  # an index is not read further where it names one that is gone
    rows = CacheInput("list", source).to_table()
    tables.write_file(folder / "encodings", rows, VERSION_FOOTER | rows.schema.metadata, name=INPUT)
    listed = pa.table({"path": pc.replace_substring(uris, "s3://bucket", str(folder)), "caption": caption})
    pq.write_table(listed, folder / "list.parquet")
    csv.write_csv(listed, folder / "list.csv")
    with (folder / "list.jsonl").open("w") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in listed.to_pylist())
    if num_clips <= MOST_FILES:
        files = table_of(folder, "files", FILES)
        files.folder.mkdir(parents=True, exist_ok=True)
        for start in range(0, num_clips, ROWS_PER_FILE):
            part = {name: own[name][start : start + ROWS_PER_FILE] for name in FILES.names}
            tables.write_file(files.folder, pa.table(part, schema=FILES), files.footer, row_group_size=1)


class Steps:
    """What is measured, and what it needs, which is read before."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = load_config("tiny", [f"run_dir={folder}", "train.num_held_out=0"])
        self.nothing = QUARANTINE.empty_table()

    @cached_property
    def videos(self) -> pa.Table:
        sources = CacheInput.read(self.folder / "encodings").sources
        unsaid = (pa.nulls(len(sources), VIDEOS.field(name).type) for name in ("caption", "labels"))
        return pa.table([sources, *unsaid], schema=VIDEOS)

    @cached_property
    def priors(self) -> pa.Table:
        return tables.update_index(table_of(self.folder, "priors", PRIORS), PLANNED)

    @cached_property
    def encodings(self) -> pa.Table:
        return tables.update_index(table_of(self.folder, "encodings", ENCODINGS), ["sample_id", "caption"])

    @cached_property
    def cache(self) -> PriorCache:
        return PriorCache(self.folder / "priors", self.folder / "encodings")

    @cached_property
    def plan(self) -> BatchPlan:
        return BatchPlan(self.cache.by_shape(self.cache.sample_ids), 32, seed=0)

    def read_list(self, name: str) -> pa.Table:
        return find_videos(str(self.folder / name), SETTINGS[TAXONOMY]).videos

    def share_files(self, step: Callable[[ReadParts], None]) -> None:
        with FileTasks(self.config) as read_parts:
            step(read_parts)

    def index_files(self, read_parts: ReadParts) -> None:
        tables.update_index(table_of(self.folder, "files", FILES), anew=True, read_parts=read_parts)

    def verify_files(self, read_parts: ReadParts) -> None:
        if find_damage(self.folder / "files", FILES, read_parts):
            raise SystemExit("files that were just written are damaged")

    def steps(self) -> dict[str, tuple[tuple[str, ...], Callable[[], object]]]:
        """By name: what it needs, and the step itself."""
        empty = {"priors": PRIORS.empty_table(), "encodings": ENCODINGS.empty_table()}
        lengths = self.config.clip_lengths
        durations = [duration_s for duration_s, _ in lengths]
        return {
            "a list in Parquet": ((), partial(self.read_list, "list.parquet")),
            "a list in CSV": ((), partial(self.read_list, "list.csv")),
            "a list in JSON Lines": ((), partial(self.read_list, "list.jsonl")),
            "read the index": ((), lambda: self.priors),
            "videos left, all": (
                ("videos",),
                lambda: videos_left(self.videos, empty["priors"], self.nothing, durations),
            ),
            "videos left, none": (
                ("videos", "priors"),
                lambda: videos_left(self.videos, self.priors, self.nothing, durations),
            ),
            "clips left, all": (
                ("videos", "priors"),
                lambda: clips_left(self.videos, self.priors, empty["encodings"], self.nothing),
            ),
            "clips left, none": (
                ("videos", "priors", "encodings"),
                lambda: clips_left(self.videos, self.priors, self.encodings, self.nothing),
            ),
            "changed videos": (("videos", "priors"), lambda: changed(self.priors, self.videos)),
            "refusals": (("videos",), lambda: refusals(self.nothing, self.videos, [])),
            "open the cache": ((), lambda: self.cache),
            "describe samples": (("cache",), lambda: describe_samples(self.config, self.cache)),
            "plan all steps": (("cache",), lambda: self.plan),
            "plan a step": (("plan",), lambda: self.plan(1000)),
            "send to a worker": (("cache",), lambda: pickle.loads(pickle.dumps(self.cache))),
            "index files": ((), partial(self.share_files, self.index_files)),
            "verify files": ((), partial(self.share_files, self.verify_files)),
        }


def measure(folder: Path, name: str, results: "multiprocessing.SimpleQueue[tuple[float, int]]") -> None:
    """CPU seconds of a step, and the bytes that its process took at most."""
    steps = Steps(folder)
    needs, step = steps.steps()[name]
    for need in needs:
        getattr(steps, need)
    begun = time.process_time()
    step()
    seconds = time.process_time() - begun
    # Not `ru_maxrss`, which begins with what the process had that started this one.
    [peak] = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    results.put((seconds, 1024 * int(peak)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--clips", type=int, nargs="+", default=[10_000, 100_000])
    sizes = parser.parse_args().clips
    spawn = multiprocessing.get_context("spawn")
    found: dict[str, list[tuple[float, int] | None]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for size in sizes:
            folder = Path(scratch, str(size))
            write(folder, size)
            for name in Steps(folder).steps():
                if name.endswith(" files") and size > MOST_FILES:
                    found.setdefault(name, []).append(None)
                    continue
                results = spawn.SimpleQueue()
                process = spawn.Process(target=measure, args=(folder, name, results))
                process.start()
                process.join()
                if process.exitcode:
                    raise SystemExit(f"{name} failed with {size:,} clips")
                found.setdefault(name, []).append(results.get())
                print(f"{size:,} clips, {name}: {found[name][-1]}", file=sys.stderr, flush=True)
    columns = [f"{unit}\n{size:,}" for size in sizes for unit in ("CPU s", "GB")]
    printed = Printed("", *columns, "exponent", title="What grows with the clips", box=box.SIMPLE, padding=0)
    for name, values in found.items():
        cells = [cell for each in values for cell in _cells(each)]
        known = [(size, each[0]) for size, each in zip(sizes, values, strict=True) if each]
        printed.add_row(name, *cells, _exponent(known))
    Console().print(printed)


def _cells(value: tuple[float, int] | None) -> list[str]:
    if value is None:
        return ["", ""]
    return [f"{value[0]:.2f}", f"{value[1] / 1e9:.2f}"]


def _exponent(known: list[tuple[int, float]]) -> str:
    """The exponent of the growth between the two largest sizes."""
    if len(known) < 2:
        return ""
    (size, seconds), (larger, more) = known[-2:]
    return f"{math.log(more / seconds) / math.log(larger / size):.2f}"


if __name__ == "__main__":
    main()
