"""The ways to train that `prophy plan` tells apart, the fastest first."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Way:
    """A way to train: the keys of the configuration that decide about memory."""

    zero_stage: int
    offload: str
    gradient_checkpointing: bool
    sequence_parallel: int = 1

    @property
    def overrides(self) -> str:
        """The arguments of `prophy train`."""
        keys = {
            "zero_stage": self.zero_stage,
            "offload": self.offload,
            "gradient_checkpointing": str(self.gradient_checkpointing).lower(),
        }
        if self.sequence_parallel > 1:
            keys["sequence_parallel"] = self.sequence_parallel
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
