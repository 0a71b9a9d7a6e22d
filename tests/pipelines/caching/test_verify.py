"""A cache whose files are damaged in every way that is known, and what is said of it."""

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines.caching import cache, prune, verify
from pipelines.caching.inspect import inspect
from pipelines.caching.parts import FILES_PER_PART
from pipelines.caching.tables import Table, exclusive, file_names, write_file
from pipelines.config import Config
from prophy.errors import ProPhyError
from prophy.schema import EMPTY_PROMPT, INDEX, INPUT
from prophy.training.cache import PriorCache
from tests.caches import encodings_folder, priors_folder
from tests.killing import Run, title
from tests.servers import until


@pytest.fixture
def copy(tiny_cache: Config, tmp_path: Path) -> Config:
    """The finished tiny cache, to be damaged."""
    shutil.copytree(tiny_cache.cache.output, tmp_path / "cache")
    output = tiny_cache.cache.model_copy(update={"output": str(tmp_path / "cache")})
    return tiny_cache.model_copy(update={"cache": output, "run_dir": tmp_path / "run"})


def test_a_sound_cache_is_sound(copy: Config, capsys: pytest.CaptureFixture[str]) -> None:
    priors, encodings = priors_folder(copy), encodings_folder(copy)
    before = {folder: (folder / INDEX).read_bytes() for folder in (priors, encodings)}
    for folder in before:
        (folder / INDEX).write_text("no index")
    assert verify.run(copy) == {"priors": 12, f"encodings/{encodings.name}": 12}
    assert {folder: (folder / INDEX).read_bytes() for folder in before} == before
    assert "priors: 12 samples" in capsys.readouterr().out


def flip_a_bit(path: Path, place: int = 64) -> None:
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)


def test_every_damage_is_named_set_aside_and_made_good(ray_cluster: None, copy: Config) -> None:
    priors, encodings = priors_folder(copy), encodings_folder(copy)
    flipped, other_settings = (priors / name for name in file_names(priors)[:2])
    flip_a_bit(flipped)
    rows = pq.read_table(other_settings)
    footer = {**rows.schema.metadata, b"prophy.settings": b'{"model": "another"}'}
    contradiction = priors / write_file(priors, rows, footer, row_group_size=1).name
    named = write_file(encodings, rows.select(["sample_id"]), rows.schema.metadata).name
    foreign = encodings / named
    cut = encodings / next(name for name in file_names(encodings) if name != named)
    cut.write_bytes(cut.read_bytes()[:-8])
    flip_a_bit(encodings / EMPTY_PROMPT)
    flip_a_bit(encodings / INPUT, -40)
    with pytest.raises(ProPhyError, match=r"6 file\(s\) of .* were damaged and set aside"):
        verify.run(copy)
    for path in (flipped, contradiction, foreign, cut, encodings / EMPTY_PROMPT, encodings / INPUT):
        assert not path.exists() and path.with_name(f"{path.name}.damaged").exists()
    assert verify.verify(Path(copy.cache.output)) == []

    summary = cache.run(copy)
    assert (summary.num_priors, summary.num_encodings) == (12, 12)
    assert 0 < summary.added_priors.written < 12 and 0 < summary.added_encodings.written < 12
    assert verify.run(copy) == {"priors": 12, f"encodings/{encodings.name}": 12}
    assert (encodings / EMPTY_PROMPT).exists()


def read(config: Config) -> PriorCache:
    """What training does first."""
    return PriorCache(priors_folder(config), encodings_folder(config))


def test_reasons_are_told(copy: Config) -> None:
    priors = priors_folder(copy)
    first, second = (priors / name for name in file_names(priors)[:2])
    flip_a_bit(first)
    rows = pq.read_table(second)
    bare = write_file(priors, rows, {b"of": b"another program"})
    assert set(verify.verify(Path(copy.cache.output))) == {
        f"{first} holds other bytes than its name says",
        f"{bare} has no footer",
    }


@pytest.fixture
def large(copy: Config) -> Config:
    """A cache with more files than one task reads: beside its own, one clip under many names."""
    for folder in (priors_folder(copy), encodings_folder(copy)):
        rows = pq.read_table([folder / name for name in file_names(folder)]).sort_by("sample_id")[:1]
        place = rows.column_names.index("sample_id")
        for number in range(FILES_PER_PART):
            named = rows.set_column(place, rows.schema.field(place), pa.array([f"copy-{number:03d}"]))
            write_file(folder, named, rows.schema.metadata, row_group_size=1)
    return copy


def damage_some(folder: Path) -> None:
    """Files of both parts that tasks read, in another way each; two of another making come in between."""
    names = file_names(folder)
    flipped, cut, swapped = (folder / names[place] for place in (1, FILES_PER_PART - 3, -1))
    flip_a_bit(flipped)
    cut.write_bytes(cut.read_bytes()[:-8])
    shutil.copy(folder / names[0], swapped)
    rows = pq.read_table(folder / names[0])
    other = Table(folder, rows.schema, {"model": "another"}, {})
    write_file(folder, rows, other.footer, row_group_size=1)
    write_file(folder, rows, {b"of": b"another program"})


def test_processes_that_share_the_files_find_what_one_process_finds(
    ray_cluster: None, large: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, alone = Path(large.cache.output), tmp_path / "alone"
    for table in (priors_folder(large), encodings_folder(large)):
        damage_some(Path(table))
    shutil.copytree(folder, alone)
    expected = [sentence.replace(str(alone), str(folder)) for sentence in verify.verify(alone)]
    assert len(expected) == 10
    with pytest.raises(ProPhyError, match=r"10 file\(s\) of .* were damaged and set aside"):
        verify.run(large)
    said = capsys.readouterr().out.splitlines()
    assert [line for line in said if "damaged: " in line] == [f"damaged: {line}" for line in expected]
    samples = verify.rebuild_indices(alone)
    assert samples.keys() == {"priors", f"encodings/{encodings_folder(large).name}"}
    for name, count in samples.items():
        assert f"{name}: {count} samples, index rebuilt" in said
        assert (folder / name / INDEX).read_bytes() == (alone / name / INDEX).read_bytes()
        assert sorted(file.name for file in (folder / name).iterdir()) == sorted(
            file.name for file in (alone / name).iterdir()
        )


def test_a_run_that_finds_no_index_has_tasks_make_it(
    ray_cluster: None, large: Config, capsys: pytest.CaptureFixture[str]
) -> None:
    priors, encodings = priors_folder(large), encodings_folder(large)
    verify.rebuild_indices(large.cache.folder)
    before = {folder: (folder / INDEX).read_bytes() for folder in (priors, encodings)}
    for folder in before:
        (folder / INDEX).unlink()
    summary = cache.run(large)
    assert (summary.num_priors, summary.num_encodings) == (12, 12)
    assert summary.added_priors.written == summary.added_encodings.written == 0
    said = capsys.readouterr().out
    assert all(f"index {folder.name} " in said for folder in before)
    assert {folder: (folder / INDEX).read_bytes() for folder in before} == before


def test_sigterm_ends_it_and_all_that_it_started(ray_cluster: None, large: Config, tmp_path: Path) -> None:
    """In the midst of a file that never comes: a pipe that nobody writes to."""
    folder = Path(large.cache.output)
    os.mkfifo(folder / "priors" / f"{'f' * 64}.parquet")
    before = sorted(file.name for file in (folder / "priors").iterdir())
    run = Run("cache verify", tmp_path / "run", (f"cache.output={folder}", "ray.num_cpus=2"), "ray::_read")

    def reads() -> bool:
        run.family |= set(run.process.children(recursive=True))
        return any(title(process).startswith(run.workers) for process in run.family)

    try:
        run.wait_until(reads)
        run.process.send_signal(signal.SIGTERM)
        assert run.process.wait() != 0
        until(lambda: not any(map(title, run.family)), "all of its processes have ended")
    finally:
        run.clean_up()
    assert sorted(file.name for file in (folder / "priors").iterdir()) == before
    with exclusive(folder):
        pass


@pytest.mark.parametrize("command", [cache.run, verify.run, prune.run, inspect, read])
def test_a_cache_of_another_version_is_refused_and_left_as_it_is(
    copy: Config, tmp_path: Path, command: Callable[..., object]
) -> None:
    priors = priors_folder(copy)
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
