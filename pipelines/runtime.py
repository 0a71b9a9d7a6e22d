"""What every command shares: the run folder, a connection to Ray, and errors that reach the user."""

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path
from typing import Any

import ray
import yaml
from ray.data import DataContext
from ray.exceptions import RayTaskError
from ray.train import TrainingFailedError

from pipelines.config import RESOLVED, Config, how_keys, read_saved, to_yaml
from pipelines.layout import RunFolder
from prophy.errors import ProPhyError
from prophy.hashing import home

LIBRARIES = ("torch", "ray", "deepspeed", "diffusers", "transformers", "pyarrow", "prophy-ray")

# Variables that Ray starts with, where the user has not set them; `cluster/Dockerfile` sets them too.
WORKER_ENVIRONMENT = {
    # By default each of a process's many threads has heaps, of glibc and of Arrow, and they grow for hours.
    "MALLOC_ARENA_MAX": "1",
    "ARROW_DEFAULT_MEMORY_POOL": "system",
    # By default the history of 100,000 tasks is kept: some 2 kB for each clip or two.
    "RAY_task_events_max_num_task_in_gcs": "1000",
    # By default workers yield to all else that runs, which slows them on a machine of few cores.
    "RAY_worker_niceness": "0",
    # By default what reserves no GPU sees all of them, and would take one beside what has reserved it.
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "1",
    # By default a node that is not there after 30 s, as on a busy machine, is given up.
    "RAY_raylet_start_wait_time_s": "180",
}

_ANSWERS_WITHIN_S = 10.0
_ADVICE = "\nFailed to apply UDF"

# What a command makes depends on these sections, except for the keys that are marked `How`; its results in
# one run folder must agree in them.
_SECTIONS = {
    "simulate": ("simulate",),
    "pretrain": ("pretrain",),
    "train": ("backbone", "vlm", "physics", "train"),
}


def versions() -> dict[str, str]:
    """The versions of Python and of the libraries that decide what a run makes."""
    return {"python": sys.version.split()[0], **{name: version(name) for name in LIBRARIES}}


def open_run(config: Config, command: str) -> Path:
    """Creates the run folder, or checks that what `command` made there belongs to this configuration.

    Writes `<command>.yaml` (the resolved configuration) and `versions.yaml`.

    Raises:
        ProPhyError: the folder holds a run that does not fit this configuration, or something else under
            the name of its configuration, or cannot be written.
    """
    folder = config.run_dir
    places = RunFolder(folder)
    saved = places.config(command)
    partial = saved.with_name(f"{saved.name}.{os.getpid()}")
    if saved.exists():
        _check_same_run(read_saved(saved, command, _SECTIONS.get(command, ())), config, command)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        partial.write_text(RESOLVED + to_yaml(config))
        partial.replace(saved)
        places.versions.write_text(yaml.safe_dump(versions(), sort_keys=False))
    except OSError as error:
        raise ProPhyError(
            f"cannot write to run_dir {folder}: {error.strerror}; choose another run_dir"
        ) from None
    return folder


def _check_same_run(saved: dict[str, Any], config: Config, command: str) -> None:
    current = config.model_dump(mode="json")
    for section in _SECTIONS.get(command, ()):
        free = how_keys(type(getattr(config, section)))
        for key, value in current[section].items():
            before = saved[section].get(key)
            # Beside buckets they decided nothing, and were any.
            idle = key in ("height", "width") and current[section].get("aspect_buckets") is not None
            if key not in free and not idle and before != value:
                raise ProPhyError(
                    f"{config.run_dir} belongs to another run: {section}.{key} is {before!r} there "
                    f"and {value!r} here; choose another run_dir, or set it back"
                )


@contextmanager
def ray_session(config: Config, environment: Mapping[str, str] | None = None) -> Iterator[None]:
    """Uses the Ray that is there (this process's, or the cluster of RAY_ADDRESS), else starts a local one.

    A local instance ends with the block. A `ProPhyError` raised inside a worker comes out as itself.

    Args:
        config: the run.
        environment: variables that a local instance gives to its workers.

    Raises:
        ProPhyError: the cluster cannot be reached or is of another version, or Ray does not start.
    """
    started = not ray.is_initialized()
    if started:
        if address := os.environ.get("RAY_ADDRESS"):
            _connect(address)
        else:
            os.environ.update({**WORKER_ENVIRONMENT, **os.environ, **(environment or {})})
            os.environ["PROPHY_HOME"] = str(home())  # Ray gives workers of training other working directories
            _start(config)
    # Else Ray Data wraps an exception in one that loses its cause on the way here.
    DataContext.get_current().raise_original_map_exception = True
    try:
        yield
    except Exception as error:
        user_error = find_user_error(error)
        if user_error is None:
            raise
        # Ray Data appends its advice on retries to what a row raises.
        user_error.args = (str(user_error).partition(_ADVICE)[0],)
        raise user_error from None
    finally:
        if started:
            ray.shutdown()


def _connect(address: str) -> None:
    host, _, port = address.rpartition(":")
    if port.isdecimal() and "/" not in host:  # Ray would ask for minutes
        try:
            socket.create_connection((host.strip("[]"), int(port)), _ANSWERS_WITHIN_S).close()
        except OSError as error:
            raise ProPhyError(
                f"nothing answers at RAY_ADDRESS {address} ({error.strerror or error}); set it to the "
                "cluster's HOST:PORT, or unset it to run here"
            ) from None
    try:
        ray.init()
    except Exception as error:
        raise ProPhyError(f"cannot use the cluster at RAY_ADDRESS {address}: {_in_one_line(error)}") from None


def _start(config: Config) -> None:
    try:
        ray.init("local", num_cpus=config.ray.num_cpus, include_dashboard=True)
    except Exception as error:  # Ray has no narrower class for a node that it waited for in vain
        raise ProPhyError(
            f"Ray does not start here: {_in_one_line(error)} Where the machine is busy with other work, run "
            "the same command again later"
        ) from None


def _in_one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def find_user_error(error: BaseException | None) -> ProPhyError | None:
    """The `ProPhyError` at the root of what Ray wrapped, if there is one."""
    if isinstance(error, RayTaskError):  # first: Ray makes it a subclass of its cause, with a longer message
        return find_user_error(error.cause)
    if error is None or isinstance(error, ProPhyError):
        return error
    inner = [error.__cause__]
    if isinstance(error, TrainingFailedError):
        inner += list(getattr(error, "worker_failures", {}).values())
    return next((found for cause in inner if (found := find_user_error(cause)) is not None), None)
