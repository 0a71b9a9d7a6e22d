"""Jobs in real databases, SQLite and PostgreSQL."""

import contextlib
import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from sqlalchemy import NullPool, create_engine, make_url, text
from sqlalchemy.exc import OperationalError

from pipelines.generation.spec import PhysicsSpec, VideoSpec
from pipelines.serving.database import InUseError
from pipelines.serving.jobs import JobStore
from prophy.errors import ProPhyError
from tests.databases import new_database

SPEC = VideoSpec(
    prompt="a ball falls \x00 \N{SNOWMAN}",
    negative_prompt="",
    seed=3,
    num_frames=17,
    height=64,
    width=48,
    fps=8,
    num_inference_steps=4,
    guidance_scale=3.0,
    physics=PhysicsSpec(strength={"collision": 2.0}),
)
DURATIONS = {"text": 0.1, "denoise": 2.0}


@pytest.fixture
def store(url: str) -> Iterator[JobStore]:
    with JobStore(url) as store:
        yield store


def status_of(store: JobStore, job_id: str) -> str:
    job = store.get(job_id)
    assert job is not None
    return job.status


def test_life_of_a_job(store: JobStore) -> None:
    job = store.create(SPEC, "request-1")
    assert store.get(job.id).spec == SPEC and store.get(job.id).request_id == "request-1"
    assert not store.complete(job.id, DURATIONS), "nobody has begun it"
    assert store.start(job.id) and not store.start(job.id), "begun once"
    assert store.complete(job.id, DURATIONS) and not store.complete(job.id, DURATIONS), "completed once"
    assert not store.fail(job.id, "late", "too late")
    assert status_of(store, job.id) == "completed"
    assert store.get(job.id).stage_durations == DURATIONS
    assert store.delete(job.id) and not store.delete(job.id)
    assert store.get(job.id) is None and store.page(None, 10, "asc") == ([], False)
    assert store.outdated() == [job.id], "its files are still to go"
    store.purge(job.id)
    assert store.outdated() == []


def test_pages(store: JobStore) -> None:
    ids = [store.create(SPEC).id for _ in range(5)]
    first, more = store.page(None, 2, "desc")
    assert ([job.id for job in first], more) == ([ids[4], ids[3]], True)
    rest, more = store.page(first[-1], 3, "desc")
    assert ([job.id for job in rest], more) == ([ids[2], ids[1], ids[0]], False)
    assert [job.id for job in store.page(store.get(ids[1]), 100, "asc")[0]] == ids[2:]


def test_deaths_are_counted(store: JobStore) -> None:
    job = store.create(SPEC)
    assert store.requeue(job.id) is None, "nobody has begun it"
    for deaths in (1, 2):
        store.start(job.id)
        assert store.requeue(job.id) == deaths
    assert status_of(store, job.id) == "queued"
    store.start(job.id)
    store.delete(job.id)
    assert store.requeue(job.id) is None, "deleted meanwhile"


def test_files_of_failed_and_expired_jobs_must_go(store: JobStore) -> None:
    fresh, expired, failed = (store.create(SPEC).id for _ in range(3))
    for job_id in (fresh, expired, failed):
        store.start(job_id)
    store.complete(fresh, DURATIONS, expire_after_s=1000)
    store.complete(expired, DURATIONS, expire_after_s=0)
    store.fail(failed, "generation_failed", "no memory")
    assert sorted(store.outdated()) == sorted([expired, failed])
    for job_id in store.outdated():
        store.purge(job_id)
    assert store.outdated() == []
    assert status_of(store, expired) == "completed", "clients still see it"


def test_next_owner_finds_every_accepted_job_of_one_that_was_killed(url: str) -> None:
    program = (
        "import os, sys, pathlib\n"
        "from pipelines.serving.jobs import JobStore\n"
        "from tests.pipelines.serving.test_jobs import SPEC\n"
        "store = JobStore(sys.argv[1])\n"
        "begun, waiting, failed = (store.create(SPEC).id for _ in range(3))\n"
        "store.start(begun), store.fail(failed, 'generation_failed', 'no memory')\n"
        "print(begun, waiting, flush=True)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, url], stdout=subprocess.PIPE, text=True)
    assert run.returncode == -signal.SIGKILL
    with JobStore(url) as store:
        assert [job.id for job in store.requeue_unfinished()] == run.stdout.split()
        assert [status_of(store, job_id) for job_id in run.stdout.split()] == ["queued", "queued"]


def test_an_owner_whose_connection_breaks(postgres: Path) -> None:
    url = new_database(postgres)
    server = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def break_connection() -> None:
        with server.connect() as connection:
            connection.exec_driver_sql(
                "SELECT pg_terminate_backend(pid) FROM pg_locks "
                "JOIN pg_database ON pg_locks.database = pg_database.oid "
                "WHERE locktype = 'advisory' AND datname = current_database()"
            )

    with JobStore(url) as store:
        assert store.is_owner()
        break_connection()
        assert store.is_owner() and store.is_owner(), "nobody else has come"
        with pytest.raises(InUseError, match="another server uses"):
            JobStore(url, waits_s=0.2)
        break_connection()
        with JobStore(url):
            assert not store.is_owner()


def test_an_owner_whose_database_was_away(postgres: Path) -> None:
    """The right went with the connection, and is asked for when there is one again."""
    url = new_database(postgres)
    name = make_url(url).database
    system = make_url(url).set(database="postgres")
    server = create_engine(system, isolation_level="AUTOCOMMIT", poolclass=NullPool)

    def let_in(anyone: bool) -> None:
        with server.connect() as connection:
            connection.exec_driver_sql(f"ALTER DATABASE {name} ALLOW_CONNECTIONS {anyone}")
            if not anyone:
                ended = "SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity WHERE datname = :name"
                connection.execute(text(ended), {"name": name})

    with JobStore(url) as store:
        for _ in range(3):
            assert store.is_owner()
        let_in(False)
        for _ in range(3):
            with pytest.raises(OperationalError):
                store.is_owner()
        let_in(True)
        assert store.is_owner()
        with pytest.raises(InUseError, match="another server uses"):
            JobStore(url, waits_s=0.2)
    JobStore(url).close()


def test_what_a_vanished_node_held_is_free_within_seconds(postgres: Path) -> None:
    """As by the loss of its power: the server hears nothing of it, no end of the connection either."""
    url = new_database(postgres, over_tcp=True)
    program = (
        "import os, socket, sys\n"
        "from pipelines.serving.jobs import JobStore\n"
        "store = JobStore(sys.argv[1])\n"
        "held = socket.socket(fileno=store._owner.connection.dbapi_connection.fileno())\n"
        "TCP_REPAIR = 19  # closes without a word\n"
        "held.setsockopt(socket.IPPROTO_TCP, TCP_REPAIR, 1)\n"
        "os.kill(os.getpid(), 9)\n"
    )
    run = subprocess.run([sys.executable, "-c", program, url], stderr=subprocess.PIPE, text=True)
    if "PermissionError" in run.stderr:
        pytest.skip("only who administers the network can close a connection without a word")
    assert run.returncode == -signal.SIGKILL, run.stderr
    with JobStore(url) as store, store.sessions() as session:
        for name, value in (("tcp_keepalives_count", "3"), ("tcp_user_timeout", "11000")):
            assert session.connection().exec_driver_sql(f"SHOW {name}").scalar() == value


def test_options_of_the_url_are_kept(postgres: Path) -> None:
    url = new_database(postgres) + "&options=-c%20statement_timeout%3D77s"
    with JobStore(url) as store, store.sessions() as session:
        assert session.connection().exec_driver_sql("SHOW statement_timeout").scalar() == "77s"


def test_one_owner(store: JobStore, url: str) -> None:
    with pytest.raises(InUseError, match="another server uses the job database"):
        JobStore(url, waits_s=0)
    store.close()
    JobStore(url).close()


def execute(path: Path, *statements: str) -> None:
    with contextlib.closing(sqlite3.connect(path)) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def damage_a_page(path: Path) -> None:
    """One of those that hold the rows, not the first, which says what the file is."""
    with JobStore(f"sqlite:///{path}") as store:
        for _ in range(100):
            store.create(SPEC)
    execute(path, "PRAGMA wal_checkpoint(TRUNCATE)")
    size = path.stat().st_size
    with path.open("r+b") as file:
        file.seek(size // 2 // 4096 * 4096)
        file.write(b"\xff" * 4096)


def of_another_program(path: Path) -> None:
    path.unlink()
    execute(path, "CREATE TABLE bookmarks (url)")


STRANGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no database": (lambda path: path.write_bytes(b"no database" * 1000), "is not a database"),
    "cut in half": (lambda path: os.truncate(path, path.stat().st_size // 2), "malformed"),
    "damaged page": (damage_a_page, "malformed"),
    "of a newer version": (lambda path: execute(path, "UPDATE prophy_schema SET version = 7"), "is 7, not 1"),
    "of an older version": (lambda path: execute(path, "DROP TABLE prophy_schema"), "is None, not 1"),
    "of another program": (
        of_another_program,
        "another program, or another version",
    ),
    "a row of another version": (
        lambda path: execute(path, "UPDATE videos SET spec = '{}'"),
        "another version made one of its rows; the last that can be read is none",
    ),
    "a time that is none": (
        lambda path: execute(path, "UPDATE videos SET created_at = 'noon'"),
        "another version made one of its rows",
    ),
    "an unknown status": (
        lambda path: execute(path, "UPDATE videos SET status = 'paused'"),
        "another version made one of its rows",
    ),
}


@pytest.mark.parametrize("state", STRANGE)
def test_a_database_that_is_not_ours_is_refused_in_one_sentence(state: str, tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    spoil, message = STRANGE[state]
    with JobStore(f"sqlite:///{path}") as store:
        store.create(SPEC)
        store.check()
    spoil(path)
    before = path.read_bytes()
    with pytest.raises(ProPhyError) as caught, JobStore(f"sqlite:///{path}") as store:
        store.check()
    assert message in str(caught.value)
    assert "choose another serve.output" in str(caught.value) and "serve.database" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert path.read_bytes() == before, "what is not ours stays as it is"


def test_a_postgresql_of_another_version(postgres: Path) -> None:
    url = new_database(postgres)
    JobStore(url).close()
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.exec_driver_sql("UPDATE prophy_schema SET version = 7")
    with pytest.raises(ProPhyError, match=r"their version is 7, not 1\); choose another serve.output or"):
        JobStore(url)


def test_a_locked_database(tmp_path: Path) -> None:
    path = tmp_path / "jobs.sqlite"
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(ProPhyError, match="cannot open the job database .*: database is locked; choose"):
            JobStore(f"sqlite:///{path}")


def test_a_row_that_cannot_be_read_keeps_none_of_the_others(store: JobStore, url: str) -> None:
    ids = [store.create(SPEC).id for _ in range(4)]
    engine = create_engine(url, isolation_level="AUTOCOMMIT", poolclass=NullPool)
    with engine.connect() as connection:
        connection.execute(text("UPDATE videos SET spec = '{}' WHERE id = :id"), {"id": ids[1]})
        connection.execute(text("UPDATE videos SET stage_durations = '7' WHERE id = :id"), {"id": ids[2]})
    whole = [ids[0], ids[3]]
    assert [job.id for job in store.requeue_unfinished()] == whole
    jobs, more = store.page(None, 4, "asc")
    assert ([job.id for job in jobs], more) == (whole, False)
    assert store.get(ids[1]) is None
    assert store.delete(ids[1]) and store.outdated() == [ids[1]]


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("jobs", "cannot open the job database jobs: Could not parse"),
        ("sqlite:////proc/none/jobs.sqlite", "cannot open the job database"),
        ("postgresql+psycopg://nobody@/none?host=/tmp", "cannot open the job database"),
        ("sqlite:///jobs.sqlite", "neither an absolute SQLite file nor PostgreSQL; choose"),
        ("sqlite://", "neither an absolute SQLite file nor PostgreSQL; choose"),
        ("mysql://root@localhost/jobs", "neither an absolute SQLite file nor PostgreSQL; choose"),
    ],
)
def test_no_such_database(url: str, message: str) -> None:
    with pytest.raises(ProPhyError) as caught:
        JobStore(url)
    assert message in str(caught.value)
    assert os.linesep not in str(caught.value)
