"""A database, SQLite or PostgreSQL, that one process owns: opened, checked, locked. Knows no jobs."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Self

from filelock import FileLock, Timeout
from sqlalchemy import URL, Connection, Engine, create_engine, insert, inspect, make_url, select
from sqlalchemy.exc import ArgumentError, DatabaseError, OperationalError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column, sessionmaker

from prophy.errors import ProPhyError

SCHEMA_VERSION = 1  # to be raised with every change of the tables, or of what their rows hold
OWNER_TIMEOUT_S = 20.0  # an earlier owner that was told to stop is given this long
UNANSWERED = (OperationalError, PoolTimeoutError)  # the database is away, or its connections are all in use
_LOST_AFTER_S = 11  # less than an owner is waited for
_ADVISORY_LOCK = 0x70726F706879  # "prophy"


class Base(DeclarativeBase):
    """Base of all tables."""


class _Schema(Base):
    """Its one row says which version of the tables this is."""

    __tablename__ = "prophy_schema"

    version: Mapped[int] = mapped_column(primary_key=True, autoincrement=False)


class InUseError(ProPhyError):
    """Another process has the right to change the database."""


class OwnDatabase:
    """A database with the tables of `Base`, and the right to change it, which one process has at a time.

    Attributes:
        sessions: makes sessions; thread-safe.

    Args:
        url: the database's, as SQLAlchemy writes it.
        waits_s: how long for another process, which may be about to end.

    Raises:
        InUseError: another process owns it.
        ProPhyError: there is no such database, it cannot be written, or another program or version made its
            tables.
    """

    def __init__(self, url: str, waits_s: float = OWNER_TIMEOUT_S) -> None:
        self._url = url
        try:
            parsed = make_url(url)
            is_file = parsed.get_backend_name() == "sqlite" and Path(parsed.database or "").is_absolute()
            if not is_file and parsed.get_backend_name() != "postgresql":
                raise ArgumentError("it is neither an absolute SQLite file nor PostgreSQL")
            self._engine = create_engine(url, pool_pre_ping=True, connect_args=_connect_args(parsed))
            with ExitStack() as stack:
                stack.callback(self._engine.dispose)
                self._owner = stack.enter_context(_own(self._engine, url, waits_s))
                with self._engine.connect() as connection:
                    self._create_tables(connection)
                    connection.commit()
                    if is_file:  # readers do not wait for the writer
                        connection.exec_driver_sql("PRAGMA journal_mode=WAL")
                self._ownership = stack.pop_all()
        except (ArgumentError, DatabaseError, ImportError, OSError) as error:
            raise self.refusal("open", error) from None
        self.sessions = sessionmaker(self._engine, expire_on_commit=False)

    def _create_tables(self, connection: Connection) -> None:
        """In one transaction, which also says now if the database is locked or read-only.

        Raises:
            ProPhyError: there are tables of another program or version.
        """
        if self._engine.dialect.name == "sqlite":  # whose driver begins no transaction before CREATE TABLE
            connection.exec_driver_sql("BEGIN IMMEDIATE")
        found = inspect(connection).get_table_names()
        version = connection.scalar(select(_Schema.version)) if _Schema.__tablename__ in found else None
        if found and version != SCHEMA_VERSION:
            raise ProPhyError(
                f"the job database {self._url} has tables that another program, or another version of this "
                f"one, made (their version is {version}, not {SCHEMA_VERSION}); choose another serve.output "
                "or serve.database"
            )
        if not found:
            Base.metadata.create_all(connection)
            connection.execute(insert(_Schema).values(version=SCHEMA_VERSION))

    def refusal(self, verb: str, error: Exception) -> ProPhyError:
        """What is said of a database that one cannot `verb`."""
        reason = str(error.orig if isinstance(error, DatabaseError) else error).strip().splitlines()[0]
        return ProPhyError(
            f"cannot {verb} the job database {self._url}: {reason}; choose another serve.output, or set "
            "serve.database to sqlite:////FOLDER/FILE or postgresql://USER@HOST/DATABASE"
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Lets another process own the database."""
        self._ownership.close()

    def is_owner(self) -> bool:
        """Whether the right is still ours: PostgreSQL takes it back when the connection breaks.

        Takes it anew if nobody has it since.

        Raises:
            OperationalError: the database does not answer.
        """
        if self._owner is None:
            return True
        # Asks for the right itself, which is granted again to who has it: a connection that answers may be a
        # new one, without the right. The end of the connection gives back all that was granted.
        try:
            return _try_lock(self._owner)
        except OperationalError:
            self._owner.rollback()  # else there is no new connection
            return _try_lock(self._owner)

    def check_pages(self, session: Session) -> None:
        """Has SQLite look at every page.

        Raises:
            OSError: one is damaged.
        """
        if self._engine.dialect.name == "sqlite":
            found = session.connection().exec_driver_sql("PRAGMA quick_check").scalar()
            if found != "ok":
                raise OSError(f"it is damaged: {found}")


@contextmanager
def _own(engine: Engine, url: str, waits_s: float) -> Iterator[Connection | None]:
    """Holds the one right to change the database; the death of the process gives it back.

    Yields:
        The connection that the right hangs on, if it is not a file.

    Raises:
        InUseError: another process holds it.
    """
    taken = InUseError(
        f"another server uses the job database {url}; stop it, or choose another serve.output or "
        "serve.database"
    )
    if engine.dialect.name == "sqlite":
        lock = FileLock(f"{engine.url.database}.lock", thread_local=False)
        try:
            lock.acquire(timeout=waits_s)
        except Timeout:
            raise taken from None
        yield None
        lock.release()
        return
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        deadline = time.monotonic() + waits_s
        while not _try_lock(connection):
            if time.monotonic() > deadline:
                raise taken
            time.sleep(0.1)
        yield connection  # closing it unlocks


def _connect_args(url: URL) -> dict[str, object]:
    """Has each side of a connection to PostgreSQL see within `_LOST_AFTER_S` that the other is lost.

    By default a server keeps what a lost node held for two hours, the right to change the database with it.
    """
    if url.get_backend_name() != "postgresql":
        return {}
    keepalives = {"idle": 5, "interval": 2, "count": 3}
    ours = {f"keepalives_{name}": value for name, value in keepalives.items()}
    theirs = {f"tcp_keepalives_{name}": value for name, value in keepalives.items()}
    milliseconds = {"tcp_user_timeout": 1000 * _LOST_AFTER_S}  # of what is sent and not acknowledged
    options = [f"-c {name}={value}" for name, value in (theirs | milliseconds).items()]
    asked = url.normalized_query.get("options", ())
    return ours | milliseconds | {"options": " ".join([*options, *asked])}


def _try_lock(connection: Connection) -> bool:
    return bool(connection.exec_driver_sql(f"SELECT pg_try_advisory_lock({_ADVISORY_LOCK})").scalar())
