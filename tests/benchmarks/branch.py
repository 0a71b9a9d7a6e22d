"""Does the embedded Physical Branch help? Without it, with it, and a LoRA of the backbone of the same steps.

    python tests/benchmarks/branch.py [RUN_DIR NUM_LORA_STEPS]

RUN_DIR is a run that has trained the branch (`prophy pretrain branch`): the LoRA is trained on the same
batches with the same noise; without it, there is no LoRA. The same prompts and seeds for all; then where the
refinement experts act and what the semantic experts tell apart, on true clips of combinations that were never
trained.
"""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from backbone import FALLS_HEADER, falls_row, rates  # beside this file
from peft import LoraConfig
from rich.console import Console
from rich.table import Table

from pipelines.caching.cache import encodings_folder, priors_folder
from pipelines.config import load_config
from pipelines.training.data import build_dataset
from prophy.backbones.encoding import VideoEncoder
from prophy.backbones.loading import load_pipeline
from prophy.device import autocast
from prophy.evaluation.generated import fall_requests, held_out_requests, judge_videos, make_videos
from prophy.evaluation.routing import RoutingScores, score_routing
from prophy.models.control import PhysicsControl
from prophy.pretraining.backbone import SAMPLING
from prophy.pretraining.recipe import held_out_clips
from prophy.sandbox import PHENOMENA, Phenomenon
from prophy.tiny import bundled
from prophy.training.cache import PriorCache
from prophy.training.objectives import FlowMatching

NUM_FALLS = 48
NUM_CLIPS = 200
LORA = LoraConfig(
    r=32, lora_alpha=32, target_modules=["to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2"]
)
LORA_LEARNING_RATE = 1e-3


def train_lora(run_dir: Path, num_steps: int) -> torch.nn.Module:
    """The backbone with a LoRA, trained as the branch was: same batches, noise, warm-up and clipping."""
    one_worker = ["train.num_workers=1", "train.micro_batch_size=${train.global_batch_size}"]
    config = load_config(str(run_dir / "train.yaml"), one_worker)
    cache = PriorCache(Path(priors_folder(config)), Path(encodings_folder(config)))
    dataset, empty = build_dataset(config, cache, rank=0), cache.null_text()["prompt_embeds"]
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, None)
    objective = FlowMatching.from_scheduler(pipeline.scheduler.config)
    transformer = pipeline.transformer.requires_grad_(False)
    transformer.add_adapter(LORA)
    trained = [parameter for parameter in transformer.parameters() if parameter.requires_grad]
    optimiser = torch.optim.AdamW(trained, lr=LORA_LEARNING_RATE, weight_decay=config.train.weight_decay)
    for step in range(num_steps):
        optimiser.param_groups[0]["lr"] = LORA_LEARNING_RATE * min(
            1.0, (step + 1) / config.train.warmup_steps
        )
        [batch], _ = dataset[step]
        timesteps = objective.timesteps(batch.timestep_quantile)
        noisy = objective.add_noise(batch.latents, batch.noise, timesteps)
        text = torch.where(batch.drop_caption[:, None, None], empty, batch.text["prompt_embeds"])
        with autocast(transformer.device, "bfloat16"):
            predicted = transformer(noisy, timesteps, text, return_dict=False)[0]
        target = objective.target(batch.latents, batch.noise, timesteps)
        loss = torch.nn.functional.mse_loss(predicted.float(), target)
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, config.train.gradient_clipping)
        optimiser.step()
        if (step + 1) % 50 == 0:
            print(f"LoRA step {step + 1} of {num_steps}: loss {loss.item():.4f}", flush=True)
    return transformer.eval()


def routing_of_true_clips() -> RoutingScores:
    """Of the embedded branch, on clips that hold a combination which was never trained."""
    pipeline = load_pipeline("wan", "tiny", None, torch.float32, bundled("branch"))
    encoder = VideoEncoder("tiny", None, "float32", "bfloat16", 32, family="wan")
    clips = held_out_clips(NUM_CLIPS)
    latents = torch.cat([encoder.encode_video(clip.frames[None]) for clip in clips])
    text = encoder.encode_text([clip.caption for clip in clips])
    objective = FlowMatching.from_scheduler(pipeline.scheduler.config)
    return score_routing(pipeline.transformer, objective, clips, latents, text, (5, 8, 8))


def similarity(scores: RoutingScores, a: Phenomenon, b: Phenomenon) -> str:
    """Cosine of the mean semantic weights of two phenomena."""
    x, y = scores.semantic_weights[a], scores.semantic_weights[b]
    return f"{a} and {b}: {x @ y / np.linalg.norm(x) / np.linalg.norm(y):.3f}"


def main() -> None:
    console = Console(width=110)
    requests, falls = held_out_requests(wordings=1), fall_requests(NUM_FALLS)
    with_branch = load_pipeline("wan", "tiny", None, torch.float32, bundled("branch"))
    contestants = {
        "backbone (branch at scale 0)": (with_branch, PhysicsControl(scale=0.0)),
        "with the branch (scale 1)": (with_branch, PhysicsControl()),
    }
    if len(sys.argv) > 2:
        pipeline = load_pipeline("wan", "tiny", None, torch.float32, None)
        pipeline.register_modules(transformer=train_lora(Path(sys.argv[1]), int(sys.argv[2])))
        contestants[f"LoRA, rank {LORA.r}, {sys.argv[2]} steps"] = (pipeline, None)

    asked = Table("", "parts", "phenomenon, side", "colour", "all right", title="held-out combinations")
    fallen = Table(*FALLS_HEADER, title="gravity")
    for name, (pipeline, physics) in contestants.items():
        sampling = replace(SAMPLING, physics=physics)
        asked.add_row(
            name, *rates(judge_videos(list(make_videos(pipeline, requests, sampling)), requests, sampling))
        )
        fallen.add_row(name, *falls_row(list(make_videos(pipeline, falls, sampling)), falls, sampling))
    console.print(asked, fallen)

    scores = routing_of_true_clips()
    table = Table(
        "phenomenon", "clips", "where", "which", "semantic weights", title="routing: AUROC against masks"
    )
    for phenomenon in PHENOMENA:
        where, which = scores.where[phenomenon], scores.which[phenomenon]
        weights = " ".join(f"{weight:.2f}" for weight in scores.semantic_weights[phenomenon])
        table.add_row(phenomenon, str(len(where)), f"{np.mean(where):.3f}", f"{np.mean(which):.3f}", weights)
    everything = [
        np.mean([value for values in kind.values() for value in values])
        for kind in (scores.where, scores.which)
    ]
    table.add_section()
    table.add_row("all", "", *(f"{mean:.3f}" for mean in everything))
    console.print(table)
    console.print("cosine of semantic weights:")
    console.print(" ", similarity(scores, Phenomenon.COMBUSTION, Phenomenon.EXPLOSION))
    console.print(" ", similarity(scores, Phenomenon.EXPLOSION, Phenomenon.REFRACTION))


if __name__ == "__main__":
    main()
