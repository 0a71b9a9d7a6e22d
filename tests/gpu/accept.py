"""What only a GPU can tell, in one command: `make gpu`. Each line is a value, its bound, PASS or FAIL.

Nothing is downloaded: models have the published shapes and random weights. Without a GPU each check runs in a
smaller form, with no bound on time and memory; that shows that the script works, and nothing of a GPU.
"""

import gc
import json
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.profiler import ProfilerActivity, profile

from pipelines.config import load_config
from pipelines.training.metrics import StepClock
from pipelines.training.plan import make_plan
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import tile_large_frames
from prophy.backbones.memory import vae_cost
from prophy.device import has_bfloat16, peak_flops
from prophy.errors import ProPhyError
from prophy.models.acceleration import (
    accelerate,
    check_attention,
    checkpoint_but_attention,
    compile_blocks,
    set_attention,
)
from prophy.models.experts import RefinementExpertBlock
from prophy.training.cost import count_flops
from tests.gpu import checkpoints, endpoint, trainings, vlm
from tests.gpu.models import DEVICE, DTYPE, GPU, TINY, rounded, run, small
from tests.gpu.rows import Row, relative, timed, within
from tests.wisa import PHENOMENA


def environment() -> Iterator[Row]:
    """Versions, and whether large products run at the speed of the data sheet."""
    yield Row("torch", f"{torch.__version__}, CUDA {torch.version.cuda}")
    if GPU:
        properties = torch.cuda.get_device_properties(DEVICE)
        yield Row("GPU", f"{properties.name}, {properties.total_memory / 1e9:.0f} GB")
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        yield Row("driver", subprocess.check_output(asked, text=True).splitlines()[0])
        yield Row("NCCL", ".".join(map(str, torch.cuda.nccl.version())))
    size, dtype = (8192, torch.bfloat16) if GPU else (512, torch.float32)
    a, b = torch.randn(2, size, size, device=DEVICE, dtype=dtype)
    seconds = timed(lambda: torch.mm(a, b), repeats=10)
    reached = 2 * size**3 / seconds
    share = reached / peak_flops(DEVICE, dtype)
    bound = "over 60 % of the data sheet" if GPU else None
    yield Row(
        f"product of {size}", f"{reached / 1e12:.3g} TFLOP/s, {share:.0%}", bound, share > 0.6 or not GPU
    )


def experts() -> Iterator[Row]:
    """The grouped product against a loop over experts, with an expert that nobody chose."""
    torch.manual_seed(0)
    width, rows = (1536, 4099) if GPU else (48, 67)
    block = RefinementExpertBlock(width, 8, 2, len(PHENOMENA)).to(DEVICE)
    chosen = torch.rand(rows, 7, device=DEVICE).topk(2).indices  # the last gets none
    weights = torch.rand(rows, 2, device=DEVICE)
    x = torch.randn(rows, width, device=DEVICE, requires_grad=True)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU):
        found = block._apply_experts(x, weights, chosen)
    given = torch.randn_like(found)
    grads = torch.autograd.grad(found, (x, block.weight), given)

    every = torch.stack([F.linear(x, block.weight[e], block.bias[e]) for e in range(8)], dim=1)
    picked = every.gather(1, chosen[..., None].expand(-1, -1, width))
    expected = (picked * weights[..., None]).sum(1)
    others = torch.autograd.grad(expected, (x, block.weight), given)
    limit = 2e-2 if GPU else 1e-5
    for name, one, other in (
        ("output", found, expected),
        ("gradient of tokens", grads[0], others[0]),
        ("gradient of experts", grads[1], others[1]),
    ):
        yield within(f"experts against a loop, {name}", relative(one, other), limit)
    idle = grads[1][-1].abs().max().item()
    yield Row("gradient of an expert without tokens", f"{idle:g}", "0", idle == 0)


def untrained() -> Iterator[Row]:
    """Before the first step the model is its backbone: bit for bit, eager; compiled to the rounding."""
    for family in TINY:
        bare, model, inputs = small(family)
        with torch.no_grad():
            expected, found = run(bare, inputs), run(model, inputs)
            yield Row(
                f"{family}, untrained against its backbone",
                f"differs by {(found - expected).abs().max():g}",
                "0",
                torch.equal(found, expected),
            )
            compile_blocks(model, "inductor" if GPU else "aot_eager")
            difference = relative(run(model, inputs), expected)
        yield within(f"{family}, compiled against eager", difference, 2e-2 if GPU else 1e-5)


def attention() -> Iterator[Row]:
    """Each kernel that runs here against PyTorch's own choice; and which one that is."""
    for family in TINY:
        bare, _, inputs = small(family, width=128)
        set_attention(bare, "native")
        with torch.no_grad():
            expected = run(bare, inputs)
            for name in ("_native_cudnn", "_native_flash", "_flash_3", "sage"):
                try:
                    check_attention(name, DEVICE, DTYPE, trains=False)
                except ProPhyError as error:
                    yield Row(f"{family}, {name}", f"not here: {str(error).split(';')[0]}")
                    continue
                set_attention(bare, name)
                yield within(f"{family}, {name} against native", relative(run(bare, inputs), expected), 5e-2)
            set_attention(bare, "native")
            activity = ProfilerActivity.CUDA if GPU else ProfilerActivity.CPU
            with profile(activities=[activity]) as seen:
                run(bare, inputs)
        kernels = {event.key for event in seen.key_averages()}
        fused = sorted(
            key for key in kernels if any(part in key.lower() for part in ("flash", "fmha", "cudnn_"))
        )
        yield Row(f"{family}, native's kernel", ", ".join(fused)[:90] or "none", "a fused one", bool(fused))


def training(preset: str, layers: dict[str, Any] | None = None) -> Iterator[Row]:
    """Forward and backward pass of a sample with checkpointing, by kernel and compilation; its memory.

    With `layers` the backbone has fewer blocks, and the plan that it is held against too.
    """
    overrides = ["train.num_workers=1", "train.global_batch_size=1"]
    overrides += ["physics.physics_layers=[0,2]"] if layers or not GPU else []
    planned_for = load_config(preset, overrides)
    config = planned_for if GPU else load_config("tiny", [*overrides, "train.micro_batch_size=1"])
    family, clip = FAMILIES[config.backbone.family], config.backbone
    published = family.published[planned_for.backbone.pretrained]
    settings = dict(published.transformer) | (layers or {}) if GPU else TINY["wan"]
    time_factor, space = family.vae_factors(published.vae)
    latents = (
        16,
        (clip.num_frames - 1) // time_factor + 1,
        *(length // space for length in (clip.height, clip.width)),
    )
    physics = {
        "physics_layers": config.physics.physics_layers,
        "latent_shape": latents[1:],
        "phenomena": [*PHENOMENA],
    }
    torch.manual_seed(0)
    with DEVICE:
        backbone = rounded(family.classes().transformer(**settings))
    model = family.classes().prophy_transformer.from_transformer(backbone, physics)
    model.physics_branch.float()
    model.train_backbone("frozen")
    text = family.text(model.config, clip.max_sequence_length)
    inputs = (
        torch.randn(1, *latents, device=DEVICE, dtype=DTYPE),
        torch.tensor([500.0], device=DEVICE),
        {name: torch.randn(1, *shape, device=DEVICE, dtype=DTYPE) for name, shape in text.items()},
    )
    flops = count_flops(model, 1, latents, text)
    ways: list[tuple[str, bool, str]] = [("native", False, "none"), ("native", True, "none")]
    ways += [("_native_cudnn", False, "none")] if GPU else []
    ways += [("native", False, "regional")] if GPU else []
    clock = StepClock()
    for kernel, keeps, compilation in ways:
        accelerate(model, kernel, compilation)
        model.enable_gradient_checkpointing(checkpoint_but_attention if keeps else None)

        def step() -> None:
            with torch.autocast(DEVICE.type, torch.bfloat16, enabled=GPU), clock("forward"):
                output = model.predict(*inputs)
                loss = output.sample.float().square().mean() + output.routing.phenomenon_maps.mean()
            with clock("backward"):
                loss.backward()
            model.zero_grad()

        step()  # compiles, and finds its algorithms; not measured
        clock.read()
        if GPU:
            torch.cuda.reset_peak_memory_stats()
        seconds = timed(step, repeats=2)
        phases = sum(clock.read().values()) / 3  # with the call that is not timed
        what = f"{kernel}{', keeping attention' if keeps else ''}, compile {compilation}"
        yield Row(
            f"{preset}, {what}", f"{seconds:.3g} s, MFU {flops / seconds / peak_flops(DEVICE, DTYPE):.1%}"
        )
        bound = "90 to 110 % of it" if GPU else None
        fits = 0.9 < phases / seconds < 1.1 or not GPU
        yield Row("the clock's phases of it", f"{phases:.3g} s", bound, fits)
        if (kernel, keeps, compilation) == ways[0]:
            of_this = {planned_for.backbone.pretrained: replace(published, transformer=settings)}
            with patch.dict(family.published, of_this):
                plan = make_plan(planned_for)
            planned = plan.activations[True] + plan.size.frozen_bytes + 8 * plan.size.trained
            used = torch.cuda.max_memory_allocated() if GPU else 0
            yield Row(
                f"{preset}, memory without AdamW",
                f"{used / 1e9:.1f} GB, planned {planned / 1e9:.1f}",
                "within 15 %" if GPU else None,
                abs(used / planned - 1) < 0.15 or not GPU,
            )
            whole, speed = make_plan(load_config(preset)), (plan.flops + plan.recomputed_flops) / seconds
            step_s = (whole.flops + whole.recomputed_flops) / whole.train.num_workers / speed
            yield Row(
                f"{preset}, a step of {whole.train.num_workers} GPUs as fast as this one",
                f"{step_s:.3g} s, planned {whole.seconds(True):.3g}",
            )


def vaes() -> Iterator[Row]:
    """Memory of encoding and decoding against the plan's count, and bfloat16 against float32."""
    shapes = {"wan": (81, 480, 832), "cogvideox": (49, 480, 720)} if GPU else dict.fromkeys(TINY, (9, 32, 32))
    for name, shape in shapes.items():
        family = FAMILIES[name]
        settings = next(iter(family.published.values())).vae
        torch.manual_seed(0)
        with DEVICE:
            vae: Any = family.classes().vae.from_config(dict(settings)).eval()
        video = torch.rand(1, 3, *shape, device=DEVICE) * 2 - 1
        cost = vae_cost(family, settings, shape, 4)
        with torch.no_grad():
            latents = vae.encode(video).latent_dist.mode()
            for what, planned in (("encode", cost.encode), ("decode", cost.decode)):
                if GPU:
                    torch.cuda.empty_cache()
                    torch.cuda.reset_peak_memory_stats()
                held = torch.cuda.memory_allocated() if GPU else 0
                function, given = getattr(vae, what), video if what == "encode" else latents
                seconds = timed(partial(function, given), repeats=1)
                used = (torch.cuda.max_memory_allocated() if GPU else 0) - held
                yield Row(
                    f"{name}'s VAE, {what} {'x'.join(map(str, shape))}",
                    f"{seconds:.3g} s, {used / 1e9:.1f} GB, planned {planned / 1e9:.1f}",
                    "at most 30 % more" if GPU else None,
                    used < 1.3 * planned,
                )
            coarse = vae.to(torch.bfloat16).encode(video.to(torch.bfloat16)).latent_dist.mode()
        yield within(f"{name}'s VAE in bfloat16 against float32", relative(coarse, latents), 0.1)


def tiles() -> Iterator[Row]:
    """CogVideoX1.5's frames, which are larger than its VAE was made for, decoded as `load_pipeline` does."""
    family = FAMILIES["cogvideox"]
    settings = dict(family.published["zai-org/CogVideoX1.5-5B"].vae)
    shape = (81, 768, 1360) if GPU else (9, 72, 56)
    if not GPU:
        settings |= {"sample_height": 48, "sample_width": 40, "block_out_channels": [32, 32, 32, 32]}
    time_factor, space = family.vae_factors(settings)
    latents = (16, (shape[0] - 1) // time_factor + 1, *(length // space for length in shape[1:]))
    torch.manual_seed(0)
    with DEVICE:
        vae: Any = family.classes().vae.from_config(settings).eval().to(DTYPE)
    tile_large_frames(vae)
    given = torch.randn(1, *latents, device=DEVICE, dtype=DTYPE)
    planned = vae_cost(family, settings, shape, DTYPE.itemsize).decode
    if GPU:
        torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated() if GPU else 0
    frames: list[torch.Tensor] = []
    with torch.no_grad():
        seconds = timed(lambda: frames.append(vae.decode(given).sample), repeats=1)
    used = (torch.cuda.max_memory_allocated() if GPU else 0) - held
    yield Row(
        f"CogVideoX1.5's VAE, decode {'x'.join(map(str, shape))} in tiles",
        f"{seconds:.3g} s, {used / 1e9:.1f} GB, planned {planned / 1e9:.1f}",
        "whole frames" + (", at most 30 % more" if GPU else ""),
        used < 1.3 * planned and tuple(frames[0].shape) == (1, 3, *shape),
    )


CHECKS: dict[str, Callable[[], Iterator[Row]]] = {
    "environment": environment,
    "experts": experts,
    "untrained": untrained,
    "attention": attention,
    "vaes": vaes,
    "tiles": tiles,
    "1.3B": lambda: training("wan2.1-1.3b"),
    "14B, 4 blocks": lambda: training("wan2.1-14b", {"num_layers": 4}),
    "vlm": vlm.check,
    "checkpoints": checkpoints.check,
    "trainings": trainings.check,
    "endpoint": endpoint.check,
}


def main(names: list[str], report: Path | None = None) -> int:
    """Runs checks, all by default; prints a line per value and writes them as JSON; how many failed."""
    if not GPU:
        print("no GPU here: each check runs in its small form, which says nothing about a GPU")
        print("" if has_bfloat16(DEVICE) else "this CPU has no bfloat16 either")
    rows: list[Row] = []
    for name in names or CHECKS:
        start = time.perf_counter()
        try:
            for row in CHECKS[name]():
                rows.append(row)
                show(row)
        except Exception as error:  # the next check runs all the same
            traceback.print_exc()
            rows.append(Row(name, f"{type(error).__name__}: {error}"[:200], "no error", passed=False))
            show(rows[-1])
        gc.collect()
        if GPU:
            torch.cuda.empty_cache()  # for processes of the checks that follow
        print(f"  ({name}: {time.perf_counter() - start:.0f} s)")
    failed = sum(not row.passed for row in rows)
    result = {
        "gpu": torch.cuda.get_device_name(DEVICE) if GPU else None,
        "rows": [asdict(row) for row in rows],
    }
    text = json.dumps(result, indent=1)
    print(text)
    if report is not None:
        report.write_text(text)
    print(f"{len(rows) - failed} of {len(rows)} passed" + ("" if GPU else ", in the form for a CPU"))
    return failed


def show(row: Row) -> None:
    """One line."""
    verdict = "----" if row.bound is None and row.passed else "PASS" if row.passed else "FAIL"
    print(f"{verdict}  {row.name}: {row.value}" + (f"  [{row.bound}]" if row.bound else ""), flush=True)


if __name__ == "__main__":
    sys.exit(min(main(sys.argv[1:]), 1))
