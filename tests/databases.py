"""A PostgreSQL server of one's own: a socket in a folder that goes with it, and a port of this machine."""

import os
import shutil
import signal
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psycopg
import psycopg.sql
import pytest

PATIENCE_S = 60


@contextmanager
def postgres_server() -> Iterator[Path]:
    """Yields the folder of its socket; skips the test where PostgreSQL is not installed."""
    installed = sorted(Path("/usr/lib/postgresql").glob("*/bin"))
    if not installed:
        pytest.skip("PostgreSQL is not installed: apt-get install postgresql")
    # It refuses to run as root; the package makes a user for it.
    user = "postgres" if os.geteuid() == 0 else None
    folder = Path(tempfile.mkdtemp(prefix="prophy-postgres-"))
    if user:
        shutil.chown(folder, user)
    data = folder / "data"
    quiet: dict[str, Any] = {"cwd": folder, "user": user, "stdout": subprocess.DEVNULL}
    try:
        subprocess.run(
            [installed[-1] / "initdb", "-D", data, "-U", "postgres", "--auth=trust", "--no-sync"],
            check=True,
            **quiet,
        )
        server = subprocess.Popen(
            [
                installed[-1] / "postgres",
                "-D",
                data,
                "-k",
                folder,
                "-h",
                "127.0.0.1",
                "-p",
                _free_port(),
                "-F",
            ],
            stderr=subprocess.DEVNULL,
            **quiet,
        )
        try:
            deadline = time.monotonic() + PATIENCE_S
            while True:
                try:
                    _connect(folder).close()
                    break
                except (psycopg.OperationalError, StopIteration) as error:
                    assert server.poll() is None, "PostgreSQL did not start"
                    assert time.monotonic() < deadline, f"PostgreSQL lets nobody in: {error}"
                    time.sleep(0.05)
            yield folder
        finally:
            server.send_signal(signal.SIGINT)  # at once, whoever is still connected
            try:
                server.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                server.kill()
                raise
    finally:
        shutil.rmtree(folder)


def new_database(folder: Path, *, over_tcp: bool = False) -> str:
    """The URL of a fresh database of the server in `folder`, by its socket or by its port."""
    name = f"test_{uuid.uuid4().hex}"
    with _connect(folder) as connection:
        connection.execute(psycopg.sql.SQL("CREATE DATABASE {}").format(psycopg.sql.Identifier(name)))
    if over_tcp:
        return f"postgresql+psycopg://postgres@127.0.0.1:{_port(folder)}/{name}"
    return f"postgresql+psycopg://postgres@/{name}?host={folder}&port={_port(folder)}"


def _connect(folder: Path) -> psycopg.Connection:
    return psycopg.connect(host=str(folder), port=_port(folder), user="postgres", autocommit=True)


def _port(folder: Path) -> int:
    """Which the socket's name ends with, once there is one."""
    return int(next(folder.glob(".s.PGSQL.*[0-9]")).suffix[1:])


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])
