"""The endpoint as a user runs it: a first video, a device that fails, a video that is too large."""

import os
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import av
import psutil
import torch
from diffusers import UniPCMultistepScheduler
from transformers import AutoTokenizer, UMT5Config, UMT5EncoderModel

from pipelines.config import Config, load_config
from pipelines.generation.spec import ShapeLimits, VideoResult, VideoSpec
from pipelines.serving import client, serve
from pipelines.training.model import branch_config
from prophy.backbones.families import FAMILIES
from prophy.backbones.pretrained import fingerprint
from prophy.errors import ProPhyError
from prophy.models.checkpoint import save_branch
from prophy.tiny import bundled
from prophy.tiny.pipeline import SCHEDULER, VAE
from tests.gpu.models import DEVICE, DTYPE, GPU, TINY, rounded
from tests.gpu.rows import Row
from tests.wisa import PHENOMENA

PROMPT = "a red ball falls and bounces"
FIELDS = ["num_inference_steps=4", "seed=1"]
SPARE = 1_000_000_000  # bytes of a GPU that are left to a video that is to find too few


class VideoGenerator(serve.VideoGenerator):
    """A replica whose device fails, or has little memory, for a video: where a file in its run says so.

    Each replica notes its process in the file `replicas`.
    """

    def __init__(self, config: Config, limits: ShapeLimits) -> None:
        super().__init__(config, limits)
        with (config.run_dir / "replicas").open("a") as file:
            file.write(f"{os.getpid()}\n")
        sampler: Any = self._sampler
        render = sampler.render

        def disturbed(spec: VideoSpec, on_step: Callable[[float], None], image: bytes | None) -> VideoResult:
            if taken(config.run_dir / "device assert"):
                fail()
            if taken(config.run_dir / "little memory"):
                with little_memory():
                    return render(spec, on_step, image)
            return render(spec, on_step, image)

        sampler.render = disturbed


def taken(file: Path) -> bool:
    """Whether it was there; it no longer is."""
    there = file.exists()
    file.unlink(missing_ok=True)
    return there


def fail() -> None:
    """A kernel's assertion, after which this process can do nothing with its GPU."""
    if not GPU:
        raise torch.AcceleratorError("CUDA error: device-side assert triggered")
    torch.arange(2, device=DEVICE)[torch.tensor([9], device=DEVICE)]
    torch.cuda.synchronize()


@contextmanager
def little_memory() -> Iterator[None]:
    """Leaves the process what it has, and on a GPU `SPARE` bytes."""
    if GPU:
        torch.cuda.empty_cache()
        total = torch.cuda.get_device_properties(DEVICE).total_memory
        torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_allocated() + SPARE) / total)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0)
        return
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (psutil.Process().memory_info().vms, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


def check() -> Iterator[Row]:
    """Wan2.1-1.3B of random weights, with a branch, at its native shape; without a GPU a small Wan."""
    with tempfile.TemporaryDirectory(prefix="prophy-") as name:
        folder = Path(name)
        preset, overrides = "wan2.1-1.3b", ["serve.host=127.0.0.1", "serve.port=0", "serve.max_replicas=1"]
        overrides += [f"run_dir={folder / 'run'}", f"checkpoint={folder / 'branch'}"]
        if not GPU:
            preset, overrides = "tiny", [*overrides, "physics.physics_layers=[0,2]"]
        model = write_model(folder, load_config(preset, overrides))
        config = load_config(preset, [*overrides, f"backbone.pretrained={model}"])
        start = time.perf_counter()
        with patch.object(serve, "VideoGenerator", VideoGenerator), serve.serving(config) as url:
            yield Row("endpoint, until it is ready", f"{time.perf_counter() - start:.3g} s")

            def video(what: str) -> Row:
                begun = time.perf_counter()
                file = client.run(url, PROMPT, folder / "video.mp4", FIELDS)
                with av.open(file) as container:
                    frames = sum(1 for _ in container.decode(video=0))
                seconds, wanted = time.perf_counter() - begun, config.backbone.num_frames
                told = f"{frames} frames in {seconds:.3g} s"
                return Row(f"endpoint, {what}", told, f"{wanted} frames", frames == wanted)

            yield video("a video")
            (config.run_dir / "device assert").touch()
            yield video("a video at whose beginning the device fails")
            replicas = len((config.run_dir / "replicas").read_text().splitlines())
            yield Row("endpoint, replicas that were begun", f"{replicas}", "2", replicas == 2)
            (config.run_dir / "little memory").touch()
            try:
                client.run(url, PROMPT, folder / "large.mp4", FIELDS)
                told = "was made"
            except ProPhyError as error:
                told = str(error)
            refused = "more memory than there is" in told
            yield Row("endpoint, a video for which memory is too little", told, "one sentence", refused)
            yield video("the next video")


def write_model(folder: Path, config: Config) -> Path:
    """A pipeline of random weights, of one layer in the text encoder; and `branch` beside it, not trained."""
    family, clip, pipeline = FAMILIES["wan"], config.backbone, folder / "pipeline"
    classes, published = family.classes(), family.published["Wan-AI/Wan2.1-T2V-1.3B-Diffusers"]
    of_transformer, of_vae = (published.transformer, published.vae) if GPU else (TINY["wan"], VAE)
    tokenizer = AutoTokenizer.from_pretrained(bundled("text_encoder"))
    torch.manual_seed(0)
    with DEVICE:
        transformer = rounded(classes.transformer(**of_transformer))
        vae: Any = classes.vae.from_config(dict(of_vae))
        width = transformer.config.text_dim
        of_text = UMT5Config(
            vocab_size=len(tokenizer),
            d_model=width,
            d_kv=32,
            d_ff=2 * width,
            num_layers=1,
            num_heads=width // 32,
        )
        text_encoder: Any = UMT5EncoderModel(of_text)
    classes.pipeline(
        tokenizer=tokenizer,
        text_encoder=text_encoder.to(DTYPE),
        vae=vae,
        transformer=transformer,
        scheduler=UniPCMultistepScheduler(**SCHEDULER),
        max_sequence_length=clip.max_sequence_length,
    ).save_pretrained(pipeline)
    latents = family.latent_shape(
        clip.num_frames, clip.height, clip.width, dict(vae.config), dict(transformer.config)
    )
    physics = branch_config(config.physics, latents, PHENOMENA).model_dump()
    model = classes.prophy_transformer.from_transformer(transformer, physics)
    model.physics_branch.float()
    trained_on = {"name": str(pipeline), "revision": None, "fingerprint": fingerprint(str(pipeline), None)}
    save_branch(model, folder / "branch", trained_on)
    return pipeline
