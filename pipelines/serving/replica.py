"""A replica of the model: one video at a time, in a thread. It knows neither Ray nor HTTP."""

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


class VideoGenerator:
    """Holds the model and makes one video at a time. It exists once a first forward pass has run.

    Args:
        config: the run.
        limits: the shapes that the model can make.
    """

    def __init__(self, config: Config, limits: ShapeLimits) -> None:
        # torch and diffusers: of no use to who deploys it
        from pipelines.generation.sampler import VideoSampler

        self._sampler = VideoSampler(config)
        self._sampler.warm_up(limits)
        self._thread = ThreadPoolExecutor(max_workers=1)

    async def check_health(self) -> None:
        """Raises what the device raises; Serve asks every 10 s, and replaces a replica after three errors."""
        await asyncio.to_thread(self._sampler.check_device)

    async def generate(self, spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        """Makes a video, in a thread; a caller that goes away stops it after the current denoising step.

        It begins with `image`, a file's content, if there is one.

        The first step is reported once the video before, should it be on its way out, has left the thread.
        After an error of the device the process ends: all that follows there would fail too, and at once, so
        that such a replica would be the free one for every job of the queue.
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

                if is_device_error(error):
                    logger.critical("the device fails; this replica gives way to a new one", exc_info=error)
                    logging.shutdown()
                    os._exit(1)
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
