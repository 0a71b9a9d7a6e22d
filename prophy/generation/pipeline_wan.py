"""Wan's text-to-video pipeline, with physics knobs and the text length that the branch was trained with."""

from diffusers import AutoencoderKLWan, SchedulerMixin, WanPipeline, WanTransformer3DModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prophy.generation.physics_pipeline import PhysicsPipeline


class ProPhyWanPipeline(PhysicsPipeline, WanPipeline):
    """`WanPipeline` whose transformer may carry a Physical Branch.

    Args beside upstream's:
        max_sequence_length: text tokens, saved in the pipeline's configuration.
    """

    # Written out in full: diffusers reads the components of a pipeline from this signature.
    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        text_encoder: PreTrainedModel,
        vae: AutoencoderKLWan,
        scheduler: SchedulerMixin,
        transformer: WanTransformer3DModel | None = None,
        transformer_2: WanTransformer3DModel | None = None,
        boundary_ratio: float | None = None,
        expand_timesteps: bool = False,
        max_sequence_length: int = 512,
    ) -> None:
        super().__init__(
            tokenizer,
            text_encoder,
            vae,
            scheduler,
            transformer,
            transformer_2,
            boundary_ratio,
            expand_timesteps,
        )
        self.register_to_config(max_sequence_length=max_sequence_length)

    def for_images(self) -> PhysicsPipeline:
        """See the base class."""
        # Imported where there is an image: of CLIP's processor transformers warns wherever torchvision lacks.
        from prophy.generation.pipeline_wan_i2v import ProPhyWanImageToVideoPipeline

        settings = ("boundary_ratio", "expand_timesteps", "max_sequence_length")
        return ProPhyWanImageToVideoPipeline(
            **self.components, **{name: self.config[name] for name in settings}
        )
