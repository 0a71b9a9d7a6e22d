"""The ways to train that `prophy plan` tells apart, the fastest first."""

from dataclasses import dataclass

from pydantic import ValidationError

from pipelines.config import TrainConfig


@dataclass(frozen=True)
class Way:
    """A way to train: the keys of the configuration that decide about memory."""

    zero_stage: int
    offload: str
    gradient_checkpointing: bool
    sequence_parallel: int = 1

    def keys(self, train: TrainConfig) -> dict[str, int | str | bool]:
        """What it sets of the section `train` of a configuration."""
        keys: dict[str, int | str | bool] = {
            "zero_stage": self.zero_stage,
            "offload": self.offload,
            "gradient_checkpointing": self.gradient_checkpointing,
        }
        if train.keep_attention and not self.gradient_checkpointing:
            keys["keep_attention"] = False
        if self.sequence_parallel > 1:
            keys["sequence_parallel"] = self.sequence_parallel
        return keys

    def fits(self, train: TrainConfig) -> bool:
        """Whether the other keys of this configuration go with it."""
        try:
            TrainConfig.model_validate(train.model_dump() | self.keys(train))
        except ValidationError:
            return False
        return True

    def overrides(self, train: TrainConfig) -> str:
        """The arguments of `prophy train` with this configuration."""
        keys = {
            key: str(value).lower() if isinstance(value, bool) else value
            for key, value in self.keys(train).items()
        }
        return " ".join(f"--set train.{key}={value}" for key, value in keys.items())


# The less there is to compute twice and to communicate, the faster: the first that fits is advised. ZeRO 2
# reduces gradients after every micro-batch, ZeRO 1 after the last. GPUs of a node exchange tokens faster than
# any of them reaches the host.
WAYS = [
    Way(1, "none", False),
    Way(2, "none", False),
    Way(1, "none", True),
    Way(2, "none", True),
    Way(3, "none", True),
    Way(2, "optimizer", True),
    Way(3, "optimizer", True),
    Way(3, "all", True),
]
SHOWN = [(0, "none"), (1, "none"), (2, "none"), (3, "none"), (2, "optimizer"), (3, "optimizer"), (3, "all")]
