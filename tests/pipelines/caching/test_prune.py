"""A cache whose input has changed: what counts of it, what is removed, and what a kill leaves behind."""

import contextlib
import itertools
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from pipelines.caching import prune
from pipelines.caching.tables import Table, exclusive, file_names, read_quarantine, update_index, write_file
from pipelines.caching.verify import rebuild_indices, verify
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.places import Place
from prophy.schema import (
    ENCODINGS,
    INDEX,
    INPUT,
    PRIORS,
    QUARANTINE,
    SOURCE,
    CacheInput,
    latents_columns,
    text_column,
)
from prophy.training.cache import PriorCache
from tests.wisa import PHENOMENA


def source(name: str, modified: float = 1.0) -> dict:
    return {"uri": f"/videos/{name}.mp4", "size": 10, "modified": modified}


def prior(name: str, content: str) -> dict:
    return {
        "sample_id": name,
        "source": source(name),
        "content_hash": content,
        "start_s": 0.0,
        "end_s": 2.0,
        "fps": 8.0,
        "num_frames": 17,
        "height": 64,
        "width": 64,
        "vlm_caption": name,
        "answers": [],
        "unparsed": [],
        "phenomena": np.zeros(17, np.float32),
        "map_phenomena": [],
        "maps": np.ones(8, np.float32),
        "maps_shape": [1, 2, 2, 2],
    }


def encoding(name: str) -> dict:
    columns = latents_columns(torch.ones(2, 3, 4, 4)) | text_column({"prompt_embeds": torch.ones(5, 6)})
    return {"sample_id": name, "source": source(name), "caption": name} | columns


def refusal(name: str) -> dict:
    return {
        "source": source(name),
        "stage": "CutVideo",
        "error_type": "VideoError",
        "message": name,
        "attempts": 1,
    }


def write(table: Table, *rows: dict) -> None:
    written = pa.Table.from_pylist(list(rows), table.schema)
    table.folder.mkdir(parents=True, exist_ok=True)
    write_file(table.folder, written, table.footer, row_group_size=1)


def set_input(encodings: Place, *sources: dict) -> None:
    rows = CacheInput("/videos", pa.array(sources, SOURCE)).to_table()
    write_file(encodings, rows, rows.schema.metadata, name=INPUT)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Videos a to e in the cache of two backbones, e with the content of a; and x, which is in quarantine."""
    folder = tmp_path / "cache"
    priors = Table(folder / "priors", PRIORS, {"model": "vlm", "taxonomy": [*PHENOMENA]}, {})
    write(priors, prior("a", "1"), prior("b", "2"), prior("c", "3"))
    write(priors, prior("d", "4"), prior("e", "1"))
    for name in ("one", "two"):
        encodings = Table(folder / "encodings" / name, ENCODINGS, {"model": name}, {})
        write(encodings, encoding("a"), encoding("b"))
        write(encodings, encoding("c"), encoding("d"), encoding("e"))
        update_index(encodings)
        set_input(encodings.folder, *map(source, "abcde"))
    update_index(priors)
    write(Table(folder / "quarantine", QUARANTINE, {}, {}), refusal("x"), refusal("b"))
    return folder


def opened(folder: Path, name: str = "one") -> PriorCache:
    return PriorCache(folder / "priors", folder / "encodings" / name)


def stored(place: Path) -> set[str]:
    return {key for name in file_names(place) for key in pq.read_table(place / name)["sample_id"].to_pylist()}


def test_the_samples_are_those_of_the_current_input(folder: Path) -> None:
    cache = opened(folder)
    assert (cache.sample_ids.to_pylist(), cache.num_videos, cache.num_left_out) == ([*"abcd"], 4, 0)
    assert cache.location == "/videos"
    set_input(
        folder / "encodings" / "one", source("e"), source("c"), source("b", modified=2.0), source("new")
    )
    cache = opened(folder)
    assert (cache.sample_ids.to_pylist(), cache.num_videos, cache.num_left_out) == ([*"ce"], 2, 2)
    assert opened(folder, "two").sample_ids.to_pylist() == [*"abcd"]  # another backbone has its own input
    set_input(folder / "encodings" / "one", source("new"))
    with pytest.raises(ProPhyError, match="no video of /videos is in both .*; run `prophy cache`"):
        opened(folder)
    (folder / "encodings" / "one" / INPUT).unlink()
    with pytest.raises(ProPhyError, match="one does not say which videos it is for; run `prophy cache`"):
        opened(folder)


def test_what_no_input_lists_is_removed(
    config: Config, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = config.cache.model_copy(update={"output": str(folder)})
    set_input(folder / "encodings" / "one", source("a"), source("b", modified=0.0))  # b cannot be had
    set_input(folder / "encodings" / "two", *map(source, "abd"))
    removed = prune.run(config.model_copy(update={"cache": cache}))
    assert removed == {"encodings/one": 3, "encodings/two": 2, "priors": 2, "quarantine": 1}
    assert stored(folder / "priors") == {*"abd"}
    assert stored(folder / "encodings" / "one") == {*"ab"}
    assert stored(folder / "encodings" / "two") == {*"abd"}
    assert [row["message"] for row in read_quarantine(folder / "quarantine").to_pylist()] == ["b"]
    assert "priors: 2 rows removed" in capsys.readouterr().out
    assert verify(folder) == []
    assert rebuild_indices(folder) == {"priors": 3, "encodings/one": 2, "encodings/two": 3}
    assert set(prune.prune(folder).values()) == {0}


def test_nothing_may_be_left(folder: Path) -> None:
    for name in ("one", "two"):
        set_input(folder / "encodings" / name, source("new"))
    prune.prune(folder)
    assert not any(map(stored, (folder / "priors", folder / "encodings" / "one")))
    assert verify(folder) == []
    with pytest.raises(ProPhyError, match="no video of /videos is in both"):
        opened(folder)


class Killed(BaseException):
    """Stands for SIGKILL."""


def kill_at(patch: pytest.MonkeyPatch, moment: int) -> None:
    """From the `moment`-th change of a file name on, counted from 1, this process changes none any more."""
    changes = itertools.count(1)

    def killing(change: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **options: object) -> object:
            if next(changes) >= moment:
                raise Killed
            return change(*arguments, **options)

        return call

    for name in ("replace", "unlink"):
        patch.setattr(Path, name, killing(getattr(Path, name)))


def test_killed_at_any_moment_it_leaves_a_sound_cache(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.rmtree(folder / "encodings" / "two")
    set_input(folder / "encodings" / "one", source("a"), source("d"))
    for moment in itertools.count(1):
        copy = folder.with_name(f"copy{moment}")
        shutil.copytree(folder, copy)
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            kill_at(patch, moment)
            prune.prune(copy)
            break
        cache = opened(copy)
        assert cache.sample_ids.to_pylist() == [*"ad"]
        for sample_id in "ad":
            cache.read(sample_id)
        with exclusive(copy):
            prune.prune(copy)
        assert stored(copy / "priors") == stored(copy / "encodings" / "one") == {*"ad"}
        assert verify(copy) == []
        assert not list(copy.rglob(".*.tmp"))
        index = pq.read_table(copy / "priors" / INDEX)
        assert {file.name for file in (copy / "priors").glob("*.parquet")} == {
            INDEX,
            *index["file"].to_pylist(),
        }
    assert moment > 10


def test_no_cache_a_busy_one_and_one_without_an_input(config: Config, folder: Path) -> None:
    with pytest.raises(ProPhyError, match="no cache in"):
        prune.run(config)
    there = config.model_copy(update={"cache": config.cache.model_copy(update={"output": str(folder)})})
    with exclusive(folder), pytest.raises(ProPhyError, match="another run writes to"):
        prune.run(there)
    (folder / "encodings" / "two" / INPUT).unlink()
    with pytest.raises(ProPhyError, match="two does not say which videos it is for"):
        prune.run(there)
    assert stored(folder / "priors") == {*"abcde"}
