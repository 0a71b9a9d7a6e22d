"""Jobs in a real database, and the dispatcher over it."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from pipelines.jobs import Dispatcher, GenerationStep, JobStore
from pipelines.spec import PhysicsSpec, VideoSpec
from prophy.taxonomy import Phenomenon

SPEC = VideoSpec(
    prompt="a ball falls",
    negative_prompt="",
    seed=3,
    num_frames=17,
    height=64,
    width=48,
    fps=8,
    num_inference_steps=4,
    guidance_scale=3.0,
    physics=PhysicsSpec(strength={Phenomenon.COLLISION: 2.0}),
)


@pytest.fixture
def store(tmp_path: Path) -> JobStore:
    return JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")


def status_of(store: JobStore, job_id: str) -> tuple[str, int]:
    job = store.get(job_id)
    assert job is not None
    return job.status, job.progress


def test_life_of_a_job(store: JobStore) -> None:
    job = store.create(SPEC)
    assert store.get(job.id).spec == SPEC
    assert not store.set_progress(job.id, 5), "nobody has begun it"
    assert store.start(job.id) and not store.start(job.id), "begun once"
    assert store.set_progress(job.id, 50)
    assert status_of(store, job.id) == ("in_progress", 50)
    assert store.complete(job.id) and not store.fail(job.id, "late", "too late")
    assert status_of(store, job.id) == ("completed", 100)
    assert store.delete(job.id) and not store.delete(job.id)
    assert store.get(job.id) is None


def test_pages(store: JobStore) -> None:
    ids = [store.create(SPEC).id for _ in range(5)]
    first, more = store.page(None, 2, "desc")
    assert ([job.id for job in first], more) == ([ids[4], ids[3]], True)
    rest, more = store.page(first[-1], 3, "desc")
    assert ([job.id for job in rest], more) == ([ids[2], ids[1], ids[0]], False)
    assert [job.id for job in store.page(store.get(ids[1]), 100, "asc")[0]] == ids[2:]


def test_next_owner_requeues_what_was_in_progress(store: JobStore, tmp_path: Path) -> None:
    begun, waiting, failed = (store.create(SPEC) for _ in range(3))
    store.start(begun.id)
    store.set_progress(begun.id, 70)
    store.fail(failed.id, "generation_failed", "no memory")
    reopened = JobStore(f"sqlite:///{tmp_path / 'jobs.sqlite'}")
    assert [job.id for job in reopened.requeue_unfinished()] == [begun.id, waiting.id]
    assert status_of(reopened, begun.id) == ("queued", 0)
    assert reopened.num_queued() == 2


async def two_steps(spec: VideoSpec) -> AsyncIterator[GenerationStep]:
    yield GenerationStep(0.0)
    yield GenerationStep(0.5)
    yield GenerationStep(1.0, b"mp4")


async def without_end(spec: VideoSpec) -> AsyncIterator[GenerationStep]:
    yield GenerationStep(0.5)
    await asyncio.Event().wait()


async def full_disk(spec: VideoSpec) -> AsyncIterator[GenerationStep]:
    yield GenerationStep(0.0)
    raise OSError(28, "No space left on device")


async def until(store: JobStore, job_id: str, status: str) -> None:
    while status_of(store, job_id)[0] != status:
        await asyncio.sleep(0.01)


def test_dispatcher_writes_the_video_then_the_row(store: JobStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        dispatcher = Dispatcher(store, tmp_path / "videos", two_steps)
        await dispatcher.start()
        await asyncio.wait_for(until(store, job.id, "completed"), 10)
        assert dispatcher.path(job.id).read_bytes() == b"mp4"
        assert await dispatcher.delete(job.id)
        assert list((tmp_path / "videos").iterdir()) == []

    asyncio.run(scenario())


def test_stopped_dispatcher_leaves_its_jobs_to_the_next(store: JobStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        first = Dispatcher(store, tmp_path / "videos", without_end)
        await first.start()
        await asyncio.wait_for(until(store, job.id, "in_progress"), 10)
        await first.stop()
        assert status_of(store, job.id)[0] == "in_progress"
        (tmp_path / "videos" / "half.partial").write_bytes(b"mp")
        second = Dispatcher(store, tmp_path / "videos", two_steps)
        await second.start()
        await asyncio.wait_for(until(store, job.id, "completed"), 10)
        assert [path.name for path in (tmp_path / "videos").iterdir()] == [f"{job.id}.mp4"]

    asyncio.run(scenario())


def test_a_job_that_cannot_be_made_says_why(store: JobStore, tmp_path: Path) -> None:
    async def scenario() -> None:
        job = store.create(SPEC)
        dispatcher = Dispatcher(store, tmp_path / "videos", full_disk)
        await dispatcher.start()
        await asyncio.wait_for(until(store, job.id, "failed"), 10)
        failed = store.get(job.id)
        assert failed.error_code == "generation_failed"
        assert "No space left on device" in failed.error_message

    asyncio.run(scenario())
