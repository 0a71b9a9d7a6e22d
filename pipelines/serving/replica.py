"""A replica of the model: one video at a time, in a thread. Alone it knows neither Ray nor HTTP."""

import asyncio
import logging
import os
import threading
from collections.abc import AsyncGenerator
from concurrent.futures import ThreadPoolExecutor

from pipelines.config import Config
from pipelines.generation.spec import ShapeLimits, VideoResult, VideoSpec
from pipelines.serving.dispatcher import GenerationStep

logger = logging.getLogger("ray.serve")  # a replica's own: JSON lines with its context


class AbortedError(Exception):
    """The caller no longer wants the video."""


class GangError(Exception):
    """The processes that share a replica's videos are no longer together."""


class VideoGenerator:
    """Holds the model and makes one video at a time. It exists once a first forward pass has run.

    Where `serve.processes_per_replica` processes share its videos, it is the first of them.

    Args:
        config: the run.
        limits: the shapes that the model can make.
    """

    def __init__(self, config: Config, limits: ShapeLimits) -> None:
        # torch and diffusers: of no use to who deploys it
        from pipelines.generation.sampler import VideoSampler

        sampler: type[VideoSampler] = VideoSampler
        if config.serve.processes_per_replica > 1:
            from pipelines.serving.gang import Gang  # Ray

            sampler = Gang
        self._sampler = sampler(config)
        self._sampler.warm_up(limits)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def check_health(self) -> None:
        """Raises what the device raises; Serve asks every 10 s, and replaces a replica after three errors.

        Without a process that shares its videos this one ends at once: it may wait for it on the device.
        """
        try:
            await asyncio.to_thread(self._sampler.check_device)
        except GangError as error:
            _give_way(error)

    async def generate(self, spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        """Makes a video, in a thread; a caller that goes away stops it after the current denoising step.

        It begins with `image`, a file's content, if there is one.

        The first step is reported once the video before, should it be on its way out, has left the thread.
        After an error of the device, or of a process that shares the video, this one ends: all that follows
        there would fail too, and at once, so that such a replica would be the free one for every job of the
        queue.
        """
        loop = asyncio.get_running_loop()
        steps: asyncio.Queue[GenerationStep] = asyncio.Queue()
        stopped = threading.Event()

        def report(progress: float) -> None:
            if stopped.is_set():
                raise AbortedError
            loop.call_soon_threadsafe(steps.put_nowait, GenerationStep(progress))

        def render() -> VideoResult:
            report(0.0)
            try:
                return self._sampler.render(spec, report, image)
            except Exception as error:
                from prophy.device import is_device_error  # torch

                if isinstance(error, GangError) or is_device_error(error):
                    _give_way(error)
                raise

        def wake(making: asyncio.Future[VideoResult]) -> None:
            steps.put_nowait(GenerationStep(1.0))
            if stopped.is_set() and not making.cancelled():
                making.exception()  # AbortedError: nobody else asks for it

        making = loop.run_in_executor(self._thread, render)
        making.add_done_callback(wake)
        try:
            while not making.done():
                yield await steps.get()
            yield GenerationStep(1.0, await making)
        finally:
            stopped.set()


def _give_way(error: Exception) -> None:
    """Ends this process, whatever it waits for; Serve starts a new replica."""
    logger.critical("this replica fails, and gives way to a new one", exc_info=error)
    logging.shutdown()
    os._exit(1)
