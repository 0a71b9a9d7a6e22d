"""A small cache without Ray: random clips through the stage that encodes them, and priors beside."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from pipelines.caching.cache import encodings_table, priors_table
from pipelines.caching.stages import CLIPS_WITH_FRAMES, EncodeClip
from pipelines.caching.tables import Table, WriteRows, update_index, write_file
from pipelines.config import Config
from prophy.schema import INPUT, QUARANTINE, SOURCE, CacheInput
from prophy.taxonomy import multi_hot
from prophy.training.cache import PriorCache
from tests.wisa import PHENOMENA, WISA


def write_cache(config: Config, captions: Sequence[str]) -> PriorCache:
    """A clip of noise for each caption, `0-clip` and so on, as this backbone encodes it."""
    priors, encodings = priors_table(config, WISA), encodings_table(config)
    attempts, quarantine = (
        config.run_dir / "attempts",
        Table(config.run_dir / "quarantine", QUARANTINE, {}, {}),
    )
    for folder in (attempts, quarantine.folder, priors.folder, encodings.folder):
        folder.mkdir(parents=True, exist_ok=True)
    stage = EncodeClip(config.backbone, encodings, attempts)
    clips = [clip(config, number, caption) for number, caption in enumerate(captions)]
    encoded = stage(pa.Table.from_pylist(clips, CLIPS_WITH_FRAMES))
    [counts] = WriteRows(encodings, quarantine)(encoded).to_pylist()
    assert (counts["written"], counts["failed"], counts["share"]) == (len(clips), 0, float(len(clips)))
    rows = pa.Table.from_pylist([_prior(number, row) for number, row in enumerate(clips)], priors.schema)
    write_file(priors.folder, rows, priors.footer, row_group_size=1)
    for table in (priors, encodings):
        update_index(table)
    rows = CacheInput("/videos", pa.array([row["source"] for row in clips], SOURCE)).to_table()
    write_file(encodings.folder, rows, rows.schema.metadata, name=INPUT)
    return PriorCache(priors.folder, encodings.folder)


def clip(config: Config, number: int, caption: str) -> dict:
    """A row of `CLIPS_WITH_FRAMES`."""
    backbone = config.backbone
    shape = (backbone.num_frames, backbone.height, backbone.width, 3)
    frames = np.random.default_rng(number).integers(0, 256, shape, dtype=np.uint8)
    return {
        "sample_id": f"{number}-clip",
        "source": {"uri": f"{number}.mp4", "size": 1, "modified": 0.0},
        "content_hash": str(number),
        "start_s": 0.0,
        "end_s": 2.0,
        "fps": 8.0,
        "num_frames": backbone.num_frames,
        "height": backbone.height,
        "width": backbone.width,
        "caption": caption,
        "num_clips": 1,
        "share": 1.0,
        "frames": frames.tobytes(),
        "frames_shape": frames.shape,
    }


def _prior(number: int, row: dict) -> dict:
    return {key: value for key, value in row.items() if not key.startswith("frames")} | {
        "vlm_caption": "",
        "answers": [],
        "unparsed": [],
        "phenomena": multi_hot([PHENOMENA[number], "melting"], PHENOMENA),
        "map_phenomena": [number],
        "maps": np.random.default_rng(number).random(2 * 8, dtype=np.float32),
        "maps_shape": [2, 2, 2, 2],
        "slice_times": [{"start_s": 0.0, "end_s": 1.0}, {"start_s": 1.0, "end_s": 2.0}],
    }
