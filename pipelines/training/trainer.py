"""The trainer: Ray Train's workers, and what each reserves. It loads torch, but no networks."""

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.config import Config
from pipelines.layout import RunFolder
from prophy.training.cache import PriorCache


def build_trainer(
    config: Config, cache: PriorCache, backbone: dict[str, str | None], sound: int | None
) -> TorchTrainer:
    """The trainer: workers, and what each reserves.

    Args:
        config: with the revision of `backbone`.
        cache: the samples.
        backbone: see `pin_backbone`.
        sound: step of a checkpoint whose files were just looked at; workers do not hash them again.
    """
    train = config.train
    # mypy sees Ray Train V1, which has no range.
    num_workers: Any = train.num_workers
    if train.min_workers is not None and train.min_workers < train.num_workers:
        num_workers = (train.min_workers, train.num_workers)
    gpus = {"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}
    return TorchTrainer(
        _work,  # type: ignore[arg-type]  # Ray's annotation has no return value
        train_loop_config={"config": config, "cache": cache, "backbone": backbone, "sound": sound},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": train.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=RunFolder(config.run_dir).training.name,
            storage_path=str(config.run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def _work(loop_config: dict[str, Any]) -> str | int | None:
    # diffusers and DeepSpeed: of no use to the driver
    from pipelines.training.loop import train_loop_per_worker

    return train_loop_per_worker(loop_config)
