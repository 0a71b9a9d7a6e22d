import shutil
from functools import partial
from pathlib import Path

import pytest

from prophy.backbones.pretrained import (
    encoders_fingerprint,
    fingerprint,
    load_configs,
    pinned_revision,
    resolve_pretrained,
)
from prophy.errors import ProPhyError
from prophy.tiny.pipeline import pipeline_folder


def test_a_hub_id_is_pinned_to_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    commit, repository = 40 * "a", tmp_path / "models--someone--model"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (snapshot / "model_index.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    assert pinned_revision("someone/model", None) == pinned_revision("someone/model", "main") == commit
    assert pinned_revision("tiny", None) is None
    with pytest.raises(ProPhyError, match="someone/other"):
        pinned_revision("someone/other", None)


def test_fingerprint_is_of_the_content(tmp_path: Path) -> None:
    source = pipeline_folder() / "scheduler"
    shutil.copytree(source, tmp_path / "copy")
    assert fingerprint(str(tmp_path / "copy"), None) == fingerprint(str(source), None)
    with (tmp_path / "copy" / "scheduler_config.json").open("a") as file:
        file.write("\n")
    assert fingerprint(str(tmp_path / "copy"), None) != fingerprint(str(source), None)


def test_what_a_download_or_a_clone_leaves_is_no_part_of_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    before = fingerprint(str(tmp_path), None)
    for name in (".cache/huggingface/download/config.json.metadata", ".git/HEAD", "vae/.DS_Store"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("1764608251.0")
    assert fingerprint(str(tmp_path), None) == before
    (tmp_path / "vae" / "config.json").write_text("{}")
    assert fingerprint(str(tmp_path), None) != before


def test_fingerprint_of_encoders_leaves_the_transformer_out(tmp_path: Path) -> None:
    folder = Path(shutil.copytree(pipeline_folder(), tmp_path / "copy"))
    names = [str(folder), "tiny"]
    of_encoders = partial(encoders_fingerprint, "wan")
    assert not {of_encoders(name, None) for name in names} & {fingerprint(n, None) for n in names}
    first, whole = of_encoders(str(folder), None), fingerprint(str(folder), None)
    for part, matters in {
        "transformer": False,
        "scheduler": False,
        "vae": True,
        "text_encoder": True,
        "tokenizer": True,
    }.items():
        [file, *_] = sorted((folder / part).iterdir())
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        assert (of_encoders(str(folder), None) != first) == matters
        assert fingerprint(str(folder), None) != whole
        file.write_bytes(content)


def test_a_name_that_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match="no folder ./nowhere"):
        resolve_pretrained("./nowhere")
    for load in (fingerprint, partial(encoders_fingerprint, "wan"), partial(load_configs, "wan")):
        with pytest.raises(ProPhyError, match="cannot load nobody/nothing"):
            load("nobody/nothing", None)
    with pytest.raises(ProPhyError, match="cannot load"):
        load_configs("wan", str(tmp_path), None)
    for name in ("model_index.json", "vae/config.json", "transformer/config.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("[1]")
    with pytest.raises(ProPhyError, match="cannot load"):
        load_configs("wan", str(tmp_path), None)
