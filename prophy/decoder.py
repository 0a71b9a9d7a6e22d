"""Videos read in a process of its own, which may crash, stall or outgrow its memory without harm.

The child sees no environment of its parent and answers with JSON and raw pixels, never with pickles: what a
hostile file makes a decoder answer is a wrong picture or an error, and never runs in the parent. The child
is no sandbox: it has the files and the network of its user.
"""

import json
import os
import resource
import signal
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np

from prophy.video import VideoError, VideoInfo, probe, read_frames

ATTEMPTS = 2


class DecoderError(VideoError):
    """A video that ended its decoder, `ATTEMPTS` times."""


class Decoder:
    """`probe` and `read_frames` of `prophy.video` in a child process, which starts on the first call.

    Args:
        max_memory_bytes: address space of the child, about 0.25 GB of which are its libraries.
        max_seconds: time that one call may take.
    """

    def __init__(self, max_memory_bytes: int, max_seconds: float) -> None:
        self.max_memory_bytes = max_memory_bytes
        self.max_seconds = max_seconds
        self._child: subprocess.Popen[bytes] | None = None
        self._connection: Connection | None = None

    def probe(self, path: str | Path, **limits: float) -> VideoInfo:
        """See `prophy.video.probe`.

        Raises:
            VideoError: as there.
            DecoderError: the child died of this video, twice.
        """
        answer, _ = self._call({"call": "probe", "path": str(path), "limits": limits})
        return VideoInfo(**answer)

    def read_frames(
        self,
        path: str | Path,
        start_s: float,
        end_s: float,
        num_frames: int,
        height: int,
        width: int,
        aspect_ratio: float | None = None,
    ) -> np.ndarray:
        """See `prophy.video.read_frames`.

        Raises:
            VideoError: as there.
            DecoderError: the child died of this video, twice.
        """
        arguments = [start_s, end_s, num_frames, height, width, aspect_ratio]
        _, pixels = self._call({"call": "read_frames", "path": str(path), "arguments": arguments})
        return np.frombuffer(pixels, np.uint8).reshape(num_frames, height, width, 3)

    def close(self) -> None:
        """Ends the child."""
        if self._child is not None and self._connection is not None:
            self._connection.close()
            self._child.kill()
            self._child.wait()
        self._child = self._connection = None

    def __del__(self) -> None:
        self.close()

    def _call(self, request: dict[str, Any]) -> tuple[dict[str, Any], bytes]:
        for _ in range(ATTEMPTS):
            connection = self._connection or self._start()
            try:
                connection.send_bytes(json.dumps(request).encode())
                answer = json.loads(connection.recv_bytes())
                pixels = connection.recv_bytes() if answer.pop("has_pixels") else b""
            except (EOFError, OSError):
                death = self._death()
                continue
            if "error" in answer:
                raise VideoError(answer["error"])
            return answer, pixels
        raise DecoderError(f"{request['path']} {death}, {ATTEMPTS} times; convert or remove it")

    def _start(self) -> Connection:
        self._connection, theirs = Pipe()
        with theirs:
            self._child = subprocess.Popen(
                [sys.executable, "-P", "-m", "prophy.decoder", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={
                    "PYTHONPATH": os.pathsep.join(sys.path),
                    "OMP_NUM_THREADS": "1",  # each thread of a library reserves address space
                    "PROPHY_DECODER": json.dumps([self.max_memory_bytes, self.max_seconds]),
                },
            )
        return self._connection

    def _death(self) -> str:
        """How the child ended, for a sentence about the video."""
        assert self._child is not None
        code = self._child.wait()
        self.close()
        if code == -signal.SIGALRM:
            return f"takes the decoder longer than {self.max_seconds:g} s (cache.limits.max_seconds)"
        if code == _OUT_OF_MEMORY:
            return (
                f"needs more than {self.max_memory_bytes:,} bytes of memory to decode "
                f"(cache.limits.max_memory_bytes)"
            )
        return f"crashed the decoder ({signal.Signals(-code).name if code < 0 else f'exit code {code}'})"


_OUT_OF_MEMORY = 77  # exit code of a child


def _serve(connection: Connection) -> None:
    """The child: answers until the parent hangs up."""
    max_memory_bytes, max_seconds = json.loads(os.environ["PROPHY_DECODER"])
    resource.setrlimit(resource.RLIMIT_AS, (max_memory_bytes, max_memory_bytes))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    while True:
        try:
            request = json.loads(connection.recv_bytes())
        except EOFError:
            return
        signal.setitimer(signal.ITIMER_REAL, max_seconds)  # ends the process, even within C code
        pixels = b""
        try:
            if request["call"] == "probe":
                answer = vars(probe(request["path"], **request["limits"]))
            else:
                answer = {}
                pixels = read_frames(request["path"], *request["arguments"]).tobytes()
        except VideoError as error:
            answer = {"error": str(error)}
        except MemoryError:
            sys.exit(_OUT_OF_MEMORY)
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.send_bytes(json.dumps({**answer, "has_pixels": bool(pixels)}).encode())
        if pixels:
            connection.send_bytes(pixels)


if __name__ == "__main__":
    _serve(Connection(int(sys.argv[1])))
