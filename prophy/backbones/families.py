"""What the product asks of a family of video diffusion transformers, and the families that there are.

Imports no networks: a family's record says what its configurations mean, and imports its classes when they
are asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from prophy.errors import ProPhyError
from prophy.models.description import ExpertName
from prophy.registry import Registry

if TYPE_CHECKING:
    from diffusers import ModelMixin

    from prophy.generation.physics_pipeline import PhysicsPipeline
    from prophy.models.physics_transformer import PhysicsTransformer
    from prophy.training.objectives import Objective

Shape = tuple[int, int, int]
ModelConfig = Mapping[str, Any]
"""Configuration of a pipeline (`model_index.json`), a VAE or a transformer, as its file has it."""
TextShapes = dict[str, tuple[int, ...]]
"""Shape of each tensor that one text is encoded to, by name."""
Images = Literal["never", "first_latent", "always"]
"""Whether a model makes videos of images: never; where one is given, whose latent then is the first of the
video's, at timestep 0, so that each token has a timestep of its own; or always, by tensors of the image."""


@dataclass(frozen=True)
class Classes:
    """The classes of a family.

    Attributes:
        transformer: diffusers' class.
        prophy_transformer: ours, with a Physical Branch; its `semantic_text` is the name of the tensor, of
            those of `Family.text`, that the semantic experts read.
        pipeline: ours; it takes either transformer, its `encode_text` makes the tensors of `Family.text`, and
            its `for_images` the pipeline that takes images, where a model takes either.
        vae: diffusers' class.
        objective: what the transformer is trained to predict.
        image_pipeline: ours, of the models that always take an image; its `encode_first_frame` makes the
            tensors of `Family.image`.
    """

    transformer: "type[ModelMixin]"
    prophy_transformer: "type[PhysicsTransformer]"
    pipeline: "type[PhysicsPipeline]"
    vae: "type[ModelMixin]"
    objective: "type[Objective]"
    image_pipeline: "type[PhysicsPipeline] | None" = None

    def pipeline_for(self, images: Images) -> "type[PhysicsPipeline]":
        """The class that a model is loaded, trained and saved as."""
        if images != "always":
            return self.pipeline
        assert self.image_pipeline is not None
        return self.image_pipeline


@dataclass(frozen=True)
class Expert:
    """One of a model's transformers, and the noise that it is for.

    Attributes:
        component: its name in the pipeline.
        levels: the least and the most noise, as shares of the last timestep.
    """

    component: str = "transformer"
    levels: tuple[float, float] = (0.0, 1.0)

    def trained_levels(self, wanted: tuple[float, float] | None) -> tuple[float, float]:
        """The levels that it is trained on.

        Args:
            wanted: `train.noise_levels`.

        Raises:
            ProPhyError: some of them are not for this transformer.
        """
        if wanted is None:
            return self.levels
        least, most = self.levels
        if not least <= wanted[0] < wanted[1] <= most:
            raise ProPhyError(
                f"train.noise_levels is {wanted[0]:g} to {wanted[1]:g}, and the transformer that is trained "
                f"is for {least:g} to {most:g}; set it within these, or to null"
            )
        return wanted


@dataclass(frozen=True)
class Published:
    """What the configurations of a published model say where it is not the default of diffusers' classes.

    Attributes:
        vae: what decides its shape.
        transformer: all of it.
        pipeline: as much as `Family.images` and `Family.experts` read.
    """

    vae: ModelConfig
    transformer: ModelConfig = field(default_factory=dict)
    pipeline: ModelConfig = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """One family: how it cuts a video into latents and tokens, what it cannot do, and its classes.

    Attributes:
        vae_factors: VAE's configuration -> how much it shrinks time and space.
        latent_statistics: VAE's configuration -> mean and standard deviation of latents, per channel or one.
        patch_size: transformer's configuration -> latents per token, (t, h, w).
        text: transformer's configuration and text tokens -> shape of each tensor that one text is encoded to,
            by the name that the pipeline's `__call__` has for it; there, "negative_" before the name is the
            negative prompt's. All of them are floating-point, a mask too (0 and 1).
        pipelines: names of the pipeline classes, in `model_index.json`, that it can read.
        unsupported: configurations of pipeline and transformer -> why this model cannot be run, as a sentence
            goes on after its name; None if it can.
        classes: imports the classes.
        only_latents: transformer's configuration -> (T, H, W) of the only latents that it can read, or None.
        batches_images: transformer's configuration -> whether it makes videos of several images at once.
        max_tokens: transformer's configuration -> the most tokens in each direction, or None.
        images: configurations of pipeline and transformer -> whether this model makes videos of images.
        image: transformer's configuration and (T, H, W) of a clip's latents -> shape of each tensor that its
            first frame is encoded to, by the name that `predict` has for it; of models that always take one.
        experts: configuration of the pipeline -> its transformers: one, which is called None, or one for high
            noise and one for low.
        encoders: components of the pipeline that latents and text are made by.
        float32_vae: whether the VAE is float32 whatever the rest is, as upstream wants it for Wan.
        guides_in_one_pass: whether a pass has a video and its unguided twin; else each has one of its own.
        has_text_stream: whether text tokens go through the blocks as the video's do; else these read them.
        published_text_encoder: parameters of the published pipelines' text encoder.
        supports_sea: whether its pipeline tells SeaCache the noise level of each step.
        published: models by hub id: `prophy plan` then needs no network.
    """

    vae_factors: Callable[[ModelConfig], tuple[int, int]]
    latent_statistics: Callable[[ModelConfig], tuple[list[float], list[float]]]
    patch_size: Callable[[ModelConfig], Shape]
    text: Callable[[ModelConfig, int], TextShapes]
    pipelines: tuple[str, ...]
    unsupported: Callable[[ModelConfig, ModelConfig], str | None]
    classes: Callable[[], Classes]
    only_latents: Callable[[ModelConfig], Shape | None] = lambda transformer: None
    batches_images: Callable[[ModelConfig], bool] = lambda transformer: True
    max_tokens: Callable[[ModelConfig], int | None] = lambda transformer: None
    images: Callable[[ModelConfig, ModelConfig], Images] = lambda pipeline, transformer: "never"
    image: Callable[[ModelConfig, Shape], TextShapes] = lambda transformer, latents: {}
    experts: Callable[[ModelConfig], Mapping[ExpertName | None, Expert]] = lambda pipeline: {None: Expert()}
    encoders: tuple[str, ...] = ("vae", "text_encoder", "tokenizer")
    float32_vae: bool = True
    guides_in_one_pass: bool = False
    has_text_stream: bool = False
    supports_sea: bool = False
    published: Mapping[str, Published] = field(default_factory=dict)
    published_text_encoder: int = 0

    def check(self, name: str, pipeline: ModelConfig, transformer: ModelConfig) -> None:
        """Checks that the product can run a model of this family, from its configurations alone.

        Args:
            name: the model's, for the message.
            pipeline: configuration of the pipeline.
            transformer: configuration of the transformer.

        Raises:
            ProPhyError: it is a pipeline of another kind, or needs what this family's classes cannot do.
        """
        kind = pipeline.get("_class_name")
        if kind not in self.pipelines:
            raise ProPhyError(
                f"{name} is a {kind}, and this backbone.family reads {' and '.join(self.pipelines)}; choose "
                f"another backbone.pretrained, or the family that this one belongs to"
            )
        if "physics_layers" in transformer:
            raise ProPhyError(
                f"{name} was exported by an earlier version, which did not write the names of its phenomena; "
                f"run `prophy export --complete` again"
            )
        reason = self.unsupported(pipeline, transformer)
        if reason is not None:
            raise ProPhyError(f"{name} {reason}; choose another backbone.pretrained")

    def trained_expert(self, name: str, pipeline: ModelConfig, expert: ExpertName | None) -> Expert:
        """The transformer that a branch is trained beside.

        Args:
            name: the model's, for the message.
            pipeline: configuration of the pipeline.
            expert: `train.expert`.

        Raises:
            ProPhyError: the model has two and none is named, or it has one.
        """
        experts = self.experts(pipeline)
        if expert in experts:
            return experts[expert]
        if expert is not None:
            raise ProPhyError(f"train.expert is {expert}, but {name} has one transformer; set it to null")
        raise ProPhyError(
            f"{name} has two transformers, for high and for low noise, and a run trains one; set "
            f"train.expert to {' or '.join(map(str, experts))}"
        )

    def latent_shape(
        self,
        num_frames: int,
        height: int,
        width: int,
        vae_config: ModelConfig,
        transformer_config: ModelConfig,
    ) -> Shape:
        """(T, H, W) of the latents of a clip: the first frame is encoded alone, then groups of frames.

        A transformer with patches in time gets its first patch filled up with copies of the first latent
        frame, as its pipeline makes room for them.

        Raises:
            ProPhyError: the VAE cannot encode clips of this length or size, or the transformer cannot read
                them.
        """
        time, space = self.vae_factors(vae_config)
        patch_t = self.patch_size(transformer_config)[0]
        if num_frames % (time * patch_t) != 1 or height % space or width % space:
            raise ProPhyError(
                f"the VAE cannot encode {num_frames} frames of {height}x{width}; "
                f"take {time * patch_t} n + 1 frames, and multiples of {space} pixels"
            )
        shape = (num_frames - 1) // time + patch_t, height // space, width // space
        refused = f"clips of {num_frames} frames of {height}x{width} do not fit"
        only = self.only_clip(vae_config, transformer_config)
        if only is not None and only != (num_frames, height, width):
            raise ProPhyError(
                f"{refused}: the transformer has learnt positions of {only[0]} frames of {only[1]}x{only[2]} "
                f"alone; set backbone.num_frames, height and width to these"
            )
        most = self.max_tokens(transformer_config)
        tokens = [n // patch for n, patch in zip(shape, self.patch_size(transformer_config), strict=True)]
        if most is not None and max(tokens) > most:
            raise ProPhyError(
                f"{refused}: they are {max(tokens)} tokens long, high or wide, and the transformer has "
                f"positions of {most}; take fewer frames, or smaller ones"
            )
        return shape

    def only_clip(self, vae_config: ModelConfig, transformer_config: ModelConfig) -> Shape | None:
        """(T, H, W) of the only clips, in frames and pixels, that a transformer can read, or None."""
        latents = self.only_latents(transformer_config)
        if latents is None:
            return None
        time, space = self.vae_factors(vae_config)
        patch_t = self.patch_size(transformer_config)[0]
        return (latents[0] - patch_t) * time + 1, latents[1] * space, latents[2] * space

    def latent_channels(self, transformer_config: ModelConfig) -> int:
        """C of the latents: what the transformer predicts, where it reads an image beside them."""
        return transformer_config.get("out_channels") or transformer_config["in_channels"]

    def token_grid(self, latent_shape: Shape, transformer_config: ModelConfig) -> Shape:
        """(T', H', W') of the tokens, one per patch.

        Raises:
            ProPhyError: the patches do not fill the latents.
        """
        patch_size = self.patch_size(transformer_config)
        if any(length % patch for length, patch in zip(latent_shape, patch_size, strict=True)):
            raise ProPhyError(
                f"latents of {tuple(latent_shape)} cannot be cut into patches of {patch_size}; "
                f"change num_frames, height or width"
            )
        t, h, w = (length // patch for length, patch in zip(latent_shape, patch_size, strict=True))
        return t, h, w

    def unshareable(
        self, num_processes: int, num_tokens: int, text_length: int, transformer_config: ModelConfig
    ) -> str | None:
        """Why so many processes cannot share a sample, as a sentence goes on after them; None if they can."""
        for number, what in (
            (transformer_config["num_attention_heads"], "attention heads"),
            (num_tokens, "tokens of a clip"),
            (text_length if self.has_text_stream else 0, "tokens of text (backbone.max_sequence_length)"),
        ):
            if number % num_processes:
                return f"cannot share out {number} {what}"
        return None

    def shape_multiples(self, vae_config: ModelConfig, transformer_config: ModelConfig) -> Shape:
        """What the (frames after the first, height, width) of a video must be multiples of."""
        time, space = self.vae_factors(vae_config)
        patch_t, patch_h, patch_w = self.patch_size(transformer_config)
        return time * patch_t, space * patch_h, space * patch_w


FAMILIES = Registry(
    "prophy.backbones",
    {"wan": "prophy.backbones.wan:FAMILY", "cogvideox": "prophy.backbones.cogvideox:FAMILY"},
)
"""A `Family` by name, as `backbone.family` names it."""
