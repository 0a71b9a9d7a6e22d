"""From a video's specification to its mp4: what an endpoint's replica and an offline actor have in common.

Knows neither Ray nor HTTP. Importing it imports torch and diffusers, which takes seconds.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from pipelines.config import Config
from pipelines.spec import ShapeLimits, VideoSpec
from prophy.backbones import check_checkpoint, fingerprint, load_pipeline, shape_multiples
from prophy.device import autocast, default_device
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.video import write_video


def check_model(config: Config) -> None:
    """Checks that the checkpoint of a run, if it has one, fits its backbone; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint, or the checkpoint was trained on another backbone.
    """
    if config.checkpoint is not None:
        check_checkpoint(config.checkpoint, config.backbone.pretrained, config.backbone.revision)


def model_fingerprint(config: Config) -> str:
    """What the model of a run is, whatever its name; loads no model.

    Raises:
        ProPhyError: there is no such model or checkpoint.
    """
    backbone = fingerprint(config.backbone.pretrained, config.backbone.revision)
    return (
        backbone if config.checkpoint is None else f"{backbone} {fingerprint(str(config.checkpoint), None)}"
    )


def shape_limits(config: Config) -> ShapeLimits:
    """The shapes that the model of a run can make and its endpoint allows; loads no model.

    Raises:
        ProPhyError: there is no such model.
    """
    backbone = config.backbone
    frames, height, width = shape_multiples(backbone.family, backbone.pretrained, backbone.revision)
    return ShapeLimits(
        frame_multiple=frames,
        height_multiple=height,
        width_multiple=width,
        max_num_frames=config.serve.max_num_frames or backbone.num_frames,
        max_pixels=config.serve.max_pixels or backbone.height * backbone.width,
    )


class VideoSampler:
    """A loaded model that makes videos, one at a time.

    Args:
        config: names the backbone and, if there is one, the checkpoint of the Physical Branch.

    Raises:
        ProPhyError: the checkpoint was trained on another backbone.
    """

    def __init__(self, config: Config) -> None:
        backbone = config.backbone
        self._autocast = backbone.autocast
        self._max_sequence_length = backbone.max_sequence_length
        self._device = default_device()
        self._pipeline = load_pipeline(
            backbone.family,
            backbone.pretrained,
            backbone.revision,
            getattr(torch, backbone.dtype),
            config.checkpoint,
        ).to(self._device)
        self._pipeline.set_progress_bar_config(disable=True)

    def sample(
        self,
        spec: VideoSpec,
        on_step: Callable[[float], None] = lambda progress: None,
        trace: PhysicsTrace | None = None,
    ) -> np.ndarray:
        """Makes the frames of a video; the same specification gives the same frames.

        Args:
            spec: the video.
            on_step: called after each denoising step with the part that is done, 0 to 1; what it raises ends
                the sampling.
            trace: collects the routing, if given; the model must have a branch.

        Returns:
            RGB frames, uint8 `[T, H, W, 3]`.
        """

        def report(
            pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            on_step((step + 1) / spec.num_inference_steps)
            return tensors

        knobs = {} if spec.physics is None else dict(spec.physics)
        physics = None if spec.physics is None and trace is None else PhysicsControl(**knobs, trace=trace)
        with autocast(self._device, self._autocast):
            output = self._pipeline(
                spec.prompt,
                negative_prompt=spec.negative_prompt,
                height=spec.height,
                width=spec.width,
                num_frames=spec.num_frames,
                num_inference_steps=spec.num_inference_steps,
                guidance_scale=spec.guidance_scale,
                generator=torch.Generator().manual_seed(spec.seed),  # on the CPU: one noise on every device
                physics=physics,
                max_sequence_length=self._max_sequence_length,
                callback_on_step_end=report,
                callback_on_step_end_tensor_inputs=[],
                output_type="np",
            )
        return (output.frames[0] * 255).round().astype(np.uint8)

    def write(
        self, spec: VideoSpec, path: Path, on_step: Callable[[float], None] = lambda progress: None
    ) -> None:
        """Makes a video as `sample` does and writes it to `path` as an mp4."""
        write_video(path, self.sample(spec, on_step), spec.fps)
