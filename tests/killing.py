"""A command of `prophy` in a process of its own, with a Ray of its own, to be killed in parts."""

import os
import random
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil


class Run:
    """`prophy COMMAND`, started at once; what it prints is added to a log beside its run folder.

    Args:
        command: a line of the command line, with options that are no keys.
        folder: the run's.
        overrides: what its configuration changes.
        workers: how the titles of those processes begin that hold rows or ranks.
    """

    def __init__(self, command: str, folder: Path, overrides: tuple[str, ...], workers: str) -> None:
        options = [part for item in (f"run_dir={folder}", *overrides) for part in ("--set", item)]
        self.folder, self.workers = folder, workers
        self.log = folder.with_suffix(".log")
        with self.log.open("ab") as log:
            self.printed_before = log.tell()
            self.process = psutil.Popen(
                [sys.executable, "-m", "pipelines.cli", *shlex.split(command), *options],
                stdout=log,
                stderr=subprocess.STDOUT,
                env=os.environ | {"PYTHONPATH": os.getcwd()},
            )
        self.family: set[psutil.Process] = set()

    def wait_until(self, happened: Callable[[], bool]) -> None:
        while not happened():
            assert self.process.poll() is None, self.log.read_text()[-3000:]
            time.sleep(0.002)

    def wait_for(self, seconds: float) -> None:
        """Waits so long, or until it ends."""
        deadline = time.monotonic() + seconds
        self.wait_until(lambda: time.monotonic() > deadline or self.process.poll() is not None)

    def kill(self, victim: str) -> int:
        """SIGKILL to the driver, to one worker, or to the whole node.

        The node is the driver with its Ray: raylet, GCS, dashboard and all workers.

        Returns:
            How many processes were killed; early in a run, and at its end, there is no worker.
        """
        with suppress(psutil.NoSuchProcess):  # it has just ended
            self.family |= set(self.process.children(recursive=True))
        victims: list[psutil.Process] = [self.process]
        if victim == "node":
            victims += list(self.family)
        if victim == "worker":
            workers = [process for process in self.family if title(process).startswith(self.workers)]
            victims = random.sample(workers, min(len(workers), 1))
        return sum(map(kill, victims))

    def finish(self) -> str:
        """Waits for a good end; returns what the run printed."""
        assert self.process.wait() == 0, self.log.read_text()[-3000:]
        return self.log.read_bytes()[self.printed_before :].decode()

    def clean_up(self) -> None:
        for process in (*self.family, self.process):
            kill(process)


@contextmanager
def starter(*arguments: Any) -> Iterator[Callable[[], Run]]:
    """Starts the same command, any number of times; the arguments are those of `Run`."""
    started: list[Run] = []

    def start() -> Run:
        started.append(Run(*arguments))
        return started[-1]

    yield start
    for run in started:
        run.clean_up()


def kill_at_a_moment(start: Callable[[], Run], victim: str, within_s: float) -> tuple[Run, int, float]:
    """Kills the victim at a random moment: once there is one, and in a new run where there is none any more.

    Returns:
        The run, how many processes were killed, and after how many seconds.
    """
    while True:
        run, begun = start(), time.monotonic()
        run.wait_for(random.uniform(0, within_s))
        while run.process.poll() is None:
            if killed := run.kill(victim):
                return run, killed, time.monotonic() - begun
            time.sleep(0.01)
        shutil.rmtree(run.folder)


def kill(process: psutil.Process) -> bool:
    """Whether it was there to be killed."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return False
    return True


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""
