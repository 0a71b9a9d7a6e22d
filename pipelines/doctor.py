"""`prophy doctor`: what a run would miss on this cluster, found in a minute instead of hours into the work.

Each check is one line. The same checks of room are made by every command before it starts; where an
autoscaler adds nodes, room that is not there yet is no fault.
"""

import itertools
import os
import secrets
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import get_args

import ray
from filelock import FileLock
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
from rich.console import Console
from rich.markup import escape

from pipelines.caching.sources import find_videos
from pipelines.config import Config, is_url
from pipelines.resources import Work, is_autoscaling_enabled, needs_of, place
from pipelines.runtime import ray_session, versions
from pipelines.serving.database import InUseError
from pipelines.serving.jobs import JobStore
from prophy.errors import ProPhyError
from prophy.stores import asking, open_store, try_writing
from prophy.taxonomy import load_taxonomy

_ANSWERS_WITHIN_S = 120  # a node starts a process first
_UNSEEN = "it does not; mount it there"
# Of what may be in an object store.
_WRITTEN = ("cache.output", "generate.output", "serve.videos", "train.checkpoints")


@ray.remote(num_cpus=0)
def _look(
    tokens: list[Path], videos: list[Path], urls: dict[str, str]
) -> tuple[list[str | None], list[bool], dict[str, str], dict[str, str], bool]:
    """What a node reads in a file of each shared folder, which videos it sees, and its versions.

    And what is wrong with each URL, and whether its GPUs are hidden from this task, which reserves none.
    """
    attempts = {key: try_writing if key in _WRITTEN else _try_reading for key in urls}
    problems = {key: _said(partial(attempts[key], url)) for key, url in urls.items()}
    seen = [token.read_text() if token.exists() else None for token in tokens]
    found = [video.is_file() for video in videos]
    return seen, found, versions(), problems, os.environ.get("CUDA_VISIBLE_DEVICES") == ""


def run(config: Config) -> None:
    """Prints a line for each check.

    Raises:
        ProPhyError: one or more do not hold, or there is no Ray.
    """
    console, failed, total = Console(emoji=False), 0, 0
    with ray_session(config):
        for name, problem in _checks(config):
            total += 1
            failed += bool(problem)
            mark = "[bold red]no[/]" if problem else "[green]ok[/]"
            said = escape(f"{name}: {problem}" if problem else name)
            console.print(f"{mark}  {said}", highlight=False, soft_wrap=True)
    if failed:
        raise ProPhyError(f"{failed} of {total} checks do not hold")


def _checks(config: Config) -> Iterator[tuple[str, str]]:
    """Each check, and what is wrong if something is."""
    for work in get_args(Work):
        try:
            needs = needs_of(config, work)
        except ProPhyError:  # it needs a section that this configuration leaves out
            continue
        told = place(needs)[1]
        if told and is_autoscaling_enabled():
            yield f"room for {work}: none yet; the command asks the autoscaler for nodes", ""
        else:
            yield f"room for {work}", told
    shared = {folder: _said(partial(_try_files, folder)) for folder in _shared_folders(config)}
    for folder, unusable in shared.items():
        yield f"rename, lock and append in {folder}", unusable
    videos = list[Path]()
    try:
        videos = _local_video(config)
    except ProPhyError as error:
        yield f"videos in {config.cache.input}", str(error)
    if not any(shared.values()):
        yield from _nodes([*shared], videos, _urls(config))
    yield f"job database {config.serve.database_url}", _said(partial(try_database, config))


def _said(attempt: Callable[[], None]) -> str:
    try:
        attempt()
    except (OSError, ProPhyError) as error:
        return str(error)
    return ""


def _try_files(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f".doctor-{secrets.token_hex(8)}"
    try:
        with FileLock(f"{file}.lock", timeout=10), file.open("a") as appended:
            appended.write("a")
        with file.open("a") as appended:
            appended.write("b")
        file = file.replace(file.with_suffix(".renamed"))
        if file.read_text() != "ab":
            raise OSError("what was appended is not there")
    finally:
        for left in (file, file.with_name(f"{file.stem}.lock")):
            left.unlink(missing_ok=True)


def try_database(config: Config) -> None:
    """Opens the job database, if no server does so that runs.

    Raises:
        OSError: its folder cannot be made.
        ProPhyError: it cannot be used.
    """
    config.serve.output.mkdir(parents=True, exist_ok=True)
    with suppress(InUseError):
        JobStore(config.serve.database_url, waits_s=0).close()


def _shared_folders(config: Config) -> list[Path]:
    """The run folder, and those of the cache and the checkpoints where they lie elsewhere."""
    cache = None if config.lacking("cache") else config.cache.output
    checkpoints = None if config.lacking("train") else config.train.checkpoints
    named = [Path(place) for place in (cache, checkpoints) if place is not None and not is_url(place)]
    within = config.run_dir.resolve()
    return [config.run_dir, *(folder for folder in named if not folder.resolve().is_relative_to(within))]


def _local_video(config: Config) -> list[Path]:
    """A video of the input, where it lies on a disk; none where there is no input yet.

    Raises:
        ProPhyError: the input cannot be used.
    """
    if config.lacking("cache") or is_url(config.cache.input) or not Path(config.cache.input).exists():
        return []
    found = find_videos(config.cache.input, load_taxonomy(config.taxonomy).names).videos
    sources = (source.as_py() for source in found["source"])
    there = (Path(each["uri"]) for each in sources if each["modified"] and not is_url(each["uri"]))
    return [*itertools.islice(there, 1)]


def _urls(config: Config) -> dict[str, str]:
    """Places of this configuration that are in object stores, by key."""
    places = {
        "generate.output": config.generate.output,
        "serve.videos": config.serve.videos,
        "checkpoint": config.checkpoint,
    }
    if not config.lacking("generate"):
        places["backbone.pretrained"] = config.backbone.pretrained
    if not config.lacking("cache"):
        places |= {"cache.input": config.cache.input, "cache.output": config.cache.output}
        places |= {"vlm.pretrained": config.vlm.pretrained}
    if not config.lacking("train"):
        places["train.start_from"] = config.train.start_from
        places["train.checkpoints"] = config.train.checkpoints
    for name, contestant in config.evaluate.contestants.items():
        for key in ("checkpoint", "pretrained"):
            places[f"evaluate.contestants.{name}.{key}"] = getattr(contestant, key)
    places["evaluate.pairs"] = config.evaluate.pairs
    return {key: str(place) for key, place in places.items() if is_url(str(place))}


def _try_reading(url: str) -> None:
    store, root = open_store(url)
    with asking(url):
        store.info(root)


def _nodes(folders: list[Path], videos: list[Path], urls: dict[str, str]) -> Iterator[tuple[str, str]]:
    """Whether each node sees these places, has these versions, hides its GPUs, and can use the URLs."""
    content = secrets.token_hex(8)
    tokens = [folder / f".doctor-{content}" for folder in folders]
    own = versions()
    try:
        for token in tokens:
            token.write_text(content)
        for node in (node for node in ray.nodes() if node["Alive"]):
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            place = f"node {node['NodeManagerAddress']}"
            looking = _look.options(scheduling_strategy=there).remote(tokens, videos, urls)
            try:
                seen, found, theirs, problems, hidden = ray.get(looking, timeout=_ANSWERS_WITHIN_S)
            except Exception as error:
                yield f"{place} runs a task", " ".join(str(error).split())
                continue
            for folder, read in zip(folders, seen, strict=True):
                yield f"{place} sees {folder}", "" if read == content else _UNSEEN
            for video, is_there in zip(videos, found, strict=True):
                yield f"{place} sees {video}", "" if is_there else _UNSEEN
            other = [f"{name} {theirs[name]}, here {own[name]}" for name in own if theirs[name] != own[name]]
            yield f"{place} has the versions of this one", "; ".join(other)
            if "GPU" in node["Resources"]:
                shown = (
                    "" if hidden else "it does not; start Ray there with RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO=1"
                )
                yield f"{place} hides its GPUs from what reserves none", shown
            for key, url in urls.items():
                yield f"{place} can use {key} {url}", problems[key]
    finally:
        for token in tokens:
            token.unlink(missing_ok=True)
