"""The dispatcher over a real job store and real files; only the making of a video is a stand-in."""

import asyncio
import errno
import hashlib
import os
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from fsspec.implementations.memory import MemoryFileSystem
from sqlalchemy.exc import OperationalError

from pipelines.config import ServeConfig
from pipelines.generation.spec import (
    IMAGE_FILE,
    PREVIEW_FILE,
    THUMBNAIL_FILE,
    VIDEO_FILE,
    VideoResult,
    VideoSpec,
)
from pipelines.serving import dispatcher as dispatcher_module
from pipelines.serving.artefacts import ArtefactStore
from pipelines.serving.dispatcher import (
    Dispatcher,
    GenerationStep,
    KeyReusedError,
    NotStoredError,
    QueueFullError,
    ReplicaDiedError,
)
from pipelines.serving.jobs import Job, JobStore
from pipelines.serving.metrics import Metrics
from tests.pipelines.serving.test_jobs import DURATIONS, SPEC, status_of

OF_AN_IMAGE = SPEC.model_copy(update={"image": hashlib.sha256(b"an image").hexdigest()})
RESULT = VideoResult({VIDEO_FILE: b"mp4", THUMBNAIL_FILE: b"webp"}, DURATIONS)


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    return tmp_path / "videos"


@pytest.fixture
def new(store: JobStore, videos: Path) -> Callable[..., Dispatcher]:
    def new(
        generate: Callable[[VideoSpec, bytes | None], AsyncGenerator[GenerationStep, None]], **settings: float
    ) -> Dispatcher:
        config = ServeConfig(output=videos.parent, **settings)
        return Dispatcher(store, ArtefactStore(str(videos)), generate, Metrics(), config)

    return new


async def two_steps(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
    yield GenerationStep(0.0)
    yield GenerationStep(0.5)
    yield GenerationStep(1.0, RESULT)


async def without_end(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
    yield GenerationStep(0.5)
    await asyncio.Event().wait()


async def no_replica(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
    await asyncio.Event().wait()
    yield GenerationStep(0.0)


def dying(num_deaths: int) -> Callable[[VideoSpec, bytes | None], AsyncGenerator[GenerationStep, None]]:
    remaining = iter(range(num_deaths))

    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        yield GenerationStep(0.3)
        if next(remaining, None) is not None:
            raise ReplicaDiedError
        yield GenerationStep(1.0, RESULT)

    return generate


async def until(store: JobStore, job_id: str, status: str) -> None:
    while status_of(store, job_id) != status:
        await asyncio.sleep(0.01)


def run(scenario: Callable[[], Awaitable[None]]) -> None:
    asyncio.run(asyncio.wait_for(scenario(), 60))


def test_files_then_the_row_and_both_go(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher]
) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        dispatcher = new(two_steps)
        await dispatcher.start()
        await dispatcher.wait(job.id)
        assert status_of(store, job.id) == "completed"
        assert (videos / job.id / VIDEO_FILE).read_bytes() == b"mp4"
        assert await dispatcher.delete(job.id) and not await dispatcher.delete(job.id)
        assert list(videos.iterdir()) == []
        await dispatcher.stop()

    run(scenario)


def test_an_image_is_kept_for_every_replica_and_the_next_dispatcher(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher]
) -> None:
    seen: list[bytes | None] = []

    async def dying_twice(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        seen.append(image)
        yield GenerationStep(0.3)
        if len(seen) < 3:
            raise ReplicaDiedError
        yield GenerationStep(1.0, RESULT)

    async def scenario() -> None:
        first = new(no_replica)
        await first.start()
        job, other, gone = [
            await first.create(OF_AN_IMAGE, None, files={IMAGE_FILE: b"an image", PREVIEW_FILE: b"webp"})
            for _ in range(3)
        ]
        (videos / other.id / IMAGE_FILE).write_bytes(b"an im")
        assert await first.delete(gone.id) and not (videos / gone.id).exists()
        await first.stop()
        second = new(dying_twice)
        await second.start()
        for made in (job, other):
            await second.wait(made.id)
        assert seen == [b"an image"] * 3
        kept = {path.name for path in (videos / job.id).iterdir()}
        assert kept == {IMAGE_FILE, PREVIEW_FILE, VIDEO_FILE, THUMBNAIL_FILE}
        failed = store.get(other.id)
        assert failed.error_message == "the image that it begins with is not there; send it again"
        assert [folder.name for folder in videos.iterdir()] == [job.id], "what fails leaves nothing"
        await second.stop()

    run(scenario)


def test_an_image_that_cannot_be_stored_leaves_no_job(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_a_part(artefacts: ArtefactStore, job_id: str, files: dict[str, bytes]) -> None:
        (videos / job_id).mkdir(parents=True)
        (videos / job_id / IMAGE_FILE).write_bytes(b"an im")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(ArtefactStore, "write", write_a_part)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        with pytest.raises(NotStoredError, match="^No space left on device$"):
            await dispatcher.create(OF_AN_IMAGE, None, "key", "asked", {IMAGE_FILE: b"an image"})
        assert store.page(None, 10, "asc")[0] == [] and [*videos.iterdir()] == []
        assert store.find("key") is None
        await dispatcher.stop()

    run(scenario)


class NoAnswerError(Exception):
    """As drivers raise errors of their own, which are no `OSError`."""


@pytest.fixture
def away(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """While it is set, no store of fsspec's in memory answers."""
    away = threading.Event()
    for name in ("pipe_file", "find", "info"):

        def ask(
            *args: Any, answer: Callable[..., Any] = getattr(MemoryFileSystem, name), **options: Any
        ) -> Any:
            if away.is_set():
                raise NoAnswerError("could not connect")
            return answer(*args, **options)

        monkeypatch.setattr(MemoryFileSystem, name, ask)
    yield away
    MemoryFileSystem.store.clear()
    MemoryFileSystem.pseudo_dirs[:] = [""]


def test_an_object_store_that_is_away(
    store: JobStore, away: threading.Event, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """No new job is left without its image; what is to be removed waits for it, and so does the sweeper."""
    monkeypatch.setattr(dispatcher_module, "SWEEP_EVERY_S", 0.01)
    artefacts = ArtefactStore("memory://videos")

    async def scenario() -> None:
        config = ServeConfig(output=tmp_path)
        dispatcher = Dispatcher(store, artefacts, two_steps, Metrics(), config)
        await dispatcher.start()
        job = await dispatcher.create(OF_AN_IMAGE, None, files={IMAGE_FILE: b"an image"})
        await dispatcher.wait(job.id)
        assert artefacts.size(job.id, VIDEO_FILE) == 3
        away.set()
        with pytest.raises(NotStoredError, match="NoAnswerError: could not connect"):
            await dispatcher.create(OF_AN_IMAGE, None, "key", "asked", {IMAGE_FILE: b"an image"})
        assert store.find("key") is None and dispatcher.num_jobs() == {"queued": 0, "in_progress": 0}
        assert await dispatcher.delete(job.id)
        assert len(store.outdated()) == 2
        away.clear()
        while store.outdated():
            await asyncio.sleep(0.01)
        assert artefacts.size(job.id, VIDEO_FILE) is None
        await dispatcher.stop()

    run(scenario)


def test_the_sweeper_goes_on_whatever_happens_to_it(
    store: JobStore, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(dispatcher_module, "SWEEP_EVERY_S", 0.01)
    outdated, calls = store.outdated, list[int]()

    def fail_at_first() -> list[str]:
        calls.append(1)
        if len(calls) == 1:
            raise RuntimeError("nobody has thought of this")
        return outdated()

    monkeypatch.setattr(store, "outdated", fail_at_first)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        while len(calls) < 3:
            await asyncio.sleep(0.01)
        await dispatcher.stop()

    run(scenario)


def test_stopped_dispatcher_leaves_its_jobs_to_the_next(
    store: JobStore, new: Callable[..., Dispatcher]
) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        first = new(without_end)
        await first.start()
        # Progress comes after the row in the database.
        while first.progress(job.id) != 49:
            await asyncio.sleep(0.01)
        assert first.num_jobs() == {"queued": 0, "in_progress": 1}
        await first.stop()
        assert status_of(store, job.id) == "in_progress"
        second = new(two_steps)
        await second.start()
        await second.wait(job.id)
        assert status_of(store, job.id) == "completed"
        await second.stop()

    run(scenario)


def test_jobs_know_their_place_in_the_queue(store: JobStore, new: Callable[..., Dispatcher]) -> None:
    async def scenario() -> None:
        free = asyncio.Semaphore(1)

        async def one_at_a_time(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
            async with free:
                yield GenerationStep(0.5)
                await asyncio.Event().wait()

        dispatcher = new(one_at_a_time)
        await dispatcher.start()
        jobs = [await dispatcher.create(SPEC, None) for _ in range(4)]
        while dispatcher.queue_position(jobs[0].id) is not None:
            await asyncio.sleep(0.01)
        assert [dispatcher.queue_position(job.id) for job in jobs] == [None, 0, 1, 2]
        await dispatcher.delete(jobs[2].id)
        assert [dispatcher.queue_position(job.id) for job in jobs] == [None, 0, None, 1]
        await dispatcher.stop()

    run(scenario)


def test_videos_of_texts_begin_in_the_order_of_their_jobs(
    store: JobStore, new: Callable[..., Dispatcher]
) -> None:
    """Whatever threads are busy with: none of these waits for one."""
    begun = list[int]()

    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        begun.append(spec.seed)
        await asyncio.Event().wait()
        yield GenerationStep(0.0)

    async def scenario() -> None:
        for seed in range(5):
            store.create(SPEC.model_copy(update={"seed": seed}))
        loop, release = asyncio.get_running_loop(), threading.Event()
        loop.set_default_executor(ThreadPoolExecutor(1))
        dispatcher = new(generate)
        await dispatcher.start()
        loop.run_in_executor(None, release.wait)
        await asyncio.sleep(0)
        release.set()
        await dispatcher.stop()
        assert begun == [0, 1, 2, 3, 4]

    run(scenario)


@pytest.mark.parametrize(("num_deaths", "status"), [(2, "completed"), (3, "failed")])
def test_a_job_survives_two_replicas(
    store: JobStore, new: Callable[..., Dispatcher], num_deaths: int, status: str
) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        dispatcher = new(dying(num_deaths))
        await dispatcher.start()
        await dispatcher.wait(job.id)
        found = store.get(job.id)
        assert (found.status, found.num_deaths) == (status, num_deaths)
        if status == "failed":
            assert found.error_code == "replica_died"
            assert found.error_message.startswith("3 replicas died while they made it; the last: ")
        await dispatcher.stop()

    run(scenario)


def test_full_disk_fails_the_job_with_the_reason(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher]
) -> None:
    async def scenario() -> None:
        full, fine = store.create(SPEC), store.create(SPEC)
        (videos / full.id).mkdir(parents=True)
        (videos / full.id / VIDEO_FILE).symlink_to("/dev/full")
        dispatcher = new(two_steps)
        await dispatcher.start()
        await asyncio.gather(dispatcher.wait(full.id), dispatcher.wait(fine.id))
        failed = store.get(full.id)
        assert (failed.status, failed.error_code) == ("failed", "generation_failed")
        assert "No space left on device" in failed.error_message
        assert [folder.name for folder in videos.iterdir()] == [fine.id], "others are made"
        await dispatcher.stop()

    run(scenario)


def test_queue_is_bounded_however_many_come_at_once(store: JobStore, new: Callable[..., Dispatcher]) -> None:
    async def scenario() -> None:
        dispatcher = new(no_replica, max_queued=3)
        await dispatcher.start()
        outcomes = await asyncio.gather(
            *(dispatcher.create(SPEC, None) for _ in range(10)), return_exceptions=True
        )
        assert sum(isinstance(outcome, QueueFullError) for outcome in outcomes) == 7
        assert len(store.page(None, 10, "asc")[0]) == 3
        await dispatcher.stop()

    run(scenario)


def test_a_request_that_comes_again_makes_no_second_video(
    store: JobStore, new: Callable[..., Dispatcher]
) -> None:
    async def scenario() -> None:
        dispatcher = new(without_end, max_queued=1)
        await dispatcher.start()
        twice = [dispatcher.create(SPEC, f"request-{number}", "key", "asked") for number in range(2)]
        first, second = await asyncio.gather(*twice)
        assert first.id == second.id and len(store.page(None, 10, "asc")[0]) == 1
        with pytest.raises(KeyReusedError, match=first.id):
            await dispatcher.create(SPEC, None, "key", "something else")
        await until(store, first.id, "in_progress")
        await dispatcher.stop()

        dispatcher = new(two_steps)  # as after a restart
        await dispatcher.start()
        assert (await dispatcher.create(SPEC, None, "key", "asked")).id == first.id
        await dispatcher.wait(first.id)
        again = await dispatcher.create(SPEC, None, "key", "asked")
        assert (again.id, again.status) == (first.id, "completed")
        await dispatcher.delete(first.id)
        assert (await dispatcher.create(SPEC, None, "key", "asked")).id != first.id
        await dispatcher.stop()

    run(scenario)


def test_a_client_that_waits_no_longer_stops_its_video_alone(
    store: JobStore, new: Callable[..., Dispatcher]
) -> None:
    async def scenario() -> None:
        dispatcher = new(without_end)
        await dispatcher.start()
        own = await dispatcher.create(SPEC, None)
        shared = await dispatcher.create(SPEC, None, "key", "asked")
        await dispatcher.create(SPEC, None, "key", "asked")
        for job in (own, shared):
            await dispatcher.abandon(job.id)
        assert store.get(own.id) is None and store.get(shared.id) is not None
        await dispatcher.abandon(shared.id)
        assert store.get(shared.id) is None
        await dispatcher.stop()

    run(scenario)


def test_delete_stops_the_making(store: JobStore, new: Callable[..., Dispatcher]) -> None:
    stopped = asyncio.Event()

    async def until_stopped(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        try:
            async for step in without_end(spec, image):
                yield step
        finally:
            stopped.set()

    async def scenario() -> None:
        dispatcher = new(until_stopped)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None)
        while dispatcher.progress(job.id) != 49:
            await asyncio.sleep(0.01)
        assert status_of(store, job.id) == "in_progress"
        await dispatcher.delete(job.id)
        await stopped.wait()
        assert dispatcher.num_jobs() == {"queued": 0, "in_progress": 0}
        await dispatcher.stop()

    run(scenario)


def test_expired_files_go(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    outdated, seen = store.outdated, threading.Event()
    monkeypatch.setattr(store, "outdated", lambda: outdated() if seen.is_set() else [])
    monkeypatch.setattr(dispatcher_module, "SWEEP_EVERY_S", 0.05)

    async def scenario() -> None:
        dispatcher = new(two_steps, expire_after_s=0.2)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None)
        await dispatcher.wait(job.id)
        assert (videos / job.id).exists()
        seen.set()
        while (videos / job.id).exists():
            await asyncio.sleep(0.01)
        assert status_of(store, job.id) == "completed"
        await dispatcher.stop()

    run(scenario)


def test_a_replica_that_dies_after_its_video_is_of_no_concern(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher]
) -> None:
    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        async for step in two_steps(spec, image):
            yield step
        raise ReplicaDiedError

    async def scenario() -> None:
        dispatcher = new(generate)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None)
        await dispatcher.wait(job.id)
        assert (status_of(store, job.id), store.get(job.id).num_deaths) == ("completed", 0)
        assert (videos / job.id / VIDEO_FILE).read_bytes() == b"mp4"
        await dispatcher.stop()

    run(scenario)


def test_a_database_that_goes_away_as_it_commits_loses_no_video(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    complete, calls = store.complete, []

    def commit_and_lose_the_connection(*args: Any) -> bool:
        calls.append(complete(*args))
        if len(calls) == 1:
            raise OperationalError("UPDATE", {}, OSError("server closed the connection"))
        return calls[-1]

    monkeypatch.setattr(store, "complete", commit_and_lose_the_connection)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None)
        await dispatcher.wait(job.id)
        assert calls == [True, False] and status_of(store, job.id) == "completed"
        assert (videos / job.id / VIDEO_FILE).read_bytes() == b"mp4"
        await dispatcher.stop()

    run(scenario)


@pytest.mark.parametrize("is_waited_for", [False, True])
def test_a_client_that_goes_away_as_its_job_is_accepted(
    store: JobStore, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch, is_waited_for: bool
) -> None:
    """The row is there by then: so its video is made, unless the client waited for it."""
    create, begun, accepted = store.create, threading.Event(), threading.Event()

    def wait_until_the_client_is_gone(*args: Any) -> Job:
        begun.set()
        assert accepted.wait(10)
        return create(*args)

    monkeypatch.setattr(store, "create", wait_until_the_client_is_gone)

    async def scenario() -> None:
        dispatcher = new(without_end)
        await dispatcher.start()
        request = asyncio.create_task(dispatcher.create(SPEC, None, is_waited_for=is_waited_for))
        await asyncio.to_thread(begun.wait)
        request.cancel()
        asyncio.get_running_loop().call_soon(accepted.set)
        await asyncio.gather(request, return_exceptions=True)
        assert request.cancelled()
        if is_waited_for:
            assert store.page(None, 1, "asc")[0] == store.outdated() == []
            assert dispatcher.num_jobs() == {"queued": 0, "in_progress": 0}
        else:
            while dispatcher.num_jobs()["in_progress"] != 1:
                await asyncio.sleep(0.01)
        await dispatcher.stop()

    run(scenario)


def test_a_client_that_waits_no_longer_leaves_what_others_have_made(
    store: JobStore, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    find, begun, found = store.find, threading.Event(), threading.Event()

    def wait_until_the_client_is_gone(key: str) -> Job | None:
        begun.set()
        assert found.wait(10)
        return find(key)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None, "key", "asked")
        await dispatcher.wait(job.id)
        monkeypatch.setattr(store, "find", wait_until_the_client_is_gone)
        request = asyncio.create_task(dispatcher.create(SPEC, None, "key", "asked", is_waited_for=True))
        await asyncio.to_thread(begun.wait)
        request.cancel()
        asyncio.get_running_loop().call_soon(found.set)
        await asyncio.gather(request, return_exceptions=True)
        assert status_of(store, job.id) == "completed"
        await dispatcher.stop()

    run(scenario)


def test_a_client_that_goes_away_as_it_deletes(
    store: JobStore, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    delete, begun, left = store.delete, threading.Event(), threading.Event()

    def wait_until_the_client_is_gone(job_id: str) -> bool:
        begun.set()
        assert left.wait(10)
        return delete(job_id)

    monkeypatch.setattr(store, "delete", wait_until_the_client_is_gone)

    async def scenario() -> None:
        dispatcher = new(without_end)
        await dispatcher.start()
        job = await dispatcher.create(SPEC, None)
        while dispatcher.num_jobs()["in_progress"] != 1:
            await asyncio.sleep(0.01)
        request = asyncio.create_task(dispatcher.delete(job.id))
        await asyncio.to_thread(begun.wait)
        request.cancel()
        await asyncio.gather(request, return_exceptions=True)
        left.set()
        await dispatcher.wait(job.id)
        while store.outdated() or store.get(job.id) is not None:
            await asyncio.sleep(0.01)
        await dispatcher.stop()

    run(scenario)


def test_what_was_deleted_before_a_replica_was_free_is_not_made(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher]
) -> None:
    """As it was listed to others while its first client's request was still being answered."""
    steps = list[float]()

    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        async for step in two_steps(spec, image):
            steps.append(step.progress)
            yield step

    async def scenario() -> None:
        job = store.create(SPEC)
        dispatcher = new(generate)
        await dispatcher.start()
        store.delete(job.id)
        await dispatcher.wait(job.id)
        assert steps == [0.0] and not videos.exists()
        await dispatcher.stop()

    run(scenario)


def test_a_database_that_goes_away_as_it_accepts_a_job(
    store: JobStore, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The row is there, the client hears of an error, and sends its request again."""
    create = store.create

    def commit_and_lose_the_connection(*args: Any) -> Job:
        create(*args)
        raise OperationalError("INSERT", {}, OSError("server closed the connection"))

    monkeypatch.setattr(store, "create", commit_and_lose_the_connection)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        request = (OF_AN_IMAGE, None, "key", "asked", {IMAGE_FILE: b"an image"})
        with pytest.raises(OperationalError):
            await dispatcher.create(*request)
        job = await dispatcher.create(*request)
        await dispatcher.wait(job.id)
        assert status_of(store, job.id) == "completed"
        await dispatcher.stop()

    run(scenario)


def test_files_that_resist_do_not_keep_the_others(
    store: JobStore, videos: Path, new: Callable[..., Dispatcher], monkeypatch: pytest.MonkeyPatch
) -> None:
    remove, resisting = ArtefactStore.remove, []

    def refuse_the_first(artefacts: ArtefactStore, job_id: str) -> None:
        if job_id in resisting:
            raise PermissionError("busy")
        remove(artefacts, job_id)

    monkeypatch.setattr(ArtefactStore, "remove", refuse_the_first)

    async def scenario() -> None:
        dispatcher = new(two_steps)
        await dispatcher.start()
        first, second = [await dispatcher.create(SPEC, None) for _ in range(2)]
        await asyncio.gather(dispatcher.wait(first.id), dispatcher.wait(second.id))
        resisting.append(first.id)
        assert await dispatcher.delete(first.id) and await dispatcher.delete(second.id)
        assert [folder.name for folder in videos.iterdir()] == [first.id]
        resisting.clear()
        dispatcher._sweep()
        assert list(videos.iterdir()) == []
        await dispatcher.stop()

    run(scenario)


def test_a_database_that_is_away_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dispatcher_module, "DATABASE_RETRY_S", 0.0)
    away = iter(range(3))

    def transaction(answer: str) -> str:
        if next(away, None) is not None:
            raise OperationalError("SELECT 1", {}, OSError("server closed the connection"))
        return answer

    assert dispatcher_module._persist(transaction, "written") == "written"
