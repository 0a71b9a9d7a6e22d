"""Where pretrained models come from: names, fingerprints, configurations, files. Imports no networks."""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from huggingface_hub import snapshot_download

from prophy.backbones.families import FAMILIES, ModelConfig
from prophy.errors import ProPhyError
from prophy.hashing import file_sha256
from prophy.models.description import trained_on
from prophy.tiny import pipeline as tiny

_ENCODERS = ("vae", "text_encoder", "tokenizer")  # components that encodings are made by


def resolve_pretrained(name: str) -> str:
    """A local folder or a hub id; "tiny" is the embedded pipeline, built on first use.

    Raises:
        ProPhyError: neither a folder nor the form of a hub id.
    """
    if name == "tiny":
        return str(tiny.pipeline_folder())
    if not Path(name).is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
        raise ProPhyError(
            f"no folder {name}; give a folder, a hub id such as Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or tiny"
        )
    return name


def fingerprint(pretrained: str, revision: str | None) -> str:
    """What a pretrained model is, whatever its name: a hash of a folder's files, or the commit on the hub.

    Raises:
        ProPhyError: there is no such model.
    """
    if pretrained == "tiny":
        return tiny.pipeline_fingerprint()
    path = Path(resolve_pretrained(pretrained))
    if path.is_dir():
        return _hash_of(path, path.rglob("*"))
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=["*.json"])).name
    except OSError:
        raise unloadable(pretrained) from None


def pinned_revision(pretrained: str, revision: str | None) -> str | None:
    """The commit that `revision` of a hub id is now, so that all load the same; of a folder, itself.

    Raises:
        ProPhyError: there is no such model.
    """
    is_local = pretrained == "tiny" or Path(resolve_pretrained(pretrained)).is_dir()
    return revision if is_local else fingerprint(pretrained, revision)


def encoders_fingerprint(pretrained: str, revision: str | None) -> str:
    """As `fingerprint`, of what makes encodings: another transformer leaves it, except by a hub's commit.

    Raises:
        ProPhyError: there is no such model.
    """
    if pretrained == "tiny":
        return tiny.encoders_fingerprint()
    path = Path(resolve_pretrained(pretrained))
    if not path.is_dir():
        return fingerprint(pretrained, revision)
    return _hash_of(path, (file for part in _ENCODERS for file in (path / part).rglob("*")))


def check_checkpoint(checkpoint: Path, pretrained: str, revision: str | None) -> None:
    """Checks that a branch was trained on this backbone; reads no weights of the branch.

    Raises:
        ProPhyError: there is no such checkpoint, or it belongs to another backbone.
    """
    backbone = trained_on(checkpoint)
    if backbone["fingerprint"] != fingerprint(pretrained, revision):
        raise ProPhyError(
            f"{checkpoint} was trained on another backbone ({backbone['name']}) than {pretrained}; "
            f"set backbone.pretrained to that one, or choose another checkpoint"
        )


def check_unchanged(folder: Path, trained: Mapping[str, str | None], pretrained: str) -> None:
    """Checks that `pretrained`, at the revision of then, is what a checkpoint of training was trained on.

    Args:
        folder: the checkpoint's.
        trained: `name`, `revision` and `fingerprint` in it.
        pretrained: see `resolve_pretrained`.

    Raises:
        ProPhyError: there is no such model, or it is another one.
    """
    theirs, ours = trained["fingerprint"], fingerprint(pretrained, trained["revision"])
    if theirs != ours:
        raise ProPhyError(
            f"{folder} was trained on another backbone ({trained['name']}, fingerprint {theirs}) than "
            f"{pretrained} is now (fingerprint {ours}); set backbone.pretrained to that one, or choose "
            f"another run_dir"
        )


def load_configs(family: str, pretrained: str, revision: str | None) -> tuple[ModelConfig, ModelConfig]:
    """Configurations of VAE and transformer, as their files have them; reads no weights.

    Args:
        family: key of `FAMILIES`.
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.

    Raises:
        ProPhyError: there is no such model, or this family cannot run it.
    """
    files = ["model_index.json", "vae/config.json", "transformer/config.json"]
    folder = download(pretrained, revision, files)
    try:
        pipeline, vae, transformer = (json.loads((folder / file).read_text()) for file in files)
    except (OSError, ValueError):
        raise unloadable(pretrained) from None
    FAMILIES[family].check(pretrained, pipeline, transformer)
    return vae, transformer


def download(pretrained: str, revision: str | None, parts: list[str] | None = None) -> Path:
    """The folder of a pretrained model; from the hub, each node fetches a file once (the hub's cache locks).

    Args:
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.
        parts: patterns of the files that are needed; all if None.

    Raises:
        ProPhyError: there is no such model.
    """
    path = Path(resolve_pretrained(pretrained))
    if path.is_dir():
        return path
    try:
        return Path(snapshot_download(str(path), revision=revision, allow_patterns=parts))
    except OSError:
        raise unloadable(pretrained) from None


def _hash_of(folder: Path, files: Iterable[Path]) -> str:
    """Hash of the names and the content of files in a folder."""
    digest = hashlib.sha256()
    for file in sorted(file for file in files if file.is_file()):
        digest.update(f"{file.relative_to(folder)} {file_sha256(file)}\n".encode())
    return digest.hexdigest()


def unloadable(pretrained: str) -> ProPhyError:
    """What is said of a model that is nowhere."""
    return ProPhyError(
        f"cannot load {pretrained}: no complete model of this name in a folder, in the local hub cache or on "
        f"the hub; check the name and the revision"
    )
