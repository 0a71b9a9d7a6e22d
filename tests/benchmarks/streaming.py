"""Claim: the cache keeps its costly stage busy, spills nothing, and needs no more memory for more clips.

Caches copies of simulated clips with the embedded VLM and backbone, as users do.
`efficiency` is (clips / rate of the costly stage alone) / (time from the slowest stage's first task to the
last of all). The costly stage holds a model, and should be the slowest; alone is in this process, without
Ray, before the run: other work on the machine makes it meaningless.
`utilisation` is the share of that time in which the costly stage's workers computed. The slope is that of
the memory of the driver, of all of Ray's processes and of the object store, over the clips that are done,
after the first fifth, process by process, with the standard error of the sum (NaN: too short to say). What a
batch needs while it is computed swings by 10 % of a process, so that it takes 4,000 clips to see 1 MB per 100
clips. Threads are the configuration's: leave OMP_NUM_THREADS unset, which Ray's workers would obey.

    python tests/benchmarks/streaming.py                  # 60 clips
    python tests/benchmarks/streaming.py --clips 4000 --minimal
"""

import argparse
import itertools
import json
import os
import shutil
import tempfile
import threading
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from rich.console import Console
from rich.table import Table
from transformers import AutoTokenizer, Qwen2_5_VLForConditionalGeneration, Qwen2VLImageProcessorPil

from pipelines.caching import cache
from pipelines.caching.progress import GraphReport
from pipelines.caching.sources import find_videos, videos_left
from pipelines.caching.stages import CutVideo, EncodeClip, ExtractPriors, ReadClip
from pipelines.config import Config, load_config
from pipelines.runtime import ray_session
from prophy.sandbox import simulate_clip
from prophy.schema import PRIORS, QUARANTINE
from prophy.taxonomy import load_taxonomy
from prophy.tiny.vlm import MERGE_SIZE, PATCH_SIZE, TEMPORAL_PATCH_SIZE, build_config, build_tokenizer
from prophy.video import write_video

WISA = load_taxonomy("wisa")
PHENOMENA = WISA.names
DIFFERENT_CLIPS = 8
SAMPLE_CLIPS = 32  # for the rate of a stage alone
SAMPLE_EVERY_S = 0.5
WINDOWS = 20


def write_minimal_vlm(folder: Path) -> None:
    """The embedded VLM's files with one layer of width 32 in each tower."""
    config: Any = build_config(build_tokenizer(WISA))
    text, vision = config.text_config, config.vision_config
    text.hidden_size, text.intermediate_size, text.num_hidden_layers = 32, 32, 1
    text.num_attention_heads = text.num_key_value_heads = 2
    text.layer_types = text.layer_types[:1]
    text.rope_parameters["mrope_section"] = [2, 3, 3]
    vision.depth, vision.hidden_size, vision.intermediate_size, vision.num_heads = 1, 32, 32, 2
    vision.out_hidden_size, vision.fullatt_block_indexes = 32, [0]
    Qwen2_5_VLForConditionalGeneration(config).save_pretrained(folder)
    build_tokenizer(WISA).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder)
    sizes: dict[str, Any] = {
        "patch_size": PATCH_SIZE,
        "temporal_patch_size": TEMPORAL_PATCH_SIZE,
        "merge_size": MERGE_SIZE,
    }
    Qwen2VLImageProcessorPil(**sizes).save_pretrained(folder)


def write_clips(folder: Path, count: int) -> None:
    """Some simulated clips under many names."""
    folder.mkdir()
    for number in range(count):
        path = folder / f"{number:06d}.mp4"
        if number < DIFFERENT_CLIPS:
            write_video(path, simulate_clip(number, num_frames=17, fps=8, size=64).frames, 8)
        else:
            os.link(folder / f"{number % DIFFERENT_CLIPS:06d}.mp4", path)


def seconds_alone(config: Config, folder: Path) -> dict[str, float]:
    """Seconds per clip of the two stages that hold models, each without Ray and with its own threads."""
    limits, vlm, backbone = config.cache.limits, config.vlm, config.backbone
    durations_s = [config.cache.clip_duration_s]
    nothing = PRIORS.empty_table(), QUARANTINE.empty_table()
    videos = videos_left(
        find_videos(config.cache.input, PHENOMENA).videos[:SAMPLE_CLIPS], *nothing, durations_s
    )
    clips = pa.concat_tables(CutVideo(durations_s, limits)(videos))
    table = cache.encodings_table(config)
    table = type(table)(folder / "encodings", table.schema, table.settings, table.provenance)
    for place in (table.folder, folder / "attempts"):
        place.mkdir(parents=True, exist_ok=True)
    stages: dict[str, tuple[Callable[[pa.Table], pa.Table], ReadClip, int, float]] = {
        "ExtractPriors": (
            ExtractPriors(vlm, WISA, folder / "attempts"),
            ReadClip([(durations_s[0], vlm.num_frames)], vlm.frame_shapes, vlm.frame_shapes, limits),
            1,
            config.cache.extract.num_cpus,
        ),
        "EncodeClip": (
            EncodeClip(backbone, table, folder / "attempts"),
            ReadClip(config.clip_lengths, vlm.frame_shapes, backbone.frame_shapes, limits),
            config.cache.encode_batch_size,
            config.cache.encode.num_cpus,
        ),
    }
    alone = {}
    for name, (stage, reader, batch_size, threads) in stages.items():
        torch.set_num_threads(int(threads))
        captions = pa.array(["a ball falls"] * len(clips))
        frames = reader(clips.set_column(clips.schema.get_field_index("caption"), "caption", captions))
        batches = [frames.slice(start, batch_size) for start in range(0, len(frames), batch_size)]
        stage(batches[0])
        start = time.perf_counter()
        for batch in batches:
            stage(batch)
        alone[name] = (time.perf_counter() - start) / len(clips)
    return alone


class MemoryLog(threading.Thread):
    """Memory of this process, of each below it, and of the object store; and how many clips are in files."""

    def __init__(self, output: Path) -> None:
        super().__init__(daemon=True)
        self.output = output
        self.samples: dict[str, dict[str, list[tuple[int, int, float]]]] = {  # number, clips, MB
            "priors": defaultdict(list),
            "encodings": defaultdict(list),
        }

    def run(self) -> None:
        driver = psutil.Process()
        for number in itertools.count():
            done = {
                name: sum(pq.read_metadata(file).num_rows for file in self.output.glob(place))
                for name, place in (
                    ("priors", "priors/*[0-9a-f].parquet"),
                    ("encodings", "encodings/*/*[0-9a-f].parquet"),
                )
            }
            graph = "encodings" if done["encodings"] else "priors"
            memory = {"objects": shutil.disk_usage("/dev/shm").used}  # where Ray keeps them
            for process in (driver, *driver.children(recursive=True)):
                with suppress(psutil.Error):  # it has just ended
                    info = process.memory_info()
                    memory[f"{process.name()} {process.pid}"] = info.rss - info.shared
            for part, size in memory.items():
                self.samples[graph][part].append((number, done[graph], size / 2**20))
            time.sleep(SAMPLE_EVERY_S)

    def slopes_mb_per_100_clips(self, graph: str, num_clips: int) -> tuple[dict[str, float], float, float]:
        """The slope of each part, the steepest first; and their sum with its standard error.

        By part, since a process ends when its stage does, and then frees all it had. What lives for less
        than `WINDOWS` samples has no slope; where nothing has one, the sum is NaN.
        """
        slopes: dict[str, float] = {}
        residuals: dict[tuple[int, int], float] = defaultdict(float)
        for part, samples in self.samples[graph].items():
            settled = [sample for sample in samples if num_clips / 5 <= sample[1] < num_clips]
            if len(settled) >= WINDOWS:
                _, clips, mb = np.transpose(settled)
                line = np.polyfit(clips, mb, 1)
                slopes[part] = 100 * float(line[0])
                for (number, done, _), residual in zip(settled, mb - np.polyval(line, clips), strict=True):
                    residuals[number, done] += residual
        if not slopes:
            return {}, float("nan"), float("nan")
        steepest = dict(sorted(slopes.items(), key=lambda item: -item[1]))
        return steepest, sum(slopes.values()), 100 * standard_error(residuals)


def standard_error(residuals: dict[tuple[int, int], float]) -> float:
    """The standard error of a line's slope, by what it leaves over at (sample, clips).

    Neighbouring samples depend on each other: windows of them are taken, and what these still do is allowed
    for, as in a process of first order.
    """
    rows = np.array([(clips, residual) for (_, clips), residual in sorted(residuals.items())])
    clips, rest = np.transpose([window.mean(axis=0) for window in np.array_split(rows, WINDOWS)])
    dependence = max(0.0, np.corrcoef(rest[:-1], rest[1:])[0, 1])
    independent = np.sqrt((rest**2).sum() / (WINDOWS - 2) / ((clips - clips.mean()) ** 2).sum())
    return float(independent * np.sqrt((1 + dependence) / (1 - dependence)))


def describe(report: GraphReport, alone: dict[str, float]) -> dict[str, float | str]:
    [stage] = [stage for stage in report.stages if stage.name in alone]
    seconds = alone[stage.name] * report.written / stage.workers
    return {
        "slowest": report.busiest.name,
        "clips": report.written,
        "span_s": report.span_s,
        "efficiency": seconds / report.span_s,
        "utilisation": report.utilisation(stage),
        "spilled": report.spilled_bytes,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--clips", type=int, default=60)
    parser.add_argument(
        "--minimal", action="store_true", help="a VLM of one layer and width 32, for many clips"
    )
    parser.add_argument("--save", type=Path, help="a JSON file for the results")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="prophy-") as scratch:
        folder = Path(scratch)
        write_clips(folder / "clips", options.clips)
        overrides = {"run_dir": folder / "run"}
        if options.minimal:
            write_minimal_vlm(folder / "vlm")
            overrides["vlm.pretrained"] = folder / "vlm"
        config = load_config("tiny", [f"{key}={value}" for key, value in overrides.items()])
        config = config.model_copy(
            update={"cache": config.cache.model_copy(update={"input": str(folder / "clips")})}
        )
        alone = seconds_alone(config, folder)
        memory = MemoryLog(folder / "run" / "cache")
        with ray_session(config):
            memory.start()
            summary = cache.run(config)
        graphs = {"priors": summary.added_priors, "encodings": summary.added_encodings}
        slopes = {name: memory.slopes_mb_per_100_clips(name, options.clips) for name in graphs}
        results = {
            name: describe(report, alone)
            | {
                "memory_slope_mb_per_100_clips": slopes[name][1],
                "standard_error": slopes[name][2],
            }
            for name, report in graphs.items()
        }
    columns = ("efficiency", "utilisation", "spilled")
    table = Table("graph", "slowest stage", "clips", "span s", *columns, "MB/100 clips")
    for name, row in results.items():
        slope = f"{row['memory_slope_mb_per_100_clips']:.2f} ± {row['standard_error']:.2f}"
        numbers = [f"{row[key]:.2f}" for key in columns]
        table.add_row(name, str(row["slowest"]), str(row["clips"]), f"{row['span_s']:.0f}", *numbers, slope)
    Console().print(table)
    for name, (parts, *_) in slopes.items():
        steepest = ", ".join(f"{part} {slope:.2f}" for part, slope in list(parts.items())[:4])
        print(f"steepest slopes of {name}: {steepest}")
    if options.save:
        options.save.write_text(json.dumps({"clips": options.clips, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
