"""One writer of a folder at a time: by a lock on a file of a disk, by a lease in S3.

A lease is an object that its holder keeps on replacing, each time on the condition that it still is what the
holder wrote. Who finds one that nobody replaces any more takes it over, on the same condition. Clocks of
different machines are never compared.
"""

import logging
import os
import signal
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager

from filelock import FileLock, Timeout

from prophy.errors import ProPhyError
from prophy.places import Place, S3Path

logger = logging.getLogger(__name__)

LEASE = ".lease"
_RENEWED_EVERY_S = 10.0
_PATIENCE = 3  # renewals that a holder may miss: an answer of S3 may take one or two
_RELEASED = b""
_SIGNAL = signal.SIGUSR2  # SIGINT is ignored where a shell has started the command in the background


class _LostError(KeyboardInterrupt):
    """Ends the block of a writer whose lease is lost, as an interrupt of the user would."""


def _lose(*_: object) -> None:
    raise _LostError


@contextmanager
def held(folder: Place, setting: str) -> Iterator[None]:
    """Holds a folder for one writer, who runs the block in the main thread.

    Args:
        folder: on a disk it must be there.
        setting: the key of the configuration that names it.

    Raises:
        ProPhyError: another run holds it, or has taken it over meanwhile; or S3 refuses or does not answer.
        OSError: the disk cannot be written to.
    """
    if isinstance(folder, S3Path):
        with Lease(folder, setting).held():
            yield
        return
    lock = FileLock(folder / ".lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise _is_held(folder, setting) from None
    try:
        yield
    finally:
        lock.release()


class Lease:
    """The right to write below a place in S3.

    Args:
        folder: the place.
        setting: the key of the configuration that names it.
        renewed_every_s: by the holder; a lease that nobody has renewed for `_PATIENCE` times as long is free.
    """

    def __init__(self, folder: S3Path, setting: str, renewed_every_s: float = _RENEWED_EVERY_S) -> None:
        self._folder, self._setting, self._every_s = folder, setting, renewed_every_s
        self._file = folder / LEASE
        self._holder, self._number = f"{socket.gethostname()} {os.getpid()} {uuid.uuid4().hex}", 0
        self._etag = ""
        self._ended = threading.Event()
        self._is_lost = False

    @contextmanager
    def held(self) -> Iterator[None]:
        """Holds it while the block runs, in the main thread, which is interrupted if the lease is lost.

        Raises:
            ProPhyError: see the function of this name.
        """
        self.acquire()
        self._writer, before = threading.get_ident(), signal.signal(_SIGNAL, _lose)
        renewing = threading.Thread(target=self._renew_on, daemon=True)
        renewing.start()
        try:
            try:
                yield
            finally:
                self._ended.set()
                renewing.join()
                if not self._is_lost:
                    self._is_lost = not self._release()
        except _LostError:
            pass
        finally:
            signal.signal(_SIGNAL, before)
        if self._is_lost:
            raise ProPhyError(
                f"another run has taken over {self._folder}, because this one had not renewed its lease for "
                f"{_PATIENCE * self._every_s:g} s; what was written is whole, and that run goes on from it"
            )

    def acquire(self) -> None:
        """Gets the lease, or waits until it is known whether its holder still renews it.

        Raises:
            ProPhyError: another run holds it; S3 refuses or does not answer, or knows no conditions.
        """
        if not self._put(IfNoneMatch="*"):
            self._take_over()
        for condition, value in (("IfNoneMatch", "*"), ("IfMatch", '"0"')):  # neither holds
            if self._file.put(_RELEASED, **{condition: value}):
                raise ProPhyError(
                    f"the store of {self._folder} ignores {condition} of a PUT, so that several runs could "
                    f"write there at once; choose a folder or another store for {self._setting}"
                )

    def _take_over(self) -> None:
        found = self._file.etag()
        if found is not None and self._file.read_bytes() != _RELEASED:
            waits_s = _PATIENCE * self._every_s
            logger.info("a run has not released %s; within %g s it shows if it is alive", self._file, waits_s)
            for _ in range(_PATIENCE):
                time.sleep(self._every_s)
                if self._file.etag() != found:
                    raise _is_held(self._folder, self._setting)
            logger.warning("taking over %s from a run that ended without releasing it", self._folder)
        # Its state may have changed since it was looked at; then somebody else was quicker.
        if found is None or not self._put(IfMatch=found):
            raise _is_held(self._folder, self._setting)

    def renew(self) -> bool:
        """Writes the lease anew; returns whether it was still this holder's.

        Raises:
            ProPhyError: S3 refuses or does not answer.
        """
        return self._put(IfMatch=self._etag)

    def _renew_on(self) -> None:
        while not self._ended.wait(self._every_s):
            try:
                self._is_lost = not self.renew()
            except ProPhyError as error:  # the lease is this holder's until another run takes it
                logger.warning("the lease is not renewed: %s", error)
            if self._is_lost:
                # A signal of the system: one of Python's own would not end what waits.
                signal.pthread_kill(self._writer, _SIGNAL)
                return

    def _release(self) -> bool:
        """Lets the next run begin at once; returns whether the lease was still this holder's."""
        try:
            if self._file.put(_RELEASED, IfMatch=self._etag) is not None:
                return True
            if (own := self._own_version()) is not None:
                return self._file.put(_RELEASED, IfMatch=own) is not None
            # The answer to the first attempt was lost, and s3fs made another.
            return self._file.exists() and self._file.read_bytes() == _RELEASED
        except ProPhyError as error:
            waits_s = _PATIENCE * self._every_s
            logger.warning("the lease is not released, so the next run waits %g s: %s", waits_s, error)
            return True

    def _put(self, **condition: str) -> bool:
        self._number += 1  # no two versions are equal
        etag = self._file.put(f"{self._holder} {self._number}".encode(), **condition)
        if etag is None:  # or else the answer to an earlier PUT was lost, which S3 has applied
            etag = self._own_version()
        self._etag = etag or self._etag
        return etag is not None

    def _own_version(self) -> str | None:
        """The `etag` of what lies there, if this holder wrote it."""
        found = self._file.etag()  # before the content: what is newer would not match it
        is_own = found is not None and self._file.read_bytes().startswith(f"{self._holder} ".encode())
        return found if is_own else None


def _is_held(folder: Place, setting: str) -> ProPhyError:
    return ProPhyError(f"another run writes to {folder}; wait for it, or choose another {setting}")
