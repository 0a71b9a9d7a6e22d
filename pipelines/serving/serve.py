"""`prophy serve`: the Videos API on Ray Serve, with model replicas that scale with the queue.

`VideoAPI` is the one ingress: it owns the job database and all files. `VideoGenerator` replicas hold the
model and nothing else: a call brings a specification and an image, and streams progress and the mp4 back.
"""

import asyncio
import faulthandler
import ipaddress
import logging
import os
import re
import signal
import textwrap
import threading
from collections.abc import AsyncGenerator, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
from fastapi import FastAPI
from pydantic import BaseModel
from ray import serve
from ray.exceptions import RayError, RayTaskError
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ApplicationStatus, DeploymentStatus, LoggingConfig, ReplicaState

from pipelines.config import Config, ServeConfig, load_config
from pipelines.generation.limits import check_model, check_sharing, shape_limits
from pipelines.generation.spec import ShapeLimits, VideoSpec
from pipelines.resources import needs_of, room_for
from pipelines.runtime import find_user_error, open_run, ray_session
from pipelines.serving import haproxy
from pipelines.serving.adoption import APP_NAME, adopt, alone
from pipelines.serving.api import create_app
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.dispatcher import Dispatcher, GenerationStep, ReplicaDiedError
from pipelines.serving.errors import ApiError
from pipelines.serving.jobs import JobStore
from pipelines.serving.metrics import Metrics
from pipelines.serving.middleware import too_long
from pipelines.serving.replica import VideoGenerator
from pipelines.serving.service import GeneratorStatus, VideoService
from prophy.errors import ProPhyError

logger = logging.getLogger("ray.serve")  # the ingress's own: JSON lines with its context

MAX_CONNECTIONS = 1000
STOP_WITHIN_S = 120  # Serve waits up to 30 s for its parts; ray.shutdown() sets itself no limit


@ray.remote(num_cpus=0)
def draw(kind: str, *of: Any) -> bytes:
    """A function of `pipelines.serving.drawing` in a process of its own: it takes seconds."""
    from pipelines.serving import drawing

    return getattr(drawing, kind)(*of)


async def _draw(kind: str, *of: Any) -> bytes:
    try:
        return await draw.remote(kind, *of)
    except RayTaskError as error:
        raise find_user_error(error) or error from None


@serve.ingress()
class VideoAPI:
    """The HTTP side: routes, jobs and dispatcher, in one process without torch.

    Args:
        config: the run.
        limits: the shapes that the model can make.
        generator: the `VideoGenerator` deployment.

    Raises:
        ProPhyError: the job database cannot be opened, or another server uses it.
    """

    def __init__(self, config: Config, limits: ShapeLimits, generator: DeploymentHandle) -> None:
        logger.addFilter(_is_news)
        ours = logging.getLogger("pipelines.serving")  # where jobs and dispatcher log, which know no Serve
        ours.setLevel(logging.INFO)
        ours.handlers, ours.propagate = logger.handlers, False
        self._generator = generator
        settings, metrics = config.serve, Metrics()
        store = JobStore(settings.database_url)
        artefacts = ArtefactStore(settings.videos_location)
        self._service = VideoService(
            config,
            limits,
            store,
            artefacts,
            Dispatcher(store, artefacts, self._generate, metrics, settings),
            metrics,
            _generator_status,
            _draw,
        )

        _bound_bodies(self._service)

    def configuration(self) -> Config:
        """That of the run, for a command that finds it running."""
        return self._service.config

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)

    async def _generate(self, spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        # While it waits for a replica, Ray's store holds the image: there its memory is bounded.
        held = None if image is None else ray.put(image)
        response = self._generator.options(stream=True).generate.remote(spec, held)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for step in response:
                yield step
        except RayTaskError as error:  # the replica lives: the video is at fault
            raise find_user_error(error) or error.cause from None
        except RayError as error:
            raise ReplicaDiedError(str(error)) from error
        finally:
            response.cancel()


def _bound_bodies(service: VideoService) -> None:
    """Has the server before the ingress, which Serve runs in its process, refuse longer bodies."""
    haproxy.ProxyErrors.max_body_bytes = service.max_body_bytes
    haproxy.ProxyErrors.too_long = too_long(service.max_body_bytes, service.longest_field)


async def _generator_status() -> GeneratorStatus:
    """As Serve sees it: ready while a replica can make videos, or comes with the next one.

    Raises:
        ApiError: Serve's controller is starting anew.
    """
    try:
        application = (await asyncio.to_thread(serve.status)).applications[APP_NAME]
        replicas = application.deployments["VideoGenerator"].replica_states
    except (RayError, KeyError):
        raise ApiError(503, "Serve is starting anew; try again later", "unavailable") from None
    num_replicas = replicas.get(ReplicaState.RUNNING, 0)
    # Without replicas, what is RUNNING was scaled to zero; with some, it may be in any state, such as
    # UNHEALTHY where there is no room for one more.
    is_ready = num_replicas > 0 or application.status == ApplicationStatus.RUNNING
    return GeneratorStatus(is_ready, num_replicas)


def _is_news(record: logging.LogRecord) -> bool:
    """Whether a line of Serve's log says something.

    Serve warns, again and again, of a call that waits for a replica; here that is a video in the queue. It
    also notes each probe that found the server well.
    """
    message = record.getMessage()
    waits = message.startswith(("Failed to route request after", "Failed to get queue length from"))
    return not waits and not re.match(r"GET /(healthz|health|readyz) 200 ", message)


class AppArguments(BaseModel, extra="forbid"):
    """What a Serve configuration file says of a run, as the command line does.

    Attributes:
        config: a preset, or the path of a YAML file that all nodes see.
        set: `section.key=value` each.
    """

    config: str
    set: list[str] = []


def app(arguments: AppArguments) -> serve.Application:
    """Builds the application for `serve deploy` and KubeRay, by `import_path: pipelines.serving.serve:app`.

    Raises:
        ProPhyError: as `load_config` and `build_app` do.
    """
    return build_app(load_config(arguments.config, arguments.set))


def build_app(config: Config) -> serve.Application:
    """The Serve application of a run.

    Raises:
        ProPhyError: open to other machines without keys; no such model, or a step cache that is none for the
            images that it always takes; as `check_sharing`; or the job database is a file, and this cluster
            has several nodes.
    """
    settings = config.serve
    _check_keys(settings)
    if settings.database_url.startswith("sqlite") and sum(node["Alive"] for node in ray.nodes()) > 1:
        raise ProPhyError(
            "this cluster has several nodes, and a job database in a file stays on one of them; set "
            "serve.database to PostgreSQL, as postgresql://USER@HOST/DATABASE"
        )
    limits = shape_limits(config)
    if limits.images == "always":
        limits.check_image(True, config.sampling.step_cache)
    check_sharing(config, limits)
    settings.output.mkdir(parents=True, exist_ok=True)
    generator = serve.deployment(
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        **_gang_options(settings),
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "initial_replicas": max(1, settings.min_replicas),  # a model that cannot run says so at once
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": 1,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
            "metrics_interval_s": 1.0,  # by default the queue is seen every 10 s and averaged over 30
            "look_back_period_s": 2.0,
        },
        request_router_config={"max_backoff_s": 0.1},  # else a replica idles up to 0.5 s
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )(VideoGenerator).bind(config, limits)
    api = serve.deployment(
        num_replicas=1,  # the one owner of the database
        max_ongoing_requests=MAX_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
    )(VideoAPI)
    return api.bind(config, limits, generator)


def _gang_options(settings: ServeConfig) -> dict[str, Any]:
    """Has Ray reserve what all processes of a replica need, on one node, and all at once."""
    if settings.processes_per_replica == 1:
        return {}
    bundle = {"CPU": settings.num_cpus, "GPU": settings.num_gpus}
    return {
        "placement_group_bundles": [bundle] * settings.processes_per_replica,
        "placement_group_strategy": "STRICT_PACK",
    }


@contextmanager
def serving(config: Config) -> Iterator[str]:
    """Serves a run while the block lasts; jobs that are unfinished at its end wait for the next server.

    On a cluster, what a `prophy serve` that was killed has left running is gone on with.

    Yields:
        The URL of the server, which accepts requests.

    Raises:
        ProPhyError: open to other machines without keys, the port is taken, the job database cannot be
            opened or read or is in use, Ray Serve does not start or is in use here, the checkpoint is of
            another backbone, or the model cannot run.
    """
    settings = config.serve
    _check_keys(settings)
    check_model(config)
    on_cluster = ray.is_initialized() or "RAY_ADDRESS" in os.environ
    with ExitStack() as stack:
        if on_cluster:
            stack.enter_context(ray_session(config))
            stack.enter_context(alone())
            if url := adopt(config):
                stack.callback(serve.shutdown)
                yield url
                return
        port = _check_place(settings)
        open_run(config, "serve")
        if not on_cluster:  # other folders may have paths too long for HAProxy's sockets
            folder = stack.enter_context(TemporaryDirectory(prefix="prophy-", dir="/tmp"))
            stack.enter_context(ray_session(config, haproxy.environment(Path(folder))))
        app = build_app(config)
        room_for(needs_of(config, "serve"))
        stack.callback(serve.shutdown)
        _deploy(app, settings.host, port)
        yield f"http://{settings.host}:{port}"


def _check_place(settings: ServeConfig) -> int:
    """What can be wrong with port, folder and database, the user hears before Ray starts; returns the port.

    Raises:
        ProPhyError: something is.
    """
    try:
        port = haproxy.free_port(settings.host, settings.port)
    except OSError as error:
        raise ProPhyError(
            f"cannot listen on {settings.host}:{settings.port} ({error.strerror}); choose another serve.host "
            "or serve.port"
        ) from None
    try:
        settings.output.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ProPhyError(
            f"cannot write to serve.output {settings.output}: {error.strerror}; choose another"
        ) from None
    with JobStore(settings.database_url) as store:
        store.check()
    return port


def _deploy(app: serve.Application, host: str, port: int) -> None:
    """Returns once the first replica of the model has made a first forward pass.

    Raises:
        ProPhyError: that cannot be done.
    """
    options = {"host": host, "port": port}
    try:
        try:
            serve.start(proxy_location="HeadOnly", http_options=options)
        except TimeoutError:  # after a minute; on a busy machine the proxies are still about to start
            serve.start(proxy_location="HeadOnly", http_options=options)
        serve.run(app, name=APP_NAME, logging_config=LoggingConfig(encoding="JSON"))
    except (RayError, RuntimeError, TimeoutError) as error:
        raise ProPhyError(_why_not(error)) from None


def _why_not(error: Exception) -> str:
    """What keeps the server from starting, in one sentence."""
    try:
        deployments = serve.status().applications[APP_NAME].deployments
    except (RayError, KeyError):
        deployments = {}
    for name, deployment in deployments.items():
        if deployment.status == DeploymentStatus.DEPLOY_FAILED:
            return f"{name} does not start: {deployment.message.strip().splitlines()[-1]}"
    cause = str(error.cause if isinstance(error, RayTaskError) else error)
    reason = textwrap.shorten(cause, 500)
    return f"Ray Serve does not start: {reason}; is the machine too busy, or the port taken since?"


def run(config: Config) -> None:
    """Serves until Ctrl-C or SIGTERM.

    Should Ray hang at its end, the process says where and leaves with exit code 1 after `STOP_WITHIN_S`;
    a local Ray goes with it, and unfinished jobs wait for the next server as ever.
    """
    stop = threading.Event()
    with serving(config) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(
            f"serving on {url} (a page for people; the API: {url}/docs); Ctrl-C stops\n"
            f"  prophy request 'a red ball falls and bounces' --out ball.mp4 --url {url}\n"
            f"  curl {url}/v1/videos -F prompt='a red ball falls and bounces'\n"
            f"  curl {url}/v1/videos/VIDEO_ID\n"
            f"  curl {url}/v1/videos/VIDEO_ID/content -o video.mp4",
            flush=True,
        )
        stop.wait()
        faulthandler.dump_traceback_later(STOP_WITHIN_S, exit=True)
    faulthandler.cancel_dump_traceback_later()


def _check_keys(settings: ServeConfig) -> None:
    if not settings.api_keys and not _is_loopback(settings.host):
        raise ProPhyError(
            f"serve.host {settings.host} lets other machines in, and there are no keys; make one with "
            "`prophy key` and put its hash into serve.api_keys, or serve on 127.0.0.1"
        )


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
