from pathlib import Path

import pytest

from prophy.backbones import fingerprint
from prophy.tiny import build_once
from prophy.tiny.pipeline import pipeline_folder


def test_pipeline_is_the_same_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder()
    assert pipeline_folder() == folder
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))
    again = pipeline_folder()
    assert again.parent == tmp_path
    assert fingerprint(str(again), None) == fingerprint(str(folder), None)


def test_build_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))
    built = []

    def build(folder: Path) -> None:
        built.append(folder)
        (folder / "weights").write_text("w")

    first = build_once("model", "recipe", build)
    assert build_once("model", "recipe", build) == first and len(built) == 1
    assert (first / "weights").read_text() == "w"
    assert build_once("model", "another recipe", build) != first
    assert len(list(tmp_path.iterdir())) == 2  # no scratch folder is left


def test_the_first_of_two_builders_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))

    def slow(folder: Path) -> None:
        (folder / "weights").write_text("slow")
        build_once("model", "recipe", lambda other: (other / "weights").write_text("fast"))

    folder = build_once("model", "recipe", slow)
    assert (folder / "weights").read_text() == "fast"
    assert len(list(tmp_path.iterdir())) == 1


def test_a_failed_build_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))

    def fail(folder: Path) -> None:
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        build_once("model", "recipe", fail)
    assert not list(tmp_path.iterdir())
