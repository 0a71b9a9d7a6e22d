"""The trainer: Ray Train's workers, and what each reserves. It loads torch, but no networks."""

from typing import Any

from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipelines.config import Config
from pipelines.layout import RunFolder
from pipelines.training.data import build_dataset
from prophy.training.cache import PriorCache


def build_trainer(config: Config, cache: PriorCache, backbone: dict[str, str | None]) -> TorchTrainer:
    """The trainer: workers, and what each reserves. Reads the first step as a trial.

    Args:
        config: with the revision of `backbone`.
        cache: the samples.
        backbone: see `pin_backbone`.

    Raises:
        ProPhyError: the cache does not fit the configuration.
    """
    train = config.train
    _ = build_dataset(config, cache, rank=0)[0]
    gpus = {"GPU": train.gpus_per_worker} if train.gpus_per_worker else {}
    return TorchTrainer(
        _work,  # type: ignore[arg-type]  # Ray's annotation has no return value
        train_loop_config={"config": config, "cache": cache, "backbone": backbone},
        torch_config=TorchConfig(backend="nccl" if gpus else "gloo"),
        scaling_config=ScalingConfig(
            num_workers=train.num_workers,
            use_gpu=bool(gpus),
            resources_per_worker={"CPU": train.cpus_per_worker, **gpus},
        ),
        run_config=RunConfig(
            name=RunFolder(config.run_dir).training.name,
            storage_path=str(config.run_dir),
            failure_config=FailureConfig(max_failures=train.max_failures),
        ),
    )


def _work(loop_config: dict[str, Any]) -> str | None:
    # diffusers and DeepSpeed: of no use to the driver
    from pipelines.training.loop import train_loop_per_worker

    return train_loop_per_worker(loop_config)
