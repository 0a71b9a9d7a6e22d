"""What routes act on, without HTTP: work whose client leaves."""

import asyncio
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from pipelines.generation.spec import SPRITESHEET_FILE, VIDEO_FILE
from pipelines.serving import service as service_module
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.dispatcher import Dispatcher
from pipelines.serving.errors import ApiError
from pipelines.serving.jobs import JobStore
from pipelines.serving.metrics import Metrics
from pipelines.serving.service import GeneratorStatus, VideoService
from tests.conftest import tiny_config
from tests.pipelines.serving.test_dispatcher import run, two_steps
from tests.pipelines.serving.test_jobs import SPEC
from tests.servers import LIMITS


class Drawer:
    """Draws when it is let, and knows how often at once it was asked to."""

    def __init__(self) -> None:
        self.allowed = asyncio.Event()
        self.kinds = list[str]()
        self.at_work = self.most_at_work = 0

    async def __call__(self, kind: str, *of: Any) -> bytes:
        """As the process that draws, it is not stopped by who no longer waits."""
        self.kinds.append(kind)
        self.at_work += 1
        self.most_at_work = max(self.most_at_work, self.at_work)
        drawing = asyncio.create_task(self.allowed.wait())
        drawing.add_done_callback(self._done)
        await asyncio.shield(drawing)
        return b"drawn"

    def _done(self, _: asyncio.Task[bool]) -> None:
        self.at_work -= 1


@pytest.fixture
def service(tmp_path: Path) -> Callable[[Drawer], VideoService]:
    """What makes a service with one video, of the job that is the only one of its store."""
    config = tiny_config(tmp_path)
    config.serve.output.mkdir(parents=True)

    async def status() -> GeneratorStatus:
        return GeneratorStatus(is_ready=True, num_replicas=1)

    def make(drawer: Drawer) -> VideoService:
        store, metrics = JobStore(config.serve.database_url), Metrics()
        artefacts = ArtefactStore(config.serve.videos_location)
        artefacts.write(store.create(SPEC).id, {VIDEO_FILE: b"mp4"})
        dispatcher = Dispatcher(store, artefacts, two_steps, metrics, config.serve)
        return VideoService(config, LIMITS, store, artefacts, dispatcher, metrics, status, drawer)

    return make


def test_clients_that_leave_have_one_thing_drawn_at_a_time(
    service: Callable[[Drawer], VideoService],
) -> None:
    async def scenario() -> None:
        drawer = Drawer()
        videos = service(drawer)
        [job], _ = videos.store.page(None, 1, "asc")
        for _ in range(3):
            drawn = videos.draw_once(job, SPRITESHEET_FILE, "draw_spritesheet", [VIDEO_FILE], SPEC)
            request = asyncio.create_task(drawn)
            await asyncio.sleep(0)  # it waits for its turn
            while not drawer.kinds:
                await asyncio.sleep(0.01)
            request.cancel()
            await asyncio.gather(request, return_exceptions=True)
        image = asyncio.create_task(videos.look_at(b"an image", SPEC))
        await asyncio.sleep(0)
        assert drawer.kinds == ["draw_spritesheet"], "the others waited, and left"
        drawer.allowed.set()
        await image
        assert drawer.kinds == ["draw_spritesheet", "draw_preview"] and drawer.most_at_work == 1
        assert videos.artefacts.read(job.id, SPRITESHEET_FILE) == b"drawn", "it is kept for the next"
        videos.store.close()

    run(scenario)


def test_slow_clients_do_not_keep_others_waiting(
    service: Callable[[Drawer], VideoService], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(service_module, "LONG_BODY_TURN_WITHIN_S", 0.05)

    async def scenario() -> None:
        videos = service(Drawer())
        async with AsyncExitStack() as others:
            for _ in range(service_module.MAX_LONG_BODIES):
                await others.enter_async_context(videos.reading_long_body())
            with pytest.raises(ApiError, match="4 images are being sent already") as refused:
                await others.enter_async_context(videos.reading_long_body())
            assert refused.value.status == 503 and refused.value.headers == {"retry-after": "10"}
        async with videos.reading_long_body():
            pass
        videos.store.close()

    run(scenario)
