"""Training of the branch."""

from typing import Annotated, Literal, Self

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.base import Checkpoint, Fraction, NonNegativeFloat, NonNegativeInt, Section


class LossWeights(Section):
    """The weights of Eq. 6."""

    semantic_alignment: NonNegativeFloat = 0.1
    token_alignment: NonNegativeFloat = 0.02
    load_balancing: NonNegativeFloat = 0.01


class TrainConfig(Section):
    """Training of the branch with Ray Train and DeepSpeed."""

    start_from: Checkpoint | None = Field(
        None,
        description="folder of a trained branch to go on from; 'tiny' is the embedded one, null is a new one",
    )
    backbone: Literal["frozen", "lora", "full"] = Field(
        "frozen", description="what of the backbone is trained beside the branch"
    )
    lora_rank: PositiveInt = 128
    lora_alpha: PositiveInt = 16
    num_steps: PositiveInt
    micro_batch_size: PositiveInt
    global_batch_size: PositiveInt = Field(
        description="samples in a step, whatever the number of workers; the rest is accumulated"
    )
    num_workers: PositiveInt
    cpus_per_worker: NonNegativeFloat = 1.0
    gpus_per_worker: NonNegativeFloat = 0.0
    zero_stage: Literal[0, 1, 2, 3] = Field(
        1, description="what workers share out: 1 the optimizer, 2 gradients too, 3 parameters too"
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        "none", description="to the CPU: the optimizer (ZeRO 1 to 3), or parameters too (ZeRO 3)"
    )
    gradient_checkpointing: bool = Field(False, description="recompute blocks in the backward pass")
    precision: Literal["fp32", "bf16"] = "bf16"
    learning_rate: PositiveFloat = 1e-4
    backbone_learning_rate: PositiveFloat = Field(
        2e-5, description="of the adapter, or of the whole backbone"
    )
    warmup_steps: NonNegativeInt = 200
    lr_schedule: Literal["constant", "cosine"] = Field(
        "constant", description="after the warm-up; cosine ends at 0 with the last step"
    )
    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = Field(
        None, description="of a moving average of the trained parameters, which is then what is exported"
    )
    weight_decay: NonNegativeFloat = 0.01
    gradient_clipping: PositiveFloat = 1.0
    caption_dropout: Fraction = 0.1
    recipe: str = Field(
        "minus_others_blur_motion", description="how raw maps become targets: prophy/priors/grounding.py"
    )
    negatives: Literal["ignore", "zero"] = "ignore"
    reduction: Literal["mean", "sum"] = "mean"
    loss_weights: LossWeights = LossWeights()
    num_held_out: NonNegativeInt = Field(
        0,
        description="videos of the cache that are not trained on: the newest checkpoint is measured there, "
        "as soon as the one before is done, and the last",
    )
    sample_prompts: list[str] = Field(
        [], description="of videos that the same checkpoints make, with pictures of their routing maps"
    )
    evaluation_cpus: NonNegativeFloat = Field(
        1.0, description="of the task that does both, beside the workers; they do not wait for it"
    )
    evaluation_gpus: NonNegativeFloat = 0.0
    seed: int = 0
    log_every: PositiveInt = 10
    save_every: PositiveInt = 500
    num_to_keep: PositiveInt = 2
    max_failures: NonNegativeInt = Field(
        2, description="restarts from the last checkpoint when a worker dies"
    )

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of each worker in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.num_workers)

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.global_batch_size % (self.micro_batch_size * self.num_workers):
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times num_workers ({self.num_workers})"
            )
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {needed} at least")
        return self
