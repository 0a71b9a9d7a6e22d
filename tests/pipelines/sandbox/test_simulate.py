"""`prophy simulate`: the clips that are asked for, or one sentence before the work."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines.config import Config
from pipelines.sandbox import simulate
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


def small(run_dir: Path, num_clips: int, *overrides: str) -> Config:
    shape = ("simulate.num_frames=3", "simulate.size=32", f"simulate.num_clips={num_clips}")
    return tiny_config(run_dir, *shape, *overrides)


def files(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in (folder / "clips").iterdir()}


@pytest.mark.heavy
def test_what_a_folder_lacks_is_added(tmp_path: Path) -> None:
    output = f"simulate.output={tmp_path / 'clips'}"
    manifest = simulate.run(small(tmp_path / "a", 2, output))
    before, rows = files(tmp_path / "clips"), pq.read_table(manifest).to_pylist()
    assert len(before) == len(rows) == 2
    simulate.run(small(tmp_path / "b", 5, output), tmp_path / "no" / "such" / "sheet.png")
    after = files(tmp_path / "clips")
    assert len(after) == 5 and before.items() <= after.items()
    assert pq.read_table(manifest).to_pylist()[:2] == rows
    with Image.open(tmp_path / "no" / "such" / "sheet.png") as sheet:
        assert min(sheet.size) > 32
    at_once = simulate.run(small(tmp_path / "c", 5))
    assert pq.read_table(manifest).equals(pq.read_table(at_once))
    assert {name: content for name, (content, _) in after.items()} == {
        name: content for name, (content, _) in files(at_once.parent).items()
    }
    assert simulate.run(small(tmp_path / "d", 5, output)) == manifest
    assert files(tmp_path / "clips") == after


def test_clips_of_another_making_are_refused(tmp_path: Path) -> None:
    output = f"simulate.output={tmp_path / 'clips'}"
    manifest = simulate.run(small(tmp_path / "a", 2, output))
    for override, message in (
        ("simulate.fps=4", "holds clips with fps 8.0, not 4.0; set it back, or choose another folder"),
        ("simulate.size=64", "holds clips with size 32, not 64"),
        ("simulate.seed=1", "holds clips of another seed"),
        ("simulate.num_clips=1", "holds 2 clips, more than the 1 that are asked for"),
    ):
        config = small(tmp_path / "b", 2, output, override)
        with pytest.raises(ProPhyError, match=message):
            simulate.run(config)
        assert not config.run_dir.exists()  # so that the corrected command may use it
    pq.write_table(pq.read_table(manifest).select(["path"]), manifest)
    with pytest.raises(ProPhyError, match=r"manifest.parquet is no list of simulated clips; choose another"):
        simulate.run(small(tmp_path / "b", 2, output))


def test_what_cannot_be_written_is_said_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    config = small(tmp_path / "run", 1)
    for sheet, message in (
        (tmp_path / "file" / "sheet.png", "cannot write the picture .*: File exists"),
        (tmp_path, "no format has this ending; take .png"),
        (tmp_path / "sheet.txt", "no format has this ending; take .png"),
    ):
        with pytest.raises(ProPhyError, match=message):
            simulate.run(config, sheet)
    with pytest.raises(
        ProPhyError, match=r"cannot write to simulate.output .*file/clips \(Not a directory\)"
    ):
        simulate.run(small(tmp_path / "run", 1, f"simulate.output={tmp_path / 'file' / 'clips'}"))
    assert not config.run_dir.exists()
    for override in ("simulate.seed=-1", f"simulate.seed={10**13}", "simulate.num_clips=1000001"):
        with pytest.raises(
            ProPhyError, match=f"bad value for '{override.partition('=')[0]}' on the command line"
        ):
            tiny_config(tmp_path / "run", override)


def test_a_taxonomy_without_what_is_simulated_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("branches: [heat]\nphenomena: [{name: melting, branch: heat, wording: the melting}]")
    config = small(tmp_path / "run", 1, f"taxonomy={path}")
    with pytest.raises(
        ProPhyError, match="simulated clips show collision, rigid body motion, .*set taxonomy"
    ):
        simulate.run(config)
    assert not config.run_dir.exists()
