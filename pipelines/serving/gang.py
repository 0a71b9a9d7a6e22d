"""Several processes that share each video of a replica: the replica is the first, Ray actors are the others.

The actors are placed in the replica's own placement group, and end with it. Every process holds the model
and makes every video, but computes a share of its work (`VideoSampler.share`). None waits for another
outside of a call, and inside of one at most `PATIENCE`: then it fails, and with it the whole replica. Where
one alone lacks memory, the others need not wait so long: what it says ends the call, and then the replica.
"""

import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _world

from pipelines.config import Config, ServeConfig
from pipelines.generation.sampler import VideoSampler, new_trace
from pipelines.generation.spec import ShapeLimits, VideoResult, VideoSpec
from pipelines.runtime import find_user_error
from pipelines.serving.replica import GangError
from prophy.device import default_device
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

# How far one process may be behind the others, which do the same at the same time.
PATIENCE = timedelta(minutes=5)
_ANSWERS_WITHIN_S = 20  # less than the 30 s that Serve gives a replica to say how it is
_APART = "a process that shares this replica's videos has failed, or keeps the others waiting"
_Result = TypeVar("_Result")


class _StoppedError(Exception):
    """No more of the video is wanted here."""


class Gang(VideoSampler):
    """Makes videos that `serve.processes_per_replica` processes share, this one the first.

    Args:
        config: the run.

    Raises:
        ProPhyError: as `VideoSampler` and its `share`.
        RayError: another process has ended.
    """

    def __init__(self, config: Config) -> None:
        settings = config.serve
        actor = ray.remote(Follower).options(
            num_cpus=settings.num_cpus, num_gpus=settings.num_gpus, max_concurrency=2
        )
        self._followers: list[Any] = [actor.remote(config) for _ in range(settings.processes_per_replica - 1)]
        super().__init__(config, settings.sequence_parallel)
        ray.get([follower.__ray_ready__.remote() for follower in self._followers])  # they have the model too
        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        joining = [follower.join.remote(store.port, rank) for rank, follower in enumerate(self._followers, 1)]
        _join(self, settings, store, 0)
        ray.get(joining)
        # What waits on the device for another process cannot be stopped: it is left behind in there.
        self._thread = ThreadPoolExecutor(max_workers=1)

    def warm_up(self, limits: ShapeLimits) -> None:
        """As `VideoSampler.warm_up`."""
        calls = [follower.warm_up.remote(limits) for follower in self._followers]
        self._together(partial(super().warm_up, limits), calls)

    def check_device(self) -> None:
        """As `VideoSampler.check_device`, for each process.

        Raises:
            GangError: a process has ended.
            RuntimeError: a device fails.
            RayError: a process does not answer.
        """
        super().check_device()
        checks = [follower.check_device.remote() for follower in self._followers]
        try:
            ray.get(checks, timeout=_ANSWERS_WITHIN_S)
        except ActorDiedError as error:
            raise GangError(_APART) from error

    def render(
        self,
        spec: VideoSpec,
        on_step: Callable[[float], None] = lambda progress: None,
        image: bytes | None = None,
    ) -> VideoResult:
        """As `VideoSampler.render`; what `on_step` raises ends the sampling of all processes.

        Raises:
            ProPhyError: as there.
            GangError: a process has ended or failed, or no longer keeps step.
        """
        calls = [follower.follow.remote(spec, image) for follower in self._followers]
        failure: Exception | None = None

        def report(progress: float) -> None:
            nonlocal failure
            try:
                on_step(progress)
            except Exception as error:
                failure = error
            dist.broadcast(torch.tensor([failure is not None], dtype=torch.uint8), src=0)
            if failure is not None:
                raise _StoppedError

        try:
            return self._together(partial(super().render, spec, report, image), calls)
        except ProPhyError:
            raise
        except _StoppedError:
            assert failure is not None
            raise failure from None
        except Exception as error:
            raise GangError(_APART) from error

    def _together(self, own: Callable[[], _Result], calls: Sequence[Any]) -> _Result:
        """Does `own` while each follower does the same in its call; what `own` returns, once all are done.

        Raises:
            ProPhyError: this process says what is wrong; or another one alone does, and this one waits for it
                in vain. Who waits so is ended, and `check_device` finds that.
            RayError: another process has ended.
            TimeoutError: another process takes longer than this one by `PATIENCE`.
            Exception: as `own`.
        """
        mine = self._thread.submit(own)
        pending: set[Future[Any]] = {mine, *(call.future() for call in calls)}
        refusal: ProPhyError | None = None
        while pending:
            patience = PATIENCE.total_seconds() if mine.done() else None
            done, pending = wait(
                pending, patience if refusal is None else _ANSWERS_WITHIN_S, return_when=FIRST_COMPLETED
            )
            for error in [one.exception() for one in done]:
                if error is not None and not isinstance(error, _StoppedError):
                    refusal = refusal or find_user_error(error)
                    if refusal is None:
                        raise error
            if not done:
                if refusal is None:
                    raise TimeoutError
                for follower in self._followers:
                    ray.kill(follower)
                raise refusal
        return mine.result()


class Follower:
    """Another process of a gang, as an actor: it does what the first does, and keeps nothing of it.

    Args:
        config: the run.
    """

    def __init__(self, config: Config) -> None:
        self._settings = config.serve
        self._sampler = VideoSampler(config, self._settings.sequence_parallel)

    def join(self, port: int, rank: int) -> None:
        """Meets the others at a port of this node."""
        _join(self._sampler, self._settings, dist.TCPStore("127.0.0.1", port), rank)

    def warm_up(self, limits: ShapeLimits) -> None:
        """As `VideoSampler.warm_up`."""
        self._sampler.warm_up(limits)

    def check_device(self) -> None:
        """As `VideoSampler.check_device`."""
        self._sampler.check_device()

    def follow(self, spec: VideoSpec, image: bytes | None) -> None:
        """Takes part in a video, until it is denoised or the first process stops it.

        After an error that is not the video's this process ends.

        Raises:
            ProPhyError: as `VideoSampler.sample`.
        """
        try:
            self._sampler.sample(spec, _obey, new_trace(spec), image)
        except _StoppedError:
            pass
        except ProPhyError:
            raise
        except Exception as error:
            logger.critical("a process that shares videos fails, and ends", exc_info=error)
            logging.shutdown()
            os._exit(1)


def _obey(progress: float) -> None:
    """After a denoising step: goes on or stops, as the first process does, which alone decodes the video."""
    stop = torch.empty(1, dtype=torch.uint8)
    dist.broadcast(stop, src=0)
    if stop.item() or progress == 1:
        raise _StoppedError


def _join(sampler: VideoSampler, settings: ServeConfig, store: dist.Store, rank: int) -> None:
    """Puts this process into the group of a replica, in which `sampler` then shares its videos."""
    # On GPUs too, what one says to all goes by gloo: it waits for no kernel.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    size = settings.processes_per_replica
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    shape, names = (1 + settings.cfg_parallel, 1, settings.sequence_parallel), ("guidance", "ring", "ulysses")
    sampler.share(init_device_mesh(default_device().type, shape, mesh_dim_names=names))
    # By default those of a mesh wait for half an hour. One is made by diffusers, and no public list has it.
    for group in _world.pg_map:
        group.set_timeout(PATIENCE)
