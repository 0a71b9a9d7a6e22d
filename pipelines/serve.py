"""`prophy serve`: the Videos API on Ray Serve, with model replicas that scale with the queue.

`VideoAPI` is the one ingress: it owns the job database and the finished videos. `VideoGenerator` replicas
hold the model and nothing else: a call brings a specification, and streams progress and then the mp4 back.
"""

import asyncio
import signal
import socket
import tempfile
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator
from ray.serve.schema import ReplicaState

from pipelines.api import VideoService, create_app
from pipelines.config import Config
from pipelines.jobs import Dispatcher, GenerationStep, JobStore
from pipelines.runtime import open_run, ray_session
from pipelines.spec import ShapeLimits, VideoSpec
from prophy.errors import ProPhyError

APP_NAME = "prophy"
MAX_CONNECTIONS = 1000


class AbortedError(Exception):
    """The caller no longer wants the video."""


class VideoGenerator:
    """Holds the model and makes one video at a time.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        from pipelines.sampling import VideoSampler  # torch and diffusers: of no use to the ingress

        self._sampler = VideoSampler(config)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def generate(self, spec: VideoSpec) -> AsyncIterator[GenerationStep]:
        """Makes a video, in a thread; a caller that goes away stops it after the current denoising step."""
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[GenerationStep] = asyncio.Queue()
        stopped = threading.Event()

        def report(progress: float) -> None:
            if stopped.is_set():
                raise AbortedError
            loop.call_soon_threadsafe(steps.put_nowait, GenerationStep(progress))

        def make() -> bytes:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder) / "video.mp4"
                self._sampler.write(spec, path, report)
                return path.read_bytes()

        def wake(making: asyncio.Future[bytes]) -> None:
            steps.put_nowait(GenerationStep(1.0))
            if stopped.is_set() and not making.cancelled():
                making.exception()  # AbortedError: nobody else asks for it

        yield GenerationStep(0.0)
        making = loop.run_in_executor(self._thread, make)
        making.add_done_callback(wake)
        try:
            while not making.done():
                yield await steps.get()
            yield GenerationStep(1.0, await making)
        finally:
            stopped.set()


@serve.ingress()
class VideoAPI:
    """The HTTP side: routes, jobs and dispatcher, in one process without torch.

    Args:
        config: the run.
        limits: the shapes that the model can make.
        output: folder of the database and the videos.
        generator: the `VideoGenerator` deployment.
    """

    def __init__(
        self, config: Config, limits: ShapeLimits, output: Path, generator: DeploymentHandle
    ) -> None:
        self._min_replicas = config.serve.min_replicas
        self._generator = generator
        output.mkdir(parents=True, exist_ok=True)
        store = JobStore(f"sqlite:///{output / 'jobs.sqlite'}")
        dispatcher = Dispatcher(store, output / "videos", self._generate)
        self._service = VideoService(config, limits, store, dispatcher, self._is_ready)

    def __serve_build_asgi_app__(self) -> FastAPI:
        return create_app(self._service)

    async def _generate(self, spec: VideoSpec) -> AsyncIterator[GenerationStep]:
        response = self._generator.options(stream=True).generate.remote(spec)
        assert isinstance(response, DeploymentResponseGenerator)
        try:
            async for step in response:
                yield step
        finally:
            response.cancel()

    async def _is_ready(self) -> bool:
        status = await asyncio.to_thread(serve.status)
        replicas = status.applications[APP_NAME].deployments["VideoGenerator"].replica_states
        return replicas.get(ReplicaState.RUNNING, 0) >= self._min_replicas


def build_app(config: Config) -> serve.Application:
    """The Serve application of a run; also the builder that a Serve configuration file names.

    Raises:
        ProPhyError: the checkpoint was trained on another backbone.
    """
    from pipelines.sampling import check_model, shape_limits

    settings = config.serve
    check_model(config)
    generator = serve.deployment(
        max_ongoing_requests=1,
        ray_actor_options={"num_cpus": settings.num_cpus, "num_gpus": settings.num_gpus},
        autoscaling_config={
            "min_replicas": settings.min_replicas,
            "max_replicas": settings.max_replicas,
            "target_ongoing_requests": 1,
            "upscale_delay_s": settings.upscale_delay_s,
            "downscale_delay_s": settings.downscale_delay_s,
        },
        graceful_shutdown_wait_loop_s=0.1,
        graceful_shutdown_timeout_s=settings.drain_timeout_s,
    )(VideoGenerator).bind(config)
    api = serve.deployment(
        num_replicas=1,  # the one owner of the database
        max_ongoing_requests=MAX_CONNECTIONS,
        ray_actor_options={"num_cpus": 0},
        graceful_shutdown_wait_loop_s=0.1,
    )(VideoAPI)
    return api.bind(config, shape_limits(config), settings.output, generator)


@contextmanager
def serving(config: Config) -> Iterator[str]:
    """Serves a run while the block lasts; jobs that are unfinished at its end wait for the next server.

    Yields:
        The URL of the server, which accepts requests.

    Raises:
        ProPhyError: the port is taken, Ray Serve is in use here, or the checkpoint is of another backbone.
    """
    port = _free_port(config.serve.host, config.serve.port)
    app = build_app(config)
    open_run(config, "serve")
    with ray_session(config):
        running = ", ".join(serve.status().applications)
        if running:
            raise ProPhyError(f"Ray Serve already runs here, with {running}; stop it, or use another cluster")
        serve.start(proxy_location="HeadOnly", http_options={"host": config.serve.host, "port": port})
        try:
            serve.run(app, name=APP_NAME, logging_config={"enable_access_log": False})
            yield f"http://{config.serve.host}:{port}"
        finally:
            serve.shutdown()


def run(config: Config) -> None:
    """Serves until Ctrl-C or SIGTERM."""
    stop = threading.Event()
    with serving(config) as url:
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stop.set())
        print(
            f"serving on {url} (API: {url}/docs); Ctrl-C stops\n"
            f"  curl {url}/v1/videos -F prompt='a red ball falls and bounces'\n"
            f"  curl {url}/v1/videos/VIDEO_ID\n"
            f"  curl {url}/v1/videos/VIDEO_ID/content -o video.mp4",
            flush=True,
        )
        stop.wait()


def _free_port(host: str, port: int) -> int:
    """The port itself, or any free one for 0.

    Raises:
        ProPhyError: the port is taken.
    """
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ProPhyError(
                f"cannot listen on {host}:{port} ({error.strerror}); choose another serve.host or serve.port"
            ) from None
        return probe.getsockname()[1]
