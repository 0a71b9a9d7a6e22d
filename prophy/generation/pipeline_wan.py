"""Wan's text-to-video pipeline, with physics knobs and the text length that the branch was trained with."""

from typing import Any

import torch
from diffusers import AutoencoderKLWan, SchedulerMixin, WanPipeline, WanTransformer3DModel
from diffusers.pipelines.wan.pipeline_output import WanPipelineOutput
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel


class ProPhyWanPipeline(WanPipeline):
    """`WanPipeline` whose transformer may carry a Physical Branch.

    Args beside upstream's:
        max_sequence_length: text tokens, saved in the pipeline's configuration. Wan's cross-attention has no
            mask, so the length is one and the same in training and at inference.
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

    def encode_prompt(
        self, prompt: str | list[str], *args: Any, max_sequence_length: int | None = None, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As upstream's; `max_sequence_length` defaults to the pipeline's own."""
        length = max_sequence_length or self.config.max_sequence_length
        return super().encode_prompt(prompt, *args, max_sequence_length=length, **kwargs)

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        physics: PhysicsControl | None = None,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> WanPipelineOutput | tuple:
        """Makes videos, as upstream's.

        Args:
            prompt: one prompt or several.
            args: upstream's.
            physics: knobs and trace of this request.
            max_sequence_length: text tokens; the pipeline's own by default.
            kwargs: upstream's.

        Raises:
            ProPhyError: `physics` is given, but the transformer has no Physical Branch.
        """
        if physics is not None:
            if not isinstance(self.transformer, ProPhyWanTransformer3DModel):
                raise ProPhyError(
                    "this model has no Physical Branch to control; load a checkpoint, or leave physics out"
                )
            kwargs["attention_kwargs"] = {**(kwargs.get("attention_kwargs") or {}), "physics": physics}
        length = max_sequence_length or self.config.max_sequence_length
        return super().__call__(prompt, *args, max_sequence_length=length, **kwargs)
