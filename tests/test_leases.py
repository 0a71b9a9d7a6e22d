"""One writer at a time: on a disk by a lock, in S3 by a lease."""

import logging
import threading
import time
from pathlib import Path

import pytest
from s3fs import S3FileSystem

from prophy.errors import ProPhyError
from prophy.leases import Lease, held
from prophy.places import Place, S3Path
from tests.object_store import refuse_puts

OBJECT = "bucket/cache/.lease"
TOO_LONG_S = 1e6
PUT = S3Path.put


@pytest.fixture
def folder(bucket: S3FileSystem) -> S3Path:
    return S3Path("s3://bucket/cache", "some.key")


def lease(folder: S3Path, renewed_every_s: float = TOO_LONG_S) -> Lease:
    return Lease(folder, "some.key", renewed_every_s)


def put_twice(path: S3Path, content: bytes, **condition: str) -> str | None:
    """A PUT that S3 applies, and s3fs makes again, because the answer is lost."""
    PUT(path, content, **condition)
    return PUT(path, content, **condition)


def without_an_answer(path: S3Path, content: bytes, **condition: str) -> str | None:
    """A PUT that S3 applies, and whose answer and those to all further attempts are lost."""
    PUT(path, content, **condition)
    raise ProPhyError("no answer")


@pytest.mark.parametrize("kind", ["disk", "s3"])
def test_one_after_the_other(kind: str, folder: S3Path, tmp_path: Path) -> None:
    place: Place = tmp_path if kind == "disk" else folder
    for _ in range(3):
        with held(place, "some.key"):
            pass
    with pytest.raises(KeyError), held(place, "some.key"):  # it goes back then too
        raise KeyError
    with held(place, "some.key"):
        pass


def test_who_renews_keeps_it(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = lease(folder), lease(folder)
    with first.held():
        monkeypatch.setattr(time, "sleep", lambda _: first.renew())
        message = "another run writes to s3://bucket/cache; wait for it, or choose another some.key"
        with pytest.raises(ProPhyError, match=message):
            second.acquire()


def test_who_renews_no_more_loses_it(
    folder: S3Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    killed, second, waits = lease(folder), lease(folder), list[float]()
    killed.acquire()
    monkeypatch.setattr(time, "sleep", waits.append)
    with caplog.at_level(logging.INFO):
        second.acquire()
    assert waits == 3 * [TOO_LONG_S]
    assert "taking over s3://bucket/cache from a run that ended without releasing it" in caplog.text
    assert not killed.renew() and second.renew()


def test_of_two_that_take_it_over_one_gets_it(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lease(folder).acquire()
    quicker = lease(folder)
    naps = iter([None, None, quicker])

    def sleep(_: float) -> None:
        if last := next(naps, None):
            last._put(IfMatch=(folder / ".lease").etag())

    monkeypatch.setattr(time, "sleep", sleep)
    with pytest.raises(ProPhyError, match="another run writes to"):
        lease(folder).acquire()


def test_a_run_that_has_lost_it_is_stopped(folder: S3Path, bucket: S3FileSystem) -> None:
    message = "another run has taken over s3://bucket/cache, because .* 0.03 s; what was written is whole"
    with pytest.raises(ProPhyError, match=message), lease(folder, renewed_every_s=0.01).held():
        bucket.pipe_file(OBJECT, b"of another run")
        threading.Event().wait()
    assert bucket.cat_file(OBJECT) == b"of another run"


def test_a_run_that_ends_as_it_loses_it_says_so(folder: S3Path, bucket: S3FileSystem) -> None:
    with pytest.raises(ProPhyError, match="another run has taken over"), lease(folder).held():
        bucket.pipe_file(OBJECT, b"of another run")
    assert bucket.cat_file(OBJECT) == b"of another run"


def test_an_interrupt_of_the_user_is_one(folder: S3Path, bucket: S3FileSystem) -> None:
    with pytest.raises(KeyboardInterrupt), lease(folder).held():
        raise KeyboardInterrupt
    assert bucket.cat_file(OBJECT) == b"", "it is released"


def test_a_renewal_whose_answer_is_lost_counts(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = lease(folder)
    holder.acquire()
    monkeypatch.setattr(S3Path, "put", put_twice)
    assert holder.renew() and holder.renew()


def test_a_renewal_counts_whose_answers_are_all_lost(folder: S3Path, monkeypatch: pytest.MonkeyPatch) -> None:
    holder = lease(folder)
    holder.acquire()
    with monkeypatch.context() as patch:
        patch.setattr(S3Path, "put", without_an_answer)
        with pytest.raises(ProPhyError, match="no answer"):
            holder.renew()
    assert holder.renew() and holder.renew()


def test_a_release_whose_answers_are_lost(
    folder: S3Path, bucket: S3FileSystem, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    with lease(folder).held():
        monkeypatch.setattr(S3Path, "put", put_twice)
    assert bucket.cat_file(OBJECT) == b""
    monkeypatch.setattr(S3Path, "put", PUT)

    holder = lease(folder)
    with holder.held(), monkeypatch.context() as patch:
        patch.setattr(S3Path, "put", without_an_answer)
        with pytest.raises(ProPhyError, match="no answer"):
            holder.renew()
    assert bucket.cat_file(OBJECT) == b""

    with lease(folder).held():  # a run that has done its work has not failed
        monkeypatch.setattr(S3Path, "put", without_an_answer)
    assert "the lease is not released, so the next run waits 3e+06 s: no answer" in caplog.text


def test_a_store_that_refuses_once_is_asked_again(
    folder: S3Path, bucket: S3FileSystem, caplog: pytest.LogCaptureFixture
) -> None:
    with lease(folder, renewed_every_s=0.01).held():
        refuse_puts(bucket, "bucket", "cache/*")
        while "the lease is not renewed: some.key: cannot use" not in caplog.text:
            time.sleep(0.01)
        bucket.call_s3("delete_bucket_policy", Bucket="bucket")
        before = bucket.cat_file(OBJECT)
        while bucket.cat_file(OBJECT) == before:
            time.sleep(0.01)


@pytest.mark.parametrize("condition", ["IfMatch", "IfNoneMatch"])
def test_a_store_that_ignores_conditions(
    condition: str, folder: S3Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    put = S3Path.put

    def careless(path: S3Path, content: bytes, **conditions: str) -> str | None:
        return put(path, content, **{name: tag for name, tag in conditions.items() if name != condition})

    monkeypatch.setattr(S3Path, "put", careless)
    with pytest.raises(ProPhyError, match=f"s3://bucket/cache ignores {condition} of a PUT, so .* some.key"):
        lease(folder).acquire()


def test_a_bucket_that_is_not_there() -> None:
    with pytest.raises(ProPhyError, match="some.key: cannot use s3://nobucket/cache/.lease: .*exist; mend"):
        lease(S3Path("s3://nobucket/cache", "some.key")).acquire()
