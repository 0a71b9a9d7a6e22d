"""From a video's specification to its mp4: what an endpoint's replica and an offline actor have in common.

Knows neither Ray nor HTTP. Importing it imports torch and diffusers, which takes seconds.
"""

import gc
import io
import json
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, SeaCacheConfig, TaylorSeerCacheConfig
from PIL import Image
from torch.distributed.device_mesh import DeviceMesh

from pipelines.config import Config, StepCache
from pipelines.generation.spec import (
    MAPS_FILE,
    THUMBNAIL_FILE,
    VIDEO_FILE,
    ShapeLimits,
    VideoResult,
    VideoSpec,
)
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.placement import Placement
from prophy.backbones.pretrained import takes_images
from prophy.device import autocast, check_device, default_device, has_bfloat16, is_out_of_memory
from prophy.errors import ProPhyError
from prophy.generation.cfg_parallel import one_pass_each
from prophy.generation.physics_pipeline import PhysicsPipeline
from prophy.images import fit_image, read_image
from prophy.models.acceleration import accelerate, check_attention
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.stored import local_folder
from prophy.video import write_video

CACHED_PROMPTS = 32  # encoded texts kept on the device, 4 MB each at Wan's 512 tokens of 4096 numbers


def _gray_image() -> bytes:
    """A small image of nothing."""
    buffer = io.BytesIO()
    Image.new("RGB", (16, 16), "gray").save(buffer, "png")
    return buffer.getvalue()


class VideoSampler:
    """A loaded model that makes videos, one call at a time.

    Args:
        config: names the backbone and, if there is one, the checkpoint of the Physical Branch.
        sequence_parallel: how many processes will `share` the tokens of each video.

    Raises:
        ProPhyError: the checkpoint was trained on another backbone.
    """

    def __init__(self, config: Config, sequence_parallel: int = 1) -> None:
        backbone = config.backbone
        if backbone.offload == "all" and _diffusers_cache(config.sampling.step_cache) is not None:
            raise ProPhyError(
                "with backbone.offload=all each block fetches the next, and a step cache skips blocks; set "
                "backbone.offload to text_encoder, or leave sampling.step_cache out"
            )
        if backbone.compile != "none" and (backbone.offload == "all" or backbone.storage_dtype is not None):
            raise ProPhyError(
                "backbone.compile is not known to work with backbone.offload=all or backbone.storage_dtype, "
                "which change blocks between passes; set one or the other"
            )
        self._backbone = backbone
        self._autocast = backbone.autocast
        self._max_sequence_length = backbone.max_sequence_length
        self._device = default_device()
        computes_in = self._autocast if has_bfloat16(self._device) else None
        dtype = getattr(torch, computes_in or backbone.dtype)
        check_attention(backbone.attention, self._device, dtype, trains=False, shares=sequence_parallel > 1)
        self._sequence_parallel = sequence_parallel
        self._guidance: DeviceMesh | None = None
        self._pipeline: Any = load_pipeline(
            backbone.family,
            backbone.pretrained,
            backbone.revision,
            getattr(torch, backbone.dtype),
            None if config.checkpoint is None else local_folder(config.checkpoint),
            Placement(self._device, backbone.offload, backbone.storage_dtype and torch.float8_e4m3fn),
        )
        self._pipeline.set_progress_bar_config(disable=True)
        for transformer in self._pipeline.transformers:
            accelerate(transformer, backbone.attention, backbone.compile)
        self._images = takes_images(backbone.family, backbone.pretrained, backbone.revision)
        self.embed = lru_cache(CACHED_PROMPTS)(self._embed)

    def share(self, mesh: DeviceMesh) -> None:
        """Has several processes make each video together, from now on.

        Every one is called with the same arguments, in the same order, and gets the same frames. The maps are
        those of the processes whose place in "guidance" is 0.

        Args:
            mesh: has the dimensions "guidance", 2 where each half computes one pass of guidance and else 1;
                "ring", 1; and "ulysses", the processes that share tokens.

        Raises:
            ProPhyError: a transformer has no branch, or so many cannot share its tokens.
        """
        if mesh["guidance"].size() > 1:
            self._guidance = mesh["guidance"]
        if self._sequence_parallel == 1:
            return
        for transformer in self._pipeline.transformers:
            if not isinstance(transformer, PhysicsTransformer):
                raise ProPhyError(
                    f"{self._sequence_parallel} processes cannot share the tokens of a transformer without a "
                    f"branch; set serve.sequence_parallel to 1"
                )
            parallel = ContextParallelConfig(ulysses_degree=self._sequence_parallel, mesh=mesh)
            transformer.enable_parallelism(config=parallel)

    def warm_up(self, limits: ShapeLimits) -> None:
        """Makes a video in few steps, with guidance and VAE, so that a model that cannot run says so now.

        On a GPU it is as long and large as the model's own, if requests may be, so that the first finds the
        kernels chosen and the memory proven. On a CPU, where that takes minutes, it is the smallest frame,
        except of a model that makes one shape alone.
        """
        clip = self._backbone
        num_frames, height, width = clip.num_frames, clip.height, clip.width
        allowed = num_frames <= limits.max_num_frames and height * width <= limits.max_pixels
        if limits.only is not None:
            num_frames, height, width = limits.only
        elif self._device.type == "cpu" or not allowed:
            # Wide enough for every process to have a token.
            width = limits.width_multiple * self._sequence_parallel
            num_frames, height = 1, limits.height_multiple
        self.sample(
            VideoSpec(
                prompt="",
                negative_prompt="",
                seed=0,
                num_frames=num_frames,
                height=height,
                width=width,
                fps=clip.fps,
                # Of four, each of two transformers has one at least.
                num_inference_steps=4 if len(self._pipeline.transformers) > 1 else 1,
                guidance_scale=2.0,
            ),
            image=_gray_image() if self._images == "always" else None,
        )

    def sample(
        self,
        spec: VideoSpec,
        on_step: Callable[[float], None] = lambda progress: None,
        trace: PhysicsTrace | None = None,
        image: bytes | None = None,
    ) -> np.ndarray:
        """Makes the frames of a video, uint8 `[T, H, W, 3]`; the same specification gives the same frames.

        The arguments are those of `sample_batch`.
        """
        return self.sample_batch([spec], on_step, trace, [] if image is None else [image])[0]

    def sample_batch(
        self,
        specs: Sequence[VideoSpec],
        on_step: Callable[[float], None] = lambda progress: None,
        trace: PhysicsTrace | None = None,
        images: Sequence[bytes] = (),
    ) -> np.ndarray:
        """Makes the frames of several videos at once: each as it is alone, but for rounding.

        Args:
            specs: the videos, which differ in nothing but prompts, seed and image.
            on_step: called after each denoising step with the part that is done, 0 to 1; what it raises ends
                the sampling.
            trace: collects the routing, if given; the model must have a branch.
            images: the file that each video begins with; none where they are made from text alone.

        Returns:
            RGB frames, uint8 `[B, T, H, W, 3]`.

        Raises:
            ProPhyError: the model takes no images, or one cannot be read; or it gives numbers that are none;
                or the memory is not enough, and what was taken is free again.
        """
        try:
            return self._sample_batch(specs, on_step, trace, images)
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
        # Only outside that block are the tensors of all frames below free.
        gc.collect()
        if self._device.type == "cuda":
            torch.cuda.empty_cache()
        spec = specs[0]
        batch = f"{len(specs)} videos" if len(specs) > 1 else "a video"
        raise ProPhyError(
            f"{batch} of {spec.num_frames} frames of {spec.width}x{spec.height} pixels took more memory than "
            f"there is; ask for fewer frames or smaller ones"
        )

    def _sample_batch(
        self,
        specs: Sequence[VideoSpec],
        on_step: Callable[[float], None],
        trace: PhysicsTrace | None,
        images: Sequence[bytes],
    ) -> np.ndarray:
        spec = specs[0]
        own = ("prompt", "negative_prompt", "seed", "image")
        assert all(
            other.model_copy(update={key: getattr(spec, key) for key in own}) == spec for other in specs
        )

        def report(
            pipeline: Any, step: int, timestep: torch.Tensor, tensors: dict[str, Any]
        ) -> dict[str, Any]:
            on_step((step + 1) / spec.num_inference_steps)
            return tensors

        knobs = {} if spec.physics is None else spec.physics.model_dump(exclude={"return_maps"})
        physics = None if spec.physics is None and trace is None else PhysicsControl(**knobs, trace=trace)
        if self._images == "always" and not images:
            raise ProPhyError("this model makes videos of images alone; give one to begin with")
        pipeline, given = self._with(images, spec) if images else (self._pipeline, {})
        prompts, negatives = [spec.prompt for spec in specs], [spec.negative_prompt for spec in specs]
        # Without guidance there is one pass, which all processes compute.
        guidance = self._guidance if spec.guidance_scale > 1 else None
        if guidance is not None and guidance.get_local_rank() == 1:
            prompts, negatives = negatives, prompts
        in_one_pass = FAMILIES[self._backbone.family].guides_in_one_pass
        with (
            autocast(self._device, self._autocast),
            self._caching_steps(spec.step_cache),
            one_pass_each(pipeline.transformers, guidance, in_one_pass),
        ):
            output = pipeline(
                **given,
                **_concatenate([self.embed(prompt) for prompt in prompts]),
                **_concatenate([self.embed(negative) for negative in negatives], "negative_"),
                height=spec.height,
                width=spec.width,
                num_frames=spec.num_frames,
                num_inference_steps=spec.num_inference_steps,
                guidance_scale=spec.guidance_scale,
                **({} if spec.guidance_scale_2 is None else {"guidance_scale_2": spec.guidance_scale_2}),
                # On the CPU: one noise on every device.
                generator=[torch.Generator().manual_seed(spec.seed) for spec in specs],
                physics=physics,
                max_sequence_length=self._max_sequence_length,
                callback_on_step_end=report,
                callback_on_step_end_tensor_inputs=[],
                output_type="np",
            )
        if not np.isfinite(output.frames).all():
            raise ProPhyError(
                "the model gave numbers that are no colours (NaN or infinite); choose another checkpoint, or "
                "set backbone.attention to native"
            )
        return (output.frames * 255).round().astype(np.uint8)

    def _with(self, images: Sequence[bytes], spec: VideoSpec) -> tuple[PhysicsPipeline, dict[str, Any]]:
        """The pipeline that takes images, and these as its argument: `[B, 3, H, W]` in [0, 1]."""
        if self._images == "never":
            raise ProPhyError("this model makes videos from text alone and takes no image; leave it out")
        pixels = [fit_image(read_image(image, "the image"), spec.height, spec.width) for image in images]
        as_float = torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2).float() / 255
        return self._image_pipeline, {"image": as_float}

    @cached_property
    def _image_pipeline(self) -> PhysicsPipeline:
        pipeline = self._pipeline.for_images()
        pipeline.set_progress_bar_config(disable=True)
        return pipeline

    def check_device(self) -> None:
        """Computes something small where the model is.

        Raises:
            RuntimeError: the device fails.
        """
        check_device(self._device)

    def render(
        self,
        spec: VideoSpec,
        on_step: Callable[[float], None] = lambda progress: None,
        image: bytes | None = None,
    ) -> VideoResult:
        """Makes all that an endpoint keeps of a video; `on_step` and `image` as in `sample`.

        Raises:
            ProPhyError: as `sample_batch`; or maps are asked for, and no step fell to a transformer that has
                a branch.
        """
        trace = new_trace(spec)
        marks = {"start": time.perf_counter()}
        for text in (spec.prompt, spec.negative_prompt):
            self.embed(text)
        marks["text"] = time.perf_counter()

        def report(progress: float) -> None:
            marks["denoise"] = time.perf_counter()
            on_step(progress)

        frames = self.sample(spec, report, trace, image)
        marks["decode"] = time.perf_counter()
        if trace is not None and not trace.num_passes:
            raise ProPhyError(
                f"none of the {spec.num_inference_steps} steps fell to the transformer that has a branch, so "
                f"there are no maps; ask for more steps, or for no maps"
            )
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / VIDEO_FILE
            write_video(path, frames, spec.fps)
            files = {VIDEO_FILE: path.read_bytes(), THUMBNAIL_FILE: _thumbnail(frames)}
        if trace is not None:
            files[MAPS_FILE] = _maps_json(trace)
        marks["encode"] = time.perf_counter()
        times = list(marks.values())
        return VideoResult(files, dict(zip(list(marks)[1:], np.diff(times).round(3).tolist(), strict=True)))

    @contextmanager
    def _caching_steps(self, step_cache: StepCache) -> Iterator[None]:
        """Has the transformers skip steps while the block lasts; nothing is left for the next video."""
        cache = _diffusers_cache(step_cache)
        if cache is None:
            yield
            return
        for transformer in self._pipeline.transformers:
            transformer.enable_cache(cache)
        try:
            yield
        finally:
            for transformer in self._pipeline.transformers:
                transformer.disable_cache()

    def _embed(self, text: str) -> dict[str, torch.Tensor]:
        """What the backbone's text encoders make of one text."""
        with torch.no_grad(), autocast(self._device, self._autocast):
            return self._pipeline.encode_text([text], self._max_sequence_length)


def new_trace(spec: VideoSpec) -> PhysicsTrace | None:
    """What collects the maps of a video, where they are asked for."""
    return PhysicsTrace() if spec.physics is not None and spec.physics.return_maps else None


def _concatenate(texts: Sequence[Mapping[str, torch.Tensor]], prefix: str = "") -> dict[str, torch.Tensor]:
    """Several encoded texts as one batch, by the names of the pipeline's arguments."""
    return {prefix + name: torch.cat([text[name] for text in texts]) for name in texts[0]}


def _diffusers_cache(
    step_cache: StepCache,
) -> FirstBlockCacheConfig | SeaCacheConfig | TaylorSeerCacheConfig | None:
    if step_cache.first_block is not None:
        return FirstBlockCacheConfig(threshold=step_cache.first_block)
    if step_cache.sea is not None:
        return SeaCacheConfig(threshold=step_cache.sea)
    if step_cache.taylorseer is not None:
        # Lite: only what the last projection gives is extrapolated, so that a skipped step runs no block.
        return TaylorSeerCacheConfig(
            cache_interval=step_cache.taylorseer, use_lite_mode=True, taylor_factors_dtype=torch.float32
        )
    return None


def _thumbnail(frames: np.ndarray) -> bytes:
    """The middle frame as WebP."""
    buffer = io.BytesIO()
    Image.fromarray(frames[len(frames) // 2]).save(buffer, "webp", quality=90)
    return buffer.getvalue()


def _maps_json(trace: PhysicsTrace) -> bytes:
    """Semantic weights, token grid and one map `[T'][H'][W']` per phenomenon, to four decimals."""
    assert trace.semantic_weights is not None and trace.phenomenon_maps is not None
    maps = trace.phenomenon_maps[0].double().numpy().round(4)
    routing = {
        "object": "video.physics",
        "semantic_weights": trace.semantic_weights[0].double().numpy().round(4).tolist(),
        "token_grid": maps.shape[:3],
        "maps": {name: maps[..., index].tolist() for index, name in enumerate(trace.phenomena)},
    }
    return json.dumps(routing).encode()
