"""The configuration of a run: one strict YAML file, one frozen model per part of the product.

`load_config("tiny", ["train.learning_rate=1e-4"])` reads a preset of `presets/` or any YAML file and what
that extends, applies the overrides, resolves `${...}` references and checks every key and value. `to_yaml`
prints it with an explanation of every key: the docstring below the key's field.
"""

from pipelines.config.base import PoolConfig, folder_or_s3, how_keys, is_url
from pipelines.config.caching import CacheConfig, VideoLimits
from pipelines.config.evaluation import Contestant, EvaluateConfig
from pipelines.config.generation import GenerateConfig, SamplingConfig, StepCache
from pipelines.config.loading import RESOLVED, key_advice, load_config, preset_names, read_saved
from pipelines.config.model import BackboneConfig, PhysicsConfig, VlmConfig
from pipelines.config.printing import json_schema, section_to_yaml, to_yaml
from pipelines.config.run import Config, RayConfig
from pipelines.config.sandbox import Part, PretrainConfig, SimulateConfig
from pipelines.config.serving import ServeConfig
from pipelines.config.training import LossWeights, TrainConfig

__all__ = [
    "RESOLVED",
    "BackboneConfig",
    "CacheConfig",
    "Config",
    "Contestant",
    "EvaluateConfig",
    "GenerateConfig",
    "LossWeights",
    "Part",
    "PhysicsConfig",
    "PoolConfig",
    "PretrainConfig",
    "RayConfig",
    "SamplingConfig",
    "ServeConfig",
    "SimulateConfig",
    "StepCache",
    "TrainConfig",
    "VideoLimits",
    "VlmConfig",
    "folder_or_s3",
    "how_keys",
    "is_url",
    "json_schema",
    "key_advice",
    "load_config",
    "preset_names",
    "read_saved",
    "section_to_yaml",
    "to_yaml",
]
