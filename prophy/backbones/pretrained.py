"""Where pretrained models come from: names, fingerprints, configurations, files. Imports no networks."""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from huggingface_hub import snapshot_download

from prophy.backbones.families import FAMILIES, Expert, Images, ModelConfig
from prophy.errors import ProPhyError
from prophy.hashing import files_sha256
from prophy.models.description import ExpertName, branches_in, phenomena_of, trained_on
from prophy.models.stored import local_folder
from prophy.stores import is_in_s3
from prophy.tiny import EMBEDDED, part_fingerprint
from prophy.tiny import pipeline as tiny


class _Source(Protocol):
    """Where a pretrained model comes from."""

    def location(self) -> str:
        """What diffusers loads: a folder or a hub id."""

    def folder(self, parts: list[str] | None) -> Path:
        """A folder with the files that fit the patterns `parts`, or with all of them."""

    def fingerprint(self) -> str:
        """See `fingerprint`."""

    def encoders_fingerprint(self, encoders: Iterable[str]) -> str:
        """See `encoders_fingerprint`; `encoders` are the components that make encodings."""


class _Embedded:
    """What comes with the product, built where it is first used; its fingerprints need no build."""

    def location(self) -> str:
        return str(tiny.pipeline_folder())

    def folder(self, parts: list[str] | None) -> Path:
        return tiny.pipeline_folder()

    def fingerprint(self) -> str:
        return tiny.pipeline_fingerprint()

    def encoders_fingerprint(self, encoders: Iterable[str]) -> str:
        return tiny.encoders_fingerprint()


@dataclass(frozen=True)
class _Folder:
    path: Path

    def location(self) -> str:
        return str(self.path)

    def folder(self, parts: list[str] | None) -> Path:
        return self.path

    def fingerprint(self) -> str:
        return self._hash_of(self.path.rglob("*"))

    def encoders_fingerprint(self, encoders: Iterable[str]) -> str:
        return self._hash_of(file for part in encoders for file in (self.path / part).rglob("*"))

    def _hash_of(self, files: Iterable[Path]) -> str:
        """Hash of the names and the content of files in the folder.

        What begins with a dot is no part of a model: a download leaves its time in `.cache`, a clone `.git`.
        """
        depth = len(self.path.parts)
        own = (file for file in files if not any(part[0] == "." for part in file.parts[depth:]))
        return files_sha256(self.path, own)


@dataclass(frozen=True)
class _OnHub:
    name: str
    revision: str | None

    def location(self) -> str:
        return self.name

    def folder(self, parts: list[str] | None) -> Path:
        """Each node fetches a file once: the hub's cache locks."""
        try:
            return Path(snapshot_download(self.name, revision=self.revision, allow_patterns=parts))
        except OSError:
            raise unloadable(self.name) from None

    def fingerprint(self) -> str:
        return self.folder(["*.json"]).name

    def encoders_fingerprint(self, encoders: Iterable[str]) -> str:
        return self.fingerprint()


def _source(pretrained: str, revision: str | None) -> _Source:
    """The one place that knows what names mean: the embedded pipeline, a folder, also in S3, or a hub id.

    Raises:
        ProPhyError: the name is none of them.
    """
    if pretrained == EMBEDDED:
        return _Embedded()
    if is_in_s3(pretrained) or Path(pretrained).is_dir():
        return _Folder(local_folder(pretrained))
    if is_hub_id(pretrained):
        return _OnHub(pretrained, revision)
    raise ProPhyError(
        f"no folder {pretrained}; give a folder, a place in S3, a hub id such as "
        f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers, or {EMBEDDED}"
    )


def is_hub_id(name: str) -> bool:
    """Whether a name has the form of a hub id, and no folder is called so."""
    return bool(re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name)) and not Path(name).is_dir()


def resolve_pretrained(name: str) -> str:
    """A local folder or a hub id, whichever `name` means.

    The embedded pipeline is built on first use, and what lies in S3 is copied.

    Raises:
        ProPhyError: neither a folder, nor a place in S3, nor the form of a hub id; or as `local_folder`.
    """
    return _source(name, None).location()


def fingerprint(pretrained: str, revision: str | None) -> str:
    """What a pretrained model is, whatever its name: a hash of a folder's files, or the commit on the hub.

    Raises:
        ProPhyError: there is no such model.
    """
    return _source(pretrained, revision).fingerprint()


def pinned_revision(pretrained: str, revision: str | None) -> str | None:
    """The commit that `revision` of a hub id is now, so that all load the same; of a folder, itself.

    Raises:
        ProPhyError: there is no such model.
    """
    source = _source(pretrained, revision)
    return source.fingerprint() if isinstance(source, _OnHub) else revision


def encoders_fingerprint(family: str, pretrained: str, revision: str | None) -> str:
    """As `fingerprint`, of what makes encodings: another transformer leaves it, except by a hub's commit.

    Args:
        family: key of `FAMILIES`.
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.

    Raises:
        ProPhyError: there is no such model.
    """
    return _source(pretrained, revision).encoders_fingerprint(FAMILIES[family].encoders)


def encoders_sha256(family: str, pretrained: str, revision: str | None) -> str:
    """As `encoders_fingerprint`, of the files alone: the same wherever they lie. They are fetched first."""
    encoders = FAMILIES[family].encoders
    folder = download(pretrained, revision, [f"{part}/*" for part in encoders])
    return _Folder(folder).encoders_fingerprint(encoders)


def vlm_fingerprint(pretrained: str, revision: str | None) -> str:
    """As `fingerprint`, of a vision-language model.

    Raises:
        ProPhyError: there is no such model.
    """
    return part_fingerprint("vlm") if pretrained == EMBEDDED else fingerprint(pretrained, revision)


def check_checkpoint(checkpoint: Path, pretrained: str, revision: str | None) -> None:
    """Checks that a branch, or each of two, was trained on this backbone; reads no weights of the branch.

    Raises:
        ProPhyError: there is no such checkpoint, it belongs to another backbone, or its branches have
            different phenomena.
    """
    phenomena_of(checkpoint)
    ours = fingerprint(pretrained, revision)
    for branch in branches_in(checkpoint).values():
        backbone = trained_on(branch)
        if backbone["fingerprint"] != ours:
            raise ProPhyError(
                f"{branch} was trained on another backbone ({backbone['name']}) than {pretrained}; "
                f"set backbone.pretrained to that one, or choose another checkpoint"
            )


def check_unchanged(place: str, trained: Mapping[str, str | None], pretrained: str) -> None:
    """Checks that `pretrained`, at the revision of then, is what a checkpoint of training was trained on.

    Args:
        place: where the checkpoint lies.
        trained: `name`, `revision` and `fingerprint` in it.
        pretrained: see `resolve_pretrained`.

    Raises:
        ProPhyError: there is no such model, or it is another one.
    """
    theirs, ours = trained["fingerprint"], fingerprint(pretrained, trained["revision"])
    if theirs != ours:
        raise ProPhyError(
            f"{place} was trained on another backbone ({trained['name']}, fingerprint {theirs}) than "
            f"{pretrained} is now (fingerprint {ours}); set backbone.pretrained to that one, or choose "
            f"another run_dir"
        )


def load_configs(
    family: str, pretrained: str, revision: str | None, transformer: str = "transformer"
) -> tuple[ModelConfig, ModelConfig]:
    """Configurations of VAE and transformer, as their files have them; reads no weights.

    Args:
        family: key of `FAMILIES`.
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.
        transformer: its name in the pipeline.

    Raises:
        ProPhyError: there is no such model, or this family cannot run it.
    """
    return load_all_configs(family, pretrained, revision, transformer)[1:]


def takes_images(family: str, pretrained: str, revision: str | None) -> Images:
    """Whether a model makes videos of images; reads no weights. Arguments and errors as in `load_configs`."""
    pipeline, _, transformer = load_all_configs(family, pretrained, revision)
    return FAMILIES[family].images(pipeline, transformer)


def load_experts(family: str, pretrained: str, revision: str | None) -> Mapping[ExpertName | None, Expert]:
    """The transformers of a model, see `Family.experts`. Arguments and errors as in `load_configs`."""
    pipeline, _, _ = load_all_configs(family, pretrained, revision)
    return FAMILIES[family].experts(pipeline)


def load_trained_expert(
    family: str, pretrained: str, revision: str | None, expert: ExpertName | None
) -> Expert:
    """The transformer that `expert`, which is `train.expert`, names; reads no weights.

    Raises:
        ProPhyError: as `load_configs`; or the model has two transformers and none is named, or it has one.
    """
    pipeline, _, _ = load_all_configs(family, pretrained, revision)
    return FAMILIES[family].trained_expert(pretrained, pipeline, expert)


def load_all_configs(
    family: str, pretrained: str, revision: str | None, transformer: str = "transformer"
) -> tuple[ModelConfig, ModelConfig, ModelConfig]:
    """Configurations of pipeline, VAE and transformer; the rest is as in `load_configs`."""
    files = ["model_index.json", "vae/config.json", f"{transformer}/config.json"]
    folder = download(pretrained, revision, files)
    try:
        # A dict of what is no JSON object fails too.
        pipeline, vae, of_transformer = (dict(json.loads((folder / file).read_text())) for file in files)
    except (OSError, ValueError, TypeError):
        raise unloadable(pretrained) from None
    FAMILIES[family].check(pretrained, pipeline, of_transformer)
    return pipeline, vae, of_transformer


def branch_configs(family: str, pretrained: str, revision: str | None) -> list[ModelConfig]:
    """`physics` of each transformer that has a branch: those of what `prophy export --complete` wrote.

    Arguments and errors as in `load_configs`.
    """
    experts = load_experts(family, pretrained, revision)
    transformers = [
        load_configs(family, pretrained, revision, expert.component)[1] for expert in experts.values()
    ]
    return [transformer["physics"] for transformer in transformers if "physics" in transformer]


def check_bare(family: str, pretrained: str, revision: str | None) -> None:
    """Whether a branch can be put beside this model.

    Args:
        family: key of `FAMILIES`.
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.

    Raises:
        ProPhyError: it has a branch, as `prophy export --complete` writes it; or there is no such model.
    """
    if branch_configs(family, pretrained, revision):
        raise ProPhyError(
            f"{pretrained} is a complete export, which holds a trained branch; set backbone.pretrained to "
            f"the backbone that it was trained on, and train.start_from to what `prophy export` writes "
            f"without --complete"
        )


def download(pretrained: str, revision: str | None, parts: list[str] | None = None) -> Path:
    """The folder of a pretrained model, after what is missing was fetched from the hub or from S3.

    Args:
        pretrained: see `resolve_pretrained`.
        revision: commit, branch or tag, where it is a hub id.
        parts: patterns of the files that are needed; all if None.

    Raises:
        ProPhyError: there is no such model.
    """
    return _source(pretrained, revision).folder(parts)


def unloadable(pretrained: str) -> ProPhyError:
    """What is said of a model that is nowhere."""
    return ProPhyError(
        f"cannot load {pretrained}: no complete model of this name in a folder, in the local hub cache or on "
        f"the hub; check the name and the revision"
    )
