"""Several processes that share each video of a replica: the replica is the first, Ray actors are the others.

The actors are placed in the replica's own placement group, and end with it. Every process holds the model
and makes every video, but computes a share of its work (`VideoSampler.share`). None waits for another
outside of a call, and inside of one at most `PATIENCE`: then it fails, and with it the whole replica.
"""

import logging
import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import ray
import torch
import torch.distributed as dist
from ray.exceptions import ActorDiedError, RayError
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout, _world

from pipelines.config import Config, ServeConfig
from pipelines.generation.sampler import VideoSampler, new_trace
from pipelines.generation.spec import ShapeLimits, VideoResult, VideoSpec
from pipelines.serving.replica import GangError
from prophy.device import default_device
from prophy.errors import ProPhyError

logger = logging.getLogger(__name__)

# How far one process may be behind the others, which do the same at the same time.
PATIENCE = timedelta(minutes=5)
_ANSWERS_WITHIN_S = 20  # less than the 30 s that Serve gives a replica to say how it is
_APART = "a process that shares this replica's videos has failed, or keeps the others waiting"


class _StoppedError(Exception):
    """The first process no longer wants the video."""


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

    def warm_up(self, limits: ShapeLimits) -> None:
        """As `VideoSampler.warm_up`."""
        calls = [follower.warm_up.remote(limits) for follower in self._followers]
        super().warm_up(limits)
        ray.get(calls)

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
                raise failure

        try:
            result = super().render(spec, report, image)
        except Exception as error:
            if error is not failure and not isinstance(error, ProPhyError):
                raise GangError(_APART) from error
            failure = error
        refused = isinstance(failure, ProPhyError)
        try:
            ray.get(calls, timeout=_ANSWERS_WITHIN_S if refused else PATIENCE.total_seconds())
        except RayError as error:
            if not refused:
                raise GangError(_APART) from error
            # This process alone lacked memory, and the others wait for it. Without them it is soon replaced
            # (`check_device`), but the client hears why first.
            for follower in self._followers:
                ray.kill(follower)
        if failure is not None:
            raise failure
        return result


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
        """Takes part in a video, until it is sampled or the first process stops it.

        What is wrong with the video the first process finds too, and says. After any other error this process
        ends: so the first one notices, even where it waits for this one on the device.
        """
        try:
            self._sampler.sample(spec, _obey, new_trace(spec), image)
        except (_StoppedError, ProPhyError):
            pass
        except Exception as error:
            logger.critical("a process that shares videos fails, and ends", exc_info=error)
            logging.shutdown()
            os._exit(1)


def _obey(progress: float) -> None:
    """After a denoising step: goes on or stops, as the first process does."""
    stop = torch.empty(1, dtype=torch.uint8)
    dist.broadcast(stop, src=0)
    if stop.item():
        raise _StoppedError


def _join(sampler: VideoSampler, settings: ServeConfig, store: dist.Store, rank: int) -> None:
    """Puts this process into the group of a replica, in which `sampler` then shares its videos."""
    # On GPUs too, what one says to all goes by gloo: it waits for no kernel.
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    size = settings.processes_per_replica
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    shape, names = (1 + settings.cfg_parallel, 1, settings.sequence_parallel), ("guidance", "ring", "ulysses")
    sampler.share(init_device_mesh(default_device().type, shape, mesh_dim_names=names))
    for group in _world.pg_map:  # by default those of a mesh wait for half an hour
        _set_pg_timeout(PATIENCE, group)
