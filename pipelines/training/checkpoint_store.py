"""The checkpoints of a run: which of them count, stay and go, wherever they lie."""

import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, Literal

from pipelines.layout import checkpoint_name
from pipelines.training.checkpoint import MANIFEST, Checkpoint, DamagedError
from prophy.errors import ProPhyError
from prophy.leases import held
from prophy.places import change, place_of, write_whole
from prophy.stores import mendable, try_writing

OWNER = "run.json"
PINS = "pinned.json"

logger = logging.getLogger(__name__)


class CheckpointStore(ABC):
    """The checkpoints of a run, each called by its step.

    One counts from the moment its manifest is there, which is written last and removed first.

    Args:
        location: where they lie.

    Attributes:
        location: as it was given.
        look_every_s: how long to wait before another look for new ones.
    """

    look_every_s = 1.0

    def __init__(self, location: str) -> None:
        self.location, self._place = location, place_of(location, "train.checkpoints")

    @abstractmethod
    def committed(self) -> list[int]:
        """Steps of those with a manifest, the newest first; their files are not looked at."""

    @abstractmethod
    def check(self, step: int) -> None:
        """Looks, without a copy, whether the files of a committed checkpoint are what its manifest says.

        Raises:
            DamagedError: they are not.
        """

    @abstractmethod
    def open(self, step: int) -> AbstractContextManager[Checkpoint]:
        """A committed checkpoint, to be read within the block.

        Raises:
            DamagedError: what `check` cannot see shows while it is copied.
        """

    @abstractmethod
    def begin(self, step: int) -> None:
        """Makes room for a checkpoint: what has no manifest, or is of the same step, goes."""

    @abstractmethod
    def put(self, step: int, name: str, num_bytes: int, write: Callable[[Path], object]) -> dict[str, Any]:
        """Adds a file to a checkpoint that has begun.

        Args:
            step: the checkpoint's.
            name: the file's.
            num_bytes: how much of a disk it takes, but for some kilobytes.
            write: writes it to a place on a disk.

        Returns:
            What the manifest says of it: size and hash.
        """

    @abstractmethod
    def remove(self, step: int) -> None:
        """Removes a checkpoint; what is half removed is none."""

    @abstractmethod
    def set_aside(self, step: int) -> None:
        """Gives a checkpoint the ending `.damaged`, in the place of an earlier one: it no longer counts."""

    def commit(self, step: int, manifest: Mapping[str, Any]) -> None:
        """Makes a checkpoint count whose files are all there."""
        self._write(f"{checkpoint_name(step)}/{MANIFEST}", json.dumps(manifest, indent=1).encode())

    def claim(self, run_dir: Path) -> None:
        """Tries the place, and takes it for one run: two would remove each other's checkpoints.

        Raises:
            ProPhyError: it cannot be used, or is another run's.
        """
        claimed = json.dumps({"run_dir": str(run_dir)}).encode()
        with mendable(f"train.checkpoints: cannot use {self.location}"):
            try_writing(self.location)
            said = self._read(OWNER)
            if said is None:
                # Of two that start at the same time, the second finds what the first has written.
                change(self._place / OWNER, lambda theirs: theirs or claimed)
                said = self._read(OWNER) or b""
        owner = json.loads(said)["run_dir"]
        if owner != str(run_dir):
            raise ProPhyError(
                f"{self.location} holds the checkpoints of the run in {owner}; choose another "
                f"train.checkpoints, or remove {self.location}/{OWNER} to go on from them in {run_dir}"
            )

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Holds the place for one process, which runs the block in its main thread.

        The name of a run is no guard: on machines with disks of their own, two runs may have the same.

        Raises:
            ProPhyError: see `prophy.leases.held`.
        """
        with held(self._place, "train.checkpoints"):
            yield

    def place(self, step: int) -> str:
        """Where a checkpoint lies."""
        return f"{self.location}/{checkpoint_name(step)}"

    def manifest(self, step: int, part: Literal["files", "run"]) -> dict[str, Any]:
        """A part of the manifest of a checkpoint.

        Raises:
            DamagedError: the manifest is no longer there, or cannot be read.
        """
        try:
            return json.loads(self._read(f"{checkpoint_name(step)}/{MANIFEST}") or b"")[part]
        except (ValueError, KeyError):
            raise DamagedError(self.place(step), f"{MANIFEST} cannot be read") from None

    def pin(self, **steps: int | None) -> None:
        """Has `keep` leave checkpoints, by the reason for it, and no others that were pinned before.

        Only for one process at a time.
        """
        kept = {reason: step for reason, step in steps.items() if step is not None}
        self._write(PINS, json.dumps(kept).encode())

    def pinned(self) -> dict[str, int]:
        """Steps of the checkpoints that stay, by the reason for it."""
        return json.loads(self._read(PINS) or b"{}")

    def keep(self, number: int) -> None:
        """Removes what is committed but for so many, the newest, and for what is pinned."""
        kept = set(self.pinned().values())
        for old in [step for step in self.committed()[number:] if step not in kept]:
            self.remove(old)

    def newest_run(self) -> tuple[int, dict[str, Any]] | None:
        """Step of the newest checkpoint, and what was to be known about the run; no other file is read."""
        for step in self.committed():
            with suppress(DamagedError):
                return step, self.manifest(step, "run")
        return None

    @contextmanager
    def latest(self) -> Iterator[Checkpoint | None]:
        """The newest checkpoint whose files are what its manifest says; None if there is none."""
        with ExitStack() as opened:
            found = (self._sound(step, opened) for step in self.committed())
            yield next(filter(None, found), None)

    @contextmanager
    def find(self, step: int) -> Iterator[Checkpoint | None]:
        """The checkpoint of `step`; None if there is none whose files are what its manifest says."""
        with ExitStack() as opened:
            yield self._sound(step, opened) if step in self.committed() else None

    def _read(self, name: str) -> bytes | None:
        """A small file; None if there is none."""
        try:
            return (self._place / name).read_bytes()
        except FileNotFoundError:
            return None

    def _write(self, name: str, content: bytes) -> None:
        """Writes a small file, or replaces it; nobody sees a part of it."""
        self._place.mkdir(parents=True, exist_ok=True)
        write_whole(self._place / name, content)

    def _sound(self, step: int, opened: ExitStack) -> Checkpoint | None:
        try:
            self.check(step)
            return opened.enter_context(self.open(step))
        except DamagedError as damage:
            logger.warning("%s", damage)
            return None

    def set_damaged_aside(self, sound: int | None = None) -> int | None:
        """Step of the newest checkpoint that `check` finds sound; newer ones are set aside.

        Only for the process that writes the checkpoints: to another, one that is being removed looks damaged.

        Args:
            sound: one that was looked at a moment ago: tens of gigabytes are not hashed twice.
        """
        for step in self.committed():
            try:
                if step != sound:
                    self.check(step)
                return step
            except DamagedError as damage:
                self.set_aside(step)
                logger.warning("%s; it is now %s.damaged", damage, checkpoint_name(step))
        return None
