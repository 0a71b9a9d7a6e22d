"""A few steps of training without Ray and DeepSpeed, their checkpoint as one rank writes it, and videos."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
import torch.distributed as dist

from pipelines.config import Config
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import FolderStore
from pipelines.training.data import build_dataset
from pipelines.training.model import build_module
from pipelines.training.saving import Fragment, Save
from pipelines.training.train import pin_backbone
from prophy.models.checkpoint import lora_config
from prophy.training.cache import PriorCache
from prophy.training.module import ProPhyTrainModule


@contextmanager
def one_rank() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def with_backbone(config: Config, how: str) -> Config:
    """With `train.backbone`."""
    return config.model_copy(update={"train": config.train.model_copy(update={"backbone": how})})


def train(config: Config, cache: PriorCache) -> ProPhyTrainModule:
    """After three steps."""
    module = build_module(config, cache.null_text(), cache.phenomena)
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    optimizer, dataset = torch.optim.AdamW(parameters, lr=1e-2), build_dataset(config, cache, rank=0)
    for step in range(3):
        [batch], captions = dataset[step]
        optimizer.zero_grad()
        module(batch, captions).loss.backward()
        optimizer.step()
    return module.eval()


def save_checkpoint(config: Config, module: ProPhyTrainModule) -> None:
    """As after step 3 of a run of `prophy train`."""
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    parts = [Fragment(name, 0, {"parameter": value.detach().flatten()}) for name, value in trained.items()]
    run = {
        "backbone": pin_backbone(config),
        "physics": module.transformer.config["physics"],
        "lora": lora_config(module.transformer),
    }
    shapes = {name: value.shape for name, value in trained.items()}
    with one_rank():
        Save(FolderStore(config.checkpoints), 3, parts, shapes, run).commit(num_to_keep=1)


def last_checkpoint(config: Config) -> Checkpoint | None:
    """What `save_checkpoint` saved."""
    with FolderStore(config.checkpoints).latest() as checkpoint:
        return checkpoint


def alike(one: np.ndarray, other: np.ndarray) -> bool:
    """But for rounding."""
    return np.abs(one.astype(int) - other).max() <= 1
