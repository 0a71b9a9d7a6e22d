"""A cache whose files are damaged in every way that is known, and what is said of it."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from pipelines.caching import cache, prune, verify
from pipelines.caching.inspect import inspect
from pipelines.caching.tables import exclusive, file_names, write_file
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.schema import EMPTY_PROMPT, INDEX
from prophy.training.cache import PriorCache


@pytest.fixture
def copy(tiny_cache: Config, tmp_path: Path) -> Config:
    """The finished tiny cache, to be damaged."""
    shutil.copytree(tiny_cache.cache.output, tmp_path / "cache")
    output = tiny_cache.cache.model_copy(update={"output": tmp_path / "cache"})
    return tiny_cache.model_copy(update={"cache": output, "run_dir": tmp_path / "run"})


def test_a_sound_cache_is_sound(copy: Config, capsys: pytest.CaptureFixture[str]) -> None:
    priors, encodings = Path(cache.priors_folder(copy)), Path(cache.encodings_folder(copy))
    before = {folder: (folder / INDEX).read_bytes() for folder in (priors, encodings)}
    for folder in before:
        (folder / INDEX).write_text("no index")
    assert verify.run(copy) == {"priors": 12, f"encodings/{encodings.name}": 12}
    assert {folder: (folder / INDEX).read_bytes() for folder in before} == before
    assert "priors: 12 samples" in capsys.readouterr().out


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[64] ^= 1  # of a page: a footer's descriptions have no checksum
    path.write_bytes(content)


def test_every_damage_is_named_set_aside_and_made_good(ray_cluster: None, copy: Config) -> None:
    priors, encodings = Path(cache.priors_folder(copy)), Path(cache.encodings_folder(copy))
    flipped, other_settings = (priors / name for name in file_names(priors)[:2])
    flip_a_bit(flipped)
    rows = pq.read_table(other_settings)
    footer = {**rows.schema.metadata, b"prophy.settings": b'{"model": "another"}'}
    contradiction = write_file(priors, rows, footer, row_group_size=1)
    foreign = write_file(encodings, rows.select(["sample_id"]), rows.schema.metadata)
    cut = encodings / next(name for name in file_names(encodings) if name != foreign.name)
    cut.write_bytes(cut.read_bytes()[:-8])
    flip_a_bit(encodings / EMPTY_PROMPT)
    with pytest.raises(ProPhyError, match=r"5 file\(s\) of .* were damaged and set aside"):
        verify.run(copy)
    for path in (flipped, contradiction, foreign, cut, encodings / EMPTY_PROMPT):
        assert not path.exists() and path.with_name(f"{path.name}.damaged").exists()
    assert verify.verify(Path(copy.cache.output)) == []

    summary = cache.run(copy)
    assert (summary.num_priors, summary.num_encodings) == (12, 12)
    assert 0 < summary.added_priors.written < 12 and 0 < summary.added_encodings.written < 12
    assert verify.run(copy) == {"priors": 12, f"encodings/{encodings.name}": 12}
    assert (encodings / EMPTY_PROMPT).exists()


def read(config: Config) -> PriorCache:
    """What training does first."""
    return PriorCache(Path(cache.priors_folder(config)), Path(cache.encodings_folder(config)))


def test_reasons_are_told(copy: Config) -> None:
    priors = Path(cache.priors_folder(copy))
    first, second = (priors / name for name in file_names(priors)[:2])
    flip_a_bit(first)
    rows = pq.read_table(second)
    bare = write_file(priors, rows, {b"of": b"another program"})
    assert set(verify.verify(Path(copy.cache.output))) == {
        f"{first} holds other bytes than its name says",
        f"{bare} has no footer",
    }


@pytest.mark.parametrize("command", [cache.run, verify.run, prune.run, inspect, read])
def test_a_cache_of_another_version_is_refused_and_left_as_it_is(
    copy: Config, tmp_path: Path, command: Callable[..., object]
) -> None:
    priors = Path(cache.priors_folder(copy))
    for path in [*priors.glob("*.parquet")]:
        rows = pq.read_table(path)
        path.unlink()
        older = {**rows.schema.metadata, b"prophy.schema_version": b"1"}
        write_file(priors, rows, older, name=path.name if path.name == INDEX else "", row_group_size=1)
    before = sorted(priors.iterdir())
    arguments = (2, tmp_path / "sheet.png") if command is inspect else ()
    with pytest.raises(
        ProPhyError, match=r"another version .* \(format 1, not \d+\); choose another cache.ou"
    ):
        command(copy, *arguments)
    assert sorted(priors.iterdir()) == before


def test_no_cache_and_a_busy_one(copy: Config, config: Config) -> None:
    with pytest.raises(ProPhyError, match="no cache in"):
        verify.run(config)
    with exclusive(Path(copy.cache.output)), pytest.raises(ProPhyError, match="another run writes to"):
        verify.run(copy)
