import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AutoTokenizer, UMT5EncoderModel

from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models.description import trained_on
from prophy.tiny import WEIGHTS, build_once, bundled, part_sha256, ship
from prophy.tiny.pipeline import encoders_fingerprint, pipeline_fingerprint, pipeline_folder
from prophy.tiny.text import write_text_encoder


def test_pipeline_is_the_same_on_every_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = pipeline_folder()
    assert pipeline_folder() == folder
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))
    again = pipeline_folder()
    assert again.parent == tmp_path
    assert fingerprint(str(again), None) == fingerprint(str(folder), None)


def test_any_rank_may_be_the_first_to_want_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = pipeline_folder()
    monkeypatch.setenv("PROPHY_HOME", str(tmp_path))
    dist.init_process_group("fake", store=FakeStore(), rank=1, world_size=2)
    try:
        built = pipeline_folder()
    finally:
        dist.destroy_process_group()
    assert built.is_relative_to(tmp_path)
    files = [path.relative_to(whole) for path in sorted(whole.rglob("*"))]
    assert files == [path.relative_to(built) for path in sorted(built.rglob("*"))]


def test_embedded_branch_belongs_to_the_embedded_pipeline() -> None:
    assert trained_on(bundled("branch"))["fingerprint"] == fingerprint("tiny", None)


def test_weights_are_small_and_all_of_them_checked() -> None:
    files = list(WEIGHTS.rglob("*.safetensors"))
    assert sum(path.stat().st_size for path in files) < 25e6
    checked = {
        name for part in ("vlm", "vae", "text_encoder", "transformer", "branch") for name in part_sha256(part)
    }
    assert checked >= {path.relative_to(WEIGHTS).as_posix() for path in files}


@pytest.mark.parametrize("damage", [lambda path: path.write_bytes(b"x"), lambda path: path.unlink()])
def test_damaged_weights_are_refused(
    damage: Callable[[Path], object], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr("prophy.tiny.WEIGHTS", tmp_path / "weights")
    assert bundled("branch") == tmp_path / "weights" / "branch"
    damage(tmp_path / "weights" / "branch" / "physics_branch.safetensors")
    with pytest.raises(ProPhyError, match=r"physics_branch\.safetensors is missing or damaged; check out"):
        bundled("branch")


def test_shipping_a_part_replaces_it_and_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr("prophy.tiny.WEIGHTS", tmp_path / "weights")
    before = part_sha256("vae"), part_sha256("branch")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "physics_branch.safetensors").write_bytes(b"new")
    ship({"branch": tmp_path / "new"})
    assert (bundled("branch") / "physics_branch.safetensors").read_bytes() == b"new"
    assert part_sha256("vae") == before[0] and part_sha256("branch") != before[1]


def test_another_text_encoder_makes_another_pipeline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(WEIGHTS, tmp_path / "weights")
    monkeypatch.setattr("prophy.tiny.WEIGHTS", tmp_path / "weights")
    before = pipeline_fingerprint(), encoders_fingerprint()
    write_text_encoder(tmp_path / "new", ["a red ball"])
    ship({"text_encoder": tmp_path / "new"})
    assert not set(before) & {pipeline_fingerprint(), encoders_fingerprint()}


def test_the_text_encoder_says_which_thing_is_where() -> None:
    """Its mean over tokens, which is what an even cross-attention reads, tells exchanged sides from exchanged
    clauses: the first is another video, the second the same."""
    encoder = UMT5EncoderModel.from_pretrained(pipeline_folder() / "text_encoder").eval()
    tokenizer = AutoTokenizer.from_pretrained(pipeline_folder() / "tokenizer")

    def mean(prompt: str) -> torch.Tensor:
        with torch.inference_mode():
            return encoder(**tokenizer(prompt, return_tensors="pt")).last_hidden_state.mean(1)

    ball, candle = "a red ball falls and bounces on the {}", "a blue candle burns on the {}"
    said = mean(f"{ball} and {candle}".format("left", "right"))
    reordered = mean(f"{candle} and {ball}".format("right", "left"))
    exchanged = mean(f"{ball} and {candle}".format("right", "left"))
    assert torch.dist(said, exchanged) > 2 * torch.dist(said, reordered)


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

    def fast(folder: Path) -> None:
        (folder / "weights").write_text("fast")

    def slow(folder: Path) -> None:
        (folder / "weights").write_text("slow")
        build_once("model", "recipe", fast)

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
