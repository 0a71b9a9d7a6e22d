"""What the pipelines of all families add to diffusers': physics knobs, and one length of text."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from torch.utils.weak import WeakIdKeyDictionary

from prophy.errors import ProPhyError
from prophy.models.control import PhysicsControl


class PhysicsPipeline(DiffusionPipeline):
    """Base, before diffusers' own class, of a pipeline whose transformers may carry a Physical Branch.

    `max_sequence_length`, text tokens, is in the pipeline's configuration: where no mask hides padding from
    attention, another length than in training would make other videos.
    """

    @property
    def transformers(self) -> Sequence[ModelMixin]:
        """Those that there are: one, or one for high noise and one for low."""
        parts = (getattr(self, name, None) for name in ("transformer", "transformer_2"))
        return [part for part in parts if part is not None]

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

    def encode_first_frame(self, image: torch.Tensor, num_frames: int) -> dict[str, torch.Tensor]:
        """What the transformer reads of images that videos begin with, where it always takes one.

        Args:
            image: `[B, 3, H, W]` in [0, 1].
            num_frames: how many each video has.

        Returns:
            Tensors `[B, ...]`, by the names of `Family.image`.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no videos of images")

    def for_images(self) -> "PhysicsPipeline":
        """The pipeline of the same components that makes videos of images, by an argument `image`.

        Raises:
            NotImplementedError: the family has none.
        """
        raise NotImplementedError(f"{type(self).__name__} makes no videos of images")

    def __call__(
        self,
        *args: Any,
        physics: PhysicsControl | None = None,
        max_sequence_length: int | None = None,
        **kwargs: Any,
    ) -> Any:
        """Makes videos, as upstream's.

        Args:
            args: upstream's.
            physics: knobs and trace of this request; in `attention_kwargs` they are as good.
            max_sequence_length: text tokens; the pipeline's own by default.
            kwargs: upstream's.

        Raises:
            ProPhyError: `physics` is given, but no transformer has a Physical Branch.
        """
        if any(hasattr(transformer, "physics_branch") for transformer in self.transformers):
            given = kwargs.get("attention_kwargs") or {}
            physics = physics or given.get("physics") or PhysicsControl()
            kwargs["attention_kwargs"] = given | {"physics": replace(physics, mixtures=WeakIdKeyDictionary())}
        elif physics is not None:
            raise ProPhyError(
                "this model has no Physical Branch to control; load a checkpoint, or leave physics out"
            )
        length = max_sequence_length or self.config.max_sequence_length
        return super().__call__(*args, max_sequence_length=length, **kwargs)
