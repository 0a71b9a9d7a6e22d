"""The run folder, and user errors that come out of Ray as themselves."""

import os
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data
import yaml

from pipelines.actors import told_by_the_first_call
from pipelines.config import Config, PretrainConfig, TrainConfig, how_keys
from pipelines.runtime import find_user_error, open_run, ray_session
from prophy.errors import ProPhyError
from tests.conftest import tiny_config


def test_run_folder_keeps_configuration_and_versions(config: Config) -> None:
    folder = open_run(config, "cache")
    assert Config.model_validate(yaml.safe_load((folder / "cache.yaml").read_text())) == config
    assert {"python", "torch", "ray", "deepspeed"} <= yaml.safe_load(
        (folder / "versions.yaml").read_text()
    ).keys()


def test_same_run_may_change_how_but_not_what(tmp_path: Path) -> None:
    open_run(tiny_config(tmp_path, "physics.top_k=4"), "cache")
    open_run(tiny_config(tmp_path, "physics.top_k=2"), "train")  # nothing of it was trained before
    open_run(tiny_config(tmp_path, "train.num_steps=99", "ray.num_cpus=4", "serve.port=9000"), "train")
    with pytest.raises(ProPhyError, match=r"belongs to another run: physics.top_k is 2 there and 3 here"):
        open_run(tiny_config(tmp_path, "physics.top_k=3"), "train")
    with pytest.raises(ProPhyError, match=r"another run: train.loss_weights is .*0.1.* there and .*0.3"):
        open_run(tiny_config(tmp_path, "train.loss_weights.semantic_alignment=0.3"), "train")


@pytest.mark.parametrize("text", ["", "[1]", "a: b: c", "\x00", "extends: tiny", "train: 5", "train:"])
def test_what_no_command_wrote_is_neither_compared_nor_overwritten(tmp_path: Path, text: str) -> None:
    (tmp_path / "train.yaml").write_text(text)
    said = f"{tmp_path}/train.yaml is not what `prophy train` writes there, .*; remove it"
    with pytest.raises(ProPhyError, match=said):
        open_run(tiny_config(tmp_path), "train")
    assert (tmp_path / "train.yaml").read_text() == text
    if text == "[1]":
        (tmp_path / "cache.yaml").write_text(text)
        with pytest.raises(ProPhyError, match="is not what `prophy cache` writes there"):
            open_run(tiny_config(tmp_path), "cache")


def test_a_size_beside_buckets_and_a_text_with_a_reference_are_those_of_the_same_run(tmp_path: Path) -> None:
    """The size decided nothing there; and YAML alone would read the text otherwise than it was."""
    config = tiny_config(tmp_path, "backbone.aspect_buckets=[[64, 64]]")
    backbone = config.backbone.model_copy(update={"width": 128, "revision": "${x}"})
    before = config.model_copy(update={"backbone": backbone})
    open_run(before, "train")
    now = config.backbone.model_copy(update={"revision": "${x}"})
    open_run(config.model_copy(update={"backbone": now}), "train")
    with pytest.raises(ProPhyError, match="backbone.revision is"):
        open_run(config, "train")


def test_every_key_that_is_free_in_a_run_folder_is_marked() -> None:
    assert {"num_steps", "num_workers", "zero_stage", "sample_prompts"} <= how_keys(TrainConfig)
    assert not {"learning_rate", "recipe", "seed", "num_held_out"} & how_keys(TrainConfig)
    assert how_keys(PretrainConfig) == {"text_steps", "vlm_steps", "vae_steps", "backbone_steps"}


def test_unwritable_run_folder(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ProPhyError, match="cannot write to run_dir"):
        open_run(tiny_config(tmp_path / "file" / "run"), "train")


def test_user_error_comes_out_of_a_worker(ray_cluster: None, config: Config) -> None:
    @ray.remote
    def fail() -> None:
        raise ProPhyError("the grid is 3 wide; give an even one")

    with pytest.raises(ProPhyError, match="^the grid is 3 wide; give an even one$"), ray_session(config):
        ray.get(fail.remote())
    assert find_user_error(RuntimeError("a bug")) is None


def test_user_error_comes_out_of_a_row_without_the_advice_of_ray_data(
    ray_cluster: None, config: Config
) -> None:
    def fail(row: dict[str, int]) -> dict[str, int]:
        raise ProPhyError("the disk is full; free it")

    with pytest.raises(ProPhyError) as caught, ray_session(config):
        list(ray.data.range(1).map(fail).iter_rows())
    assert str(caught.value) == "the disk is full; free it"


def test_user_error_comes_out_of_the_constructor_of_a_stage(ray_cluster: None, config: Config) -> None:
    @told_by_the_first_call
    class Fail:
        def __init__(self) -> None:
            raise ProPhyError("vlm.layers has 99, of 8; name layers that there are")

        def __call__(self, row: dict[str, int]) -> dict[str, int]:
            return row

    stage: Any = Fail
    with pytest.raises(ProPhyError) as caught, ray_session(config):
        list(ray.data.range(2).map(stage, concurrency=1).iter_rows())
    assert str(caught.value) == "vlm.layers has 99, of 8; name layers that there are"


@pytest.mark.parametrize(
    "address, message",
    [
        ("127.0.0.1:1", r"^nothing answers at RAY_ADDRESS 127.0.0.1:1 \(Connection refused\); set it to"),
        ("[::1]:1", r"^nothing answers at RAY_ADDRESS \[::1\]:1"),
        ("no.such.host.invalid:6379", r"^nothing answers at RAY_ADDRESS no.such.host.invalid:6379"),
        (
            "http://127.0.0.1:8265",
            r"^cannot use the cluster at RAY_ADDRESS http://127.0.0.1:8265: a line or two$",
        ),
        (None, r"^Ray does not start here: a line or two Where the machine is busy"),
    ],
)
def test_a_ray_that_cannot_be_had_is_one_sentence(
    config: Config, monkeypatch: pytest.MonkeyPatch, address: str | None, message: str
) -> None:
    def init(*_: object, **__: object) -> None:
        raise RuntimeError("a line\n or two")

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # that of the session may be
    monkeypatch.setattr(ray, "init", init)
    if address:
        monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ProPhyError, match=message), ray_session(config):
        pass


def test_workers_have_the_home_of_the_command(
    config: Config, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    homes = []

    def init(*_: object, **__: object) -> None:
        homes.append(os.environ["PROPHY_HOME"])
        raise RuntimeError

    monkeypatch.setattr(ray, "is_initialized", lambda: False)  # that of the session may be
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PROPHY_HOME", "home")
    with pytest.raises(ProPhyError), ray_session(config):
        pass
    assert homes == [str(tmp_path / "home")]
