"""Who is compared: names, knobs, folders, and mistakes in them."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
import yaml

from pipelines.config import load_config
from pipelines.evaluation.contestants import Entrant, enter, notes_on_training
from pipelines.layout import RunFolder
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.record import Training, write_training
from pipelines.training.saving import Fragment, Save
from prophy.backbones.pretrained import resolve_pretrained
from prophy.errors import ProPhyError
from prophy.tiny import bundled
from tests.backbones.small_training import one_rank
from tests.object_store import object_store
from tests.wan import write_i2v


def entered(folder: Path, contestants: dict[str, dict[str, object]], **others: object) -> list[Entrant]:
    file = folder / "compare.yaml"
    evaluate = {"contestants": contestants}
    file.write_text(
        yaml.safe_dump({"extends": "tiny", "run_dir": str(folder / "run"), "evaluate": evaluate, **others})
    )
    return enter(load_config(str(file)))


def test_by_default_the_branch_is_compared_with_itself_off(tmp_path: Path) -> None:
    off, on = entered(tmp_path, {})
    assert (off.name, on.name) == ("branch off", "branch on")
    assert off.model == on.model and off.identity != on.identity
    assert off.knobs is not None and off.knobs.scale == 0
    assert on.knobs is None
    [alone] = entered(tmp_path, {}, checkpoint=None)
    assert alone.name == "model"


def test_a_name_changes_nothing_of_what_is_computed(tmp_path: Path) -> None:
    first, second, third = entered(
        tmp_path, {"a": {"checkpoint": "tiny"}, "b": {"checkpoint": "tiny"}, "c": {}}
    )
    assert first.identity == second.identity != third.identity
    assert third.config.checkpoint is None


def test_a_run_is_its_model(tmp_path: Path) -> None:
    run = tmp_path / "trained"
    shutil.copytree(bundled("branch"), RunFolder(run).model)
    [entrant] = entered(tmp_path, {"mine": {"checkpoint": str(run)}})
    assert entrant.config.checkpoint == str(run / "model")


def test_a_run_that_trains_is_its_newest_checkpoint_and_another_run_in_its_place_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def save(value: float) -> None:
        part = Fragment("a", 0, {"parameter": torch.full((3,), value)})
        with one_rank():
            Save(store, 3, [part], {"a": torch.Size([3])}, {}).commit(num_to_keep=1)

    exported: list[float] = []

    def export(checkpoint: Checkpoint, folder: Path) -> None:
        exported.append(checkpoint.tensor("parameter", "a")[0].item())
        shutil.copytree(bundled("branch"), folder, dirs_exist_ok=True)

    monkeypatch.setattr("pipelines.training.export.export_branch", export)
    run = tmp_path / "trained"
    store = FolderStore(str(RunFolder(run).checkpoints))
    contestants: dict[str, dict[str, object]] = {"mine": {"checkpoint": str(run)}}
    save(1.0)
    [first], [again] = entered(tmp_path, contestants), entered(tmp_path, contestants)
    assert first.config.checkpoint == again.config.checkpoint and exported == [1.0]
    shutil.rmtree(run)
    save(2.0)
    [other] = entered(tmp_path, contestants)
    assert other.config.checkpoint != first.config.checkpoint and exported == [1.0, 2.0]


def test_a_run_that_goes_on_is_no_longer_its_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def export(checkpoint: Checkpoint, folder: Path) -> None:
        shutil.copytree(bundled("branch"), folder, dirs_exist_ok=True)
        write_training(folder, checkpoint.step, checkpoint.run)

    def save(step: int) -> None:
        part = Fragment("a", 0, {"parameter": torch.ones(3)})
        with one_rank():
            Save(store, step, [part], {"a": torch.Size([3])}, {"held_out": ["b", "a"]}).commit(num_to_keep=2)

    monkeypatch.setattr("pipelines.training.export.export_branch", export)
    run = tmp_path / "trained"
    store = FolderStore(str(RunFolder(run).checkpoints))
    save(3)
    shutil.copytree(bundled("branch"), RunFolder(run).model)
    write_training(RunFolder(run).model, 3, {"held_out": ["b", "a"]})
    contestants: dict[str, dict[str, object]] = {"mine": {"checkpoint": str(run)}}
    [entrant] = entered(tmp_path, contestants)
    assert entrant.config.checkpoint == str(run / "model")
    save(5)
    [entrant] = entered(tmp_path, contestants)
    assert entrant.config.checkpoint != str(run / "model")
    assert entrant.trained == Training(5, ("b", "a"))
    shutil.rmtree(RunFolder(run).checkpoints)
    [entrant] = entered(tmp_path, contestants)
    assert entrant.config.checkpoint == str(run / "model")


@pytest.mark.parametrize(
    ("newest", "is_taken"),
    [
        ((3, {"num_steps": 3}), True),
        ((3, {}), True),
        ((3, {"num_steps": 9}), False),
        (None, True),
        (ProPhyError("no keys"), True),
    ],
)
def test_a_model_without_a_record_is_that_of_a_run_that_ended_or_cannot_be_asked(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    newest: tuple[int, dict[str, int]] | ProPhyError | None,
    is_taken: bool,
) -> None:
    def newest_run(store: FolderStore) -> tuple[int, dict[str, int]] | None:
        if isinstance(newest, ProPhyError):
            raise newest
        return newest

    exported: list[str] = []

    @contextmanager
    def latest(store: FolderStore) -> Iterator[None]:
        exported.append(store.location)
        yield None

    monkeypatch.setattr(FolderStore, "newest_run", newest_run)
    monkeypatch.setattr(FolderStore, "latest", latest)
    run = tmp_path / "trained"
    shutil.copytree(bundled("branch"), RunFolder(run).model)
    RunFolder(run).training.mkdir()
    [entrant] = entered(tmp_path, {"mine": {"checkpoint": str(run)}})
    assert entrant.config.checkpoint == str(run / "model"), "also where all checkpoints are damaged"
    assert (not exported) == is_taken


def test_who_may_have_been_trained_on_measured_videos_is_named(tmp_path: Path) -> None:
    folders = {}
    for name, held_out in (("clean", ["a", "b", "c"]), ("seen", ["a", "z"]), ("old", None)):
        folders[name] = shutil.copytree(bundled("branch"), tmp_path / name)
        if held_out is not None:
            write_training(folders[name], 10, {"held_out": held_out})
    contestants: dict[str, dict[str, object]] = {
        name: {"checkpoint": str(folder)} for name, folder in folders.items()
    }
    entrants = entered(tmp_path, contestants | {"backbone": {}})
    assert notes_on_training(entrants, {"a", "b", "c"}) == [
        "it is not known whether contestant 'old' was trained on these clips",
        "contestant 'seen' may have been trained on 2 of these 3 videos: its run did not hold them out",
    ]
    assert notes_on_training(entrants, set()) == []


def test_knobs_of_a_backbone_that_has_no_branch_are_refused(tmp_path: Path) -> None:
    bare = resolve_pretrained("tiny")
    with pytest.raises(ProPhyError, match="it has knobs of a branch and no branch; give it a checkpoint"):
        entered(tmp_path, {"mine": {"pretrained": bare, "scale": 2}})
    with pytest.raises(ProPhyError, match="it has knobs of a branch and no branch; give it a checkpoint"):
        entered(tmp_path, {"mine": {"pretrained": bare, "strength": {"melting": 2}}})


def test_knobs_of_a_complete_export_reach_its_branch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "pipelines.evaluation.contestants.branch_configs", lambda *_: [{"phenomena": ["melting"]}]
    )
    [entrant] = entered(tmp_path, {"off": {"scale": 0}}, checkpoint=None)
    assert entrant.knobs is not None and entrant.knobs.scale == 0
    with pytest.raises(ProPhyError, match="strength names 'magic', which is no phenomenon of its branch"):
        entered(tmp_path, {"mine": {"pretrained": resolve_pretrained("tiny"), "strength": {"magic": 2}}})


def test_a_model_in_s3_is_the_one_that_it_is_in_a_folder(tmp_path: Path) -> None:
    with object_store() as store:
        store.mkdir("contestants")
        store.put(f"{bundled('branch')}/", "contestants/mine/", recursive=True)
        url = "s3://contestants/mine"
        here, there = entered(tmp_path, {"here": {"checkpoint": "tiny"}, "there": {"checkpoint": url}})
        assert there.identity == here.identity
        assert there.config.checkpoint == url, "each node makes a copy of its own"
        with pytest.raises(ProPhyError, match="the contestant 'no' of evaluate.contestants: no whole model"):
            entered(tmp_path, {"no": {"checkpoint": "s3://contestants/nothing"}})


def test_knobs_reach_the_branch(tmp_path: Path) -> None:
    knobs = {"strength": {"melting": 3}, "invert_refinement": True}
    [entrant] = entered(tmp_path, {"stronger": {"checkpoint": "tiny", **knobs}})
    assert entrant.knobs is not None
    assert (entrant.knobs.strength, entrant.knobs.invert_refinement) == ({"melting": 3.0}, True)


@pytest.mark.parametrize(
    ("contestant", "said"),
    [
        ({"checkpoint": "/nowhere"}, "the contestant 'mine' of evaluate.contestants: .*/nowhere"),
        ({"scale": 2}, "it has knobs of a branch and no branch; give it a checkpoint"),
        ({"checkpoint": "tiny", "strength": {"magic": 2}}, "strength names 'magic', which is no phenomenon"),
    ],
)
def test_a_contestant_that_cannot_be_is_one_sentence(
    tmp_path: Path, contestant: dict[str, object], said: str
) -> None:
    with pytest.raises(ProPhyError, match=said) as caught:
        entered(tmp_path, {"mine": contestant})
    assert "\n" not in str(caught.value)


def test_a_model_that_always_takes_an_image_is_refused(tmp_path: Path) -> None:
    pretrained = str(write_i2v(tmp_path / "i2v"))
    with pytest.raises(ProPhyError, match="the contestant 'mine' .*/i2v always takes an image"):
        entered(tmp_path, {"mine": {"pretrained": pretrained}})


def test_an_unknown_key_of_a_contestant_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"'evaluate\.contestants\.mine\.chekpoint' in .*; did you mean"):
        entered(tmp_path, {"mine": {"chekpoint": "tiny"}})


def test_a_knob_beyond_its_range_is_named(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"bad value for 'evaluate\.contestants\.mine\.scale'"):
        entered(tmp_path, {"mine": {"checkpoint": "tiny", "scale": 50}})


def test_a_name_that_yaml_reads_otherwise_is_told(tmp_path: Path) -> None:
    file = tmp_path / "compare.yaml"
    file.write_text("extends: tiny\nrun_dir: run\nevaluate:\n  contestants:\n    off: {checkpoint: tiny}\n")
    with pytest.raises(ProPhyError, match="a contestant is called False; give it a name in quotes"):
        load_config(str(file))
