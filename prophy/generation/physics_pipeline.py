"""What the pipelines of all families add to diffusers': physics knobs, and one length of text."""

from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch.utils.weak import WeakIdKeyDictionary

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl


class PhysicsPipeline(DiffusionPipeline):
    """Base, before diffusers' own class, of a pipeline whose transformer may carry a Physical Branch.

    `max_sequence_length`, text tokens, is in the pipeline's configuration: where no mask hides padding from
    attention, another length than in training would make other videos.
    """

    def encode_prompt(
        self, prompt: str | list[str], *args: Any, max_sequence_length: int | None = None, **kwargs: Any
    ) -> tuple[Any, ...]:
        """As upstream's; `max_sequence_length` defaults to the pipeline's own."""
        length = max_sequence_length or self.config.max_sequence_length
        return super().encode_prompt(prompt, *args, max_sequence_length=length, **kwargs)

    def encode_text(self, prompts: list[str], max_sequence_length: int) -> dict[str, torch.Tensor]:
        """What the transformer reads of prompts: tensors `[B, ...]`, by `__call__`'s names for them.

        This is for pipelines with one tensor; a family with more overrides it.
        """
        embeds, _ = self.encode_prompt(
            prompts, do_classifier_free_guidance=False, max_sequence_length=max_sequence_length
        )
        return {"prompt_embeds": embeds}

    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *args: Any,
        physics: PhysicsControl | None = None,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes videos, as upstream's.

        Args:
            prompt: one prompt or several.
            args: upstream's.
            physics: knobs and trace of this request; in `attention_kwargs` they are as good.
            max_sequence_length: text tokens; the pipeline's own by default.
            kwargs: upstream's.

        Raises:
            ProPhyError: `physics` is given, but the transformer has no Physical Branch.
        """
        if hasattr(self.transformer, "physics_branch"):
            given = kwargs.get("attention_kwargs") or {}
            physics = physics or given.get("physics") or PhysicsControl()
            kwargs["attention_kwargs"] = given | {"physics": replace(physics, mixtures=WeakIdKeyDictionary())}
        elif physics is not None:
            raise ProPhyError(
                "this model has no Physical Branch to control; load a checkpoint, or leave physics out"
            )
        length = max_sequence_length or self.config.max_sequence_length
        return super().__call__(prompt, *args, max_sequence_length=length, **kwargs)
