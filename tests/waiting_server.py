"""`prophy serve` as the command line runs it, with a model that only waits for a file `go` in the run folder.

    python -m tests.waiting_server serve --set run_dir=...

What it begins and ends, it notes in `renders.log` beside that. With a file `broken` there it does not start;
with a file `device error`, which it takes away, the device of this process fails, now and from then on.
"""

import contextlib
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from pipelines import cli
from pipelines.config import Config
from pipelines.generation.spec import THUMBNAIL_FILE, VIDEO_FILE, ShapeLimits, VideoResult, VideoSpec
from pipelines.serving import serve


class WaitingSampler:
    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._device_fails = False

    def check_device(self) -> None:
        if self._device_fails:
            import torch  # takes seconds, which the other replicas do without

            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")

    def render(self, spec: VideoSpec, on_step: Callable[[float], None], image: bytes | None) -> VideoResult:
        self._note("begin", spec)
        begun = time.monotonic()
        with contextlib.suppress(FileNotFoundError):
            (self._folder / "device error").unlink()
            self._device_fails = True
        self.check_device()
        while not (self._folder / "go").exists():
            time.sleep(0.05)
            on_step(0.5)
        self._note("end", spec)
        files = {VIDEO_FILE: str(spec.seed).encode(), THUMBNAIL_FILE: b"webp"}
        return VideoResult(files, {"denoise": time.monotonic() - begun})

    def _note(self, event: str, spec: VideoSpec) -> None:
        with (self._folder / "renders.log").open("a") as log:
            log.write(f"{event} {spec.seed} {os.getpid()}\n")


class VideoGenerator(serve.VideoGenerator):
    def __init__(self, config: Config, limits: ShapeLimits) -> None:
        if (config.run_dir / "broken").exists():
            raise MemoryError("no memory for the model")
        self._sampler: Any = WaitingSampler(config.run_dir)
        self._thread = ThreadPoolExecutor(max_workers=1)


if __name__ == "__main__":
    setattr(serve, "VideoGenerator", VideoGenerator)  # noqa: B010 - to mypy a class is no variable
    cli.main()
