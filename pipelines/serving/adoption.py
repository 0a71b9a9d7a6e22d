"""What a `prophy serve` leaves running on a cluster when it is killed: the same command goes on with it."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray import serve
from ray.serve.context import _get_global_client
from ray.serve.schema import ApplicationStatus

from pipelines.config import Config
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

APP_NAME = "prophy"
GONE_WITHIN_S = 30.0  # until Ray knows that the node of an earlier command is lost
_STARTING = (ApplicationStatus.NOT_STARTED, ApplicationStatus.DEPLOYING)
_SERVING = (ApplicationStatus.RUNNING, ApplicationStatus.UNHEALTHY)


class _Command:
    """Stands for a command, and ends with it."""


@contextmanager
def alone() -> Iterator[None]:
    """Holds this cluster's Serve for one command.

    Raises:
        ProPhyError: another command holds it.
    """
    named = {"name": "prophy-serve", "namespace": APP_NAME, "num_cpus": 0}
    deadline = time.monotonic() + GONE_WITHIN_S
    while True:
        try:
            command: Any = ray.remote(_Command).options(**named).remote()
            break
        except ValueError:  # the name is taken
            if time.monotonic() > deadline:
                raise ProPhyError(
                    "another `prophy serve` runs on this cluster; stop it, or use another cluster"
                ) from None
            time.sleep(0.5)
    try:
        yield
    finally:
        ray.kill(command)


def adopt(config: Config) -> str | None:
    """Waits until the server that an earlier command left here runs; None if there is none.

    Returns:
        Its URL.

    Raises:
        ProPhyError: something else runs here, or with other settings, or the server does not come to run.
    """
    if not (running := serve.status().applications):
        return None
    if [*running] != [APP_NAME]:
        raise ProPhyError(
            f"Ray Serve already runs here, with {', '.join(running)}; stop it, or use another cluster"
        )
    while (status := serve.status().applications[APP_NAME].status) in _STARTING:
        time.sleep(0.5)
    if status not in _SERVING:
        raise ProPhyError(
            f"the server that an earlier command left here is {status.value}; end it with `serve shutdown`, "
            "and run this command again"
        )
    theirs: Config = serve.get_app_handle(APP_NAME).configuration.remote().result()
    others = ", ".join(name for name, value in config if dict(theirs).get(name) != value)
    if others:
        raise ProPhyError(
            f"a server with other settings runs here: {others} differ; give the command that started it, or "
            "end it with `serve shutdown`"
        )
    logger.info("going on with the server that an earlier command left here")
    client = _get_global_client()
    assert client is not None
    return f"http://{client.http_config.host}:{client.http_config.port}"
