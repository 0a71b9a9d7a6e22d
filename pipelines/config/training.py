"""Training of the branch."""

from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, PositiveFloat, PositiveInt, model_validator

from pipelines.config.base import (
    BranchFolder,
    FolderOrS3,
    Fraction,
    How,
    NonNegativeFloat,
    NonNegativeInt,
    Section,
)
from prophy.models.description import ExpertName
from prophy.priors.recipes import RECIPE_NAMES, Negatives


def _recipe(name: str) -> str:
    if name not in RECIPE_NAMES:
        raise ValueError(f"there is no such recipe; set it to one of: {', '.join(RECIPE_NAMES)}")
    return name


class LossWeights(Section):
    """The weights of the total loss (Eq. 6).

    The diffusion loss has weight 1. The defaults are the paper's.
    """

    semantic_alignment: NonNegativeFloat = 0.1
    """Weight of L_coarse (Eq. 4): which physics a video holds."""

    token_alignment: NonNegativeFloat = 0.02
    """Weight of L_fine_align (Eq. 5): where each phenomenon is."""

    load_balancing: NonNegativeFloat = 0.01
    """Weight of L_fine_balance, which keeps all refinement experts in use."""


class TrainConfig(Section):
    """Training of the branch with Ray Train and DeepSpeed."""

    start_from: BranchFolder | None = None
    """Folder of a trained branch, also in S3, to go on from; 'tiny' is the embedded one.

    Null starts a new branch.
    """

    expert: ExpertName | None = None
    """Which transformer of a backbone with two is trained (Wan2.2-A14B): that for high noise, or for low.

    The noise levels that are drawn are its own. Null for backbones with one. For both, train two runs:
    `prophy export --with` puts them together.
    """

    backbone: Literal["frozen", "lora", "full"] = "frozen"
    """What of the backbone is trained beside the branch: nothing, an adapter, or all of it.

    Frozen by default: it costs the least memory, and without the branch the model is the published one.
    """

    lora_rank: PositiveInt = 128
    """Rank of the adapter, with `backbone: lora`. The default is WISA's."""

    lora_alpha: PositiveInt = 16
    """Scale of the adapter, which is multiplied by lora_alpha / lora_rank. The default is WISA's."""

    num_steps: Annotated[PositiveInt, How()]
    """Optimizer steps after which training ends, those of earlier starts included."""

    micro_batch_size: PositiveInt
    """Clips that one worker holds at once. GPU memory grows with it."""

    global_batch_size: PositiveInt
    """Clips of an optimizer step, over all workers.

    A multiple of micro_batch_size times num_workers / sequence_parallel: what does not fit at once is
    accumulated.
    """

    num_workers: Annotated[PositiveInt, How()]
    """Training processes, one per GPU. It may change when a run resumes."""

    min_workers: Annotated[PositiveInt | None, How()] = None
    """Fewest workers to go on with when nodes are lost; null waits until all of num_workers have room.

    As many start as have room and divide the batch, and more once nodes are back, from the last checkpoint.
    Null by default: fewer workers take longer for each step.
    """

    sequence_parallel: Annotated[PositiveInt, How()] = 1
    """Workers that share each clip, every one with a part of its tokens; a divisor of num_workers.

    Activations and the time of a clip are divided by it, for an exchange of tokens in every block: for clips
    that do not fit otherwise, among GPUs of one node. It must divide attention heads and tokens, and with
    CogVideoX backbone.max_sequence_length too. 1 by default: what fits alone is faster so.
    """

    cpus_per_worker: Annotated[NonNegativeFloat, How()] = 1.0
    """CPUs that Ray reserves for each worker, which also reads its own batches."""

    gpus_per_worker: Annotated[NonNegativeFloat, How()] = 0.0
    """GPUs that Ray reserves for each worker: 1, or 0 to train on the CPU."""

    zero_stage: Annotated[Literal[0, 1, 2, 3], How()] = 1
    """What workers share out: 0 nothing, 1 the optimizer's state, 2 gradients too, 3 parameters too.

    A higher stage takes less memory and communicates more. 1 sends gradients once in a step, 2 with every
    micro-batch; `prophy plan` says which stage fits.
    """

    offload: Annotated[Literal["none", "optimizer", "all"], How()] = "none"
    """What moves to the CPU's memory: the optimizer (ZeRO 1 to 3), or the parameters too (ZeRO 3).

    Slower than any ZeRO stage, so it is off by default.
    """

    storage_dtype: Literal["float8_e4m3fn"] | None = None
    """Precision that the weights of frozen linear layers are kept in; null, the default, is backbone.dtype.

    8 bits take half the memory of bfloat16, where every worker holds the whole backbone (zero_stage 0 to 2).
    Each use makes a copy in the precision that is computed in. What is trained stays in float32, but learns
    beside a slightly changed backbone, as backbone.storage_dtype makes videos with. No GPU has run it yet.
    """

    gradient_checkpointing: Annotated[bool, How()] = False
    """Recompute activations in the backward pass: much less memory for about a third more time."""

    keep_attention: Annotated[bool, How()] = False
    """With gradient_checkpointing: keep what self-attention gave, which is half of what is recomputed.

    It takes as many more bytes as the tokens of every block; `prophy plan` says how many.
    """

    precision: Literal["fp32", "bf16"] = "bf16"
    """Precision of forward and backward passes. Trained parameters and their gradients are always float32."""

    learning_rate: PositiveFloat = 1e-4
    """Learning rate of the branch. The paper gives none; 1e-4 is usual for new layers on a frozen model."""

    backbone_learning_rate: PositiveFloat = 2e-5
    """Learning rate of the adapter, or of the whole backbone. The default is WISA's."""

    warmup_steps: NonNegativeInt = 200
    """Optimizer steps over which the learning rate rises from 0; by default 1 % of the presets' 20,000."""

    lr_schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate after the warm-up; cosine ends at 0 with the last step.

    Constant by default: num_steps may then grow without changing the steps before.
    """

    ema_decay: Annotated[float, Field(gt=0.0, lt=1.0)] | None = None
    """Decay per step of a moving average of what is trained, which is then what is exported. Null: none.

    0.999 averages over about a thousand steps; it takes as much memory as the trained parameters.
    """

    weight_decay: NonNegativeFloat = 0.01
    """AdamW's weight decay, of all trained parameters alike. The default is PyTorch's."""

    gradient_clipping: PositiveFloat = 1.0
    """Norm that the gradients of a step are scaled down to, if they are longer."""

    caption_dropout: Fraction = 0.1
    """Share of captions replaced by the empty prompt, which classifier-free guidance needs. 10 % is usual."""

    noise_levels: tuple[Fraction, Fraction] | None = None
    """Least and most noise that is trained on, and held-out losses are of: shares of the last timestep.

    Those within are as likely as ever. Null is all, or those of `expert`. At [0.96, 1] the text alone says
    what is where; of all levels that are drawn with a shift of 3, 2 % lie there.
    """

    image_share: Fraction | None = None
    """Share of samples that begin with an image: the first latent frame is given, free of noise and loss.

    Null is half of them where the backbone makes videos of text or an image (Wan2.2-TI2V). It is nothing to a
    backbone that takes no images, or always one.
    """

    recipe: Annotated[str, AfterValidator(_recipe), Field(json_schema_extra={"enum": list(RECIPE_NAMES)})] = (
        "minus_others_blur_motion"
    )
    """How raw maps become targets: a subtraction, then `_blur` and `_motion` where they apply.

    The paper's is minus_background. The default is the best of them for the embedded VLM, measured against
    the sandbox's exact masks; `_motion` needs a camera that stands still.
    """

    negatives: Negatives = "ignore"
    """What tokens outside a phenomenon's map say: nothing (ignore, as in the paper), "not here" (zero), or
    also that what a clip does not hold is nowhere in it (all).

    A knob of one phenomenon acts by the share that its map has of all maps: with all, other knobs act less
    there.
    """

    alignment: Literal["absolute", "cross_entropy"] = "absolute"
    """How maps are held against targets: by the absolute difference (Eq. 5), or cross-entropy.

    The optimum of the first is a median, so a map is 0 wherever a place is uncertain, as in noise it mostly
    is; that of the second is a mean. The paper's is the default.
    """

    reduction: Literal["mean", "sum"] = "mean"
    """How the alignment losses add up over the global batch: sum is the paper's formula.

    With mean their weights do not depend on batch size and resolution, so it is the default.
    """

    loss_weights: LossWeights = LossWeights()
    """The weights of the total loss (Eq. 6)."""

    num_held_out: NonNegativeInt = 0
    """Videos of the cache that are not trained on, but measured.

    The newest checkpoint is measured as soon as the one before is done, and so is the last one.
    """

    sample_prompts: Annotated[list[str], How()] = Field([])
    """Prompts of videos that these checkpoints make, with pictures of their routing maps. By default none."""

    evaluation_cpus: Annotated[NonNegativeFloat, How()] = 1.0
    """CPUs of the task that measures and samples beside the workers; they do not wait for it."""

    evaluation_gpus: Annotated[NonNegativeFloat, How()] = 0.0
    """GPUs of the task that measures and samples beside the workers; 0 runs it on the CPU.

    Where workers have GPUs it needs one of its own, beside theirs: it loads the whole backbone.
    """

    seed: int = 0
    """Seed of new parameters, of the order of clips, of noise and of timesteps."""

    log_every: Annotated[PositiveInt, How()] = 10
    """Optimizer steps between two lines of metrics."""

    trackers: Annotated[list[Literal["wandb", "mlflow"]], How()] = Field([])
    """Where metrics go beside TensorBoard: Weights & Biases, MLflow. By default nowhere.

    Their own variables say where and as whom, in the environment of the command: WANDB_API_KEY or
    WANDB_MODE=offline, MLFLOW_TRACKING_URI.
    """

    tracking_project: Annotated[str, How()] = "prophy"
    """The project of Weights & Biases, or the experiment of MLflow, that this run is a part of."""

    checkpoints: FolderOrS3 | None = None
    """Where checkpoints lie: a folder that all nodes see, or a place in S3, such as s3://bucket/run.

    Null, the default, is a folder in run_dir, which needs nothing else. On the way to and from S3 they lie on
    disks of nodes, in PROPHY_HOME: what a node's workers save at once, and to resume a whole checkpoint.
    """

    save_every: Annotated[PositiveInt, How()] = 500
    """Optimizer steps between two checkpoints: at most these are lost, and those taken while one is written.

    The steps wait only while each worker copies its share into the host's memory; it writes that beside
    them. A checkpoint counts, and older ones go, once all is written.
    """

    save_every_s: Annotated[PositiveFloat, How()] = 1800.0
    """Seconds after which a checkpoint is due in any case; a step of a large backbone takes minutes."""

    num_to_keep: Annotated[PositiveInt, How()] = 2
    """Checkpoints that are kept, the newest. Two, so that a damaged one has a predecessor."""

    keep_best: Annotated[bool, How()] = True
    """Whether the checkpoint with the lowest held-out loss (Eq. 6) is kept beside the newest.

    `prophy export --step best` takes it. Without num_held_out there is none; one more is kept while it is
    measured.
    """

    max_failures: Annotated[NonNegativeInt, How()] = 2
    """Restarts from the last checkpoint when a worker dies, after which the run ends with the error."""

    @property
    def evaluates(self) -> bool:
        """Whether checkpoints are measured or make videos."""
        return bool(self.num_held_out or self.sample_prompts)

    @property
    def data_parallel_size(self) -> int:
        """How many workers, or groups of workers that share their clips, have clips of their own."""
        return self.num_workers // self.sequence_parallel

    @property
    def gradient_accumulation_steps(self) -> int:
        """Micro-batches of each worker in a step."""
        return self.global_batch_size // (self.micro_batch_size * self.data_parallel_size)

    def shares_batch(self, num_workers: int) -> bool:
        """Whether so many workers make whole groups that share clips, each with as many micro-batches."""
        num_groups, left = divmod(num_workers, self.sequence_parallel)
        return not left and self.global_batch_size % (self.micro_batch_size * num_groups) == 0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_workers is not None and self.min_workers > self.num_workers:
            raise ValueError(
                f"min_workers ({self.min_workers}) is more than num_workers ({self.num_workers}); lower it"
            )
        for name in ("num_workers", "min_workers"):
            num_workers = getattr(self, name)
            if num_workers is None or self.shares_batch(num_workers):
                continue
            if num_workers % self.sequence_parallel:
                raise ValueError(
                    f"sequence_parallel ({self.sequence_parallel}) must divide {name} ({num_workers})"
                )
            shared = f" / sequence_parallel ({self.sequence_parallel})" if self.sequence_parallel > 1 else ""
            raise ValueError(
                f"global_batch_size ({self.global_batch_size}) must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times {name} ({num_workers}){shared}"
            )
        needed = {"none": 0, "optimizer": 1, "all": 3}[self.offload]
        if self.zero_stage < needed:
            raise ValueError(f"offload {self.offload!r} needs zero_stage {needed} at least")
        if self.storage_dtype is not None and self.backbone == "full":
            raise ValueError("storage_dtype is for what is frozen, and backbone is 'full'; leave it out")
        if self.storage_dtype is not None and self.zero_stage == 3:
            raise ValueError(
                "storage_dtype is for a backbone that each worker holds as a whole, and zero_stage is 3; set "
                "that to 2, or leave storage_dtype out"
            )
        if self.noise_levels is not None and self.noise_levels[0] >= self.noise_levels[1]:
            least, most = self.noise_levels
            raise ValueError(f"noise_levels begins at {least:g} and ends at {most:g}; begin with the lesser")
        if self.keep_attention and not self.gradient_checkpointing:
            raise ValueError(
                "keep_attention is set without gradient_checkpointing, where all is kept; set that true too"
            )
        if self.gpus_per_worker and self.evaluates and not self.evaluation_gpus:
            raise ValueError(
                f"evaluation_gpus is 0 while workers have gpus_per_worker ({self.gpus_per_worker:g}); set it "
                f"to 1, with a GPU more than workers take, or num_held_out to 0 and no sample_prompts"
            )
        return self
