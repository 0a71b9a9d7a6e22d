"""Two processes that share a sample compute what one computes: prediction, routing, gradients, a video."""

from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import ContextParallelConfig, FirstBlockCacheConfig, TensorParallelConfig

from prophy.backbones.loading import load_pipeline
from prophy.backbones.pretrained import resolve_pretrained
from prophy.errors import ProPhyError
from prophy.generation.pipeline_wan import ProPhyWanPipeline
from prophy.models.acceleration import checkpoint_but_attention
from prophy.models.control import PhysicsControl, PhysicsTrace
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from tests.generation.test_pipeline_wan import awaken, sample
from tests.ranks import Result, on_ranks

from .conftest import BACKBONES, BASELINES, PHYSICS

LATENTS, TEXT_LENGTH = (2, 4, 2, 4, 6), 6
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "wan": ("wan", {}),
    "wan, a timestep of each token": ("wan", {}),
    "wan, attention kept": ("wan", {}),
    "wan, no Physical Blocks": ("wan", BASELINES["lora+seb+reb"]),
    "wan, Physical Blocks read the backbone": ("wan", {"blocks_read": "backbone"}),
    "cogvideox-2b": ("cogvideox-2b", {}),
    "cogvideox1.5-5b": ("cogvideox1.5-5b", {}),
}
"""Backbone of `BACKBONES`, and what of the branch is another than in `PHYSICS`."""


def model(case: str) -> PhysicsTransformer:
    """All of it is trained, and the branch injects something."""
    family, physics = CASES[case]
    upstream, ours, config = BACKBONES[family]
    torch.manual_seed(0)
    length = {"max_text_seq_length": TEXT_LENGTH} if "max_text_seq_length" in config else {}
    transformer = ours.from_transformer(upstream(**config | length), PHYSICS | physics)
    for name, parameter in transformer.physics_branch.named_parameters():
        if "injection" in name:
            torch.nn.init.normal_(parameter, std=0.3)
    if "kept" in case:
        transformer.enable_gradient_checkpointing(checkpoint_but_attention)
    return transformer


def passes(transformer: PhysicsTransformer, case: str) -> dict[str, torch.Tensor]:
    """What a forward pass gives, what `route` gives, and gradients of something of both."""
    generator = torch.Generator().manual_seed(1)
    latents = torch.randn(LATENTS, generator=generator)
    text = {"prompt_embeds": torch.randn(2, TEXT_LENGTH, 16, generator=generator)}
    weights = torch.rand(LATENTS, generator=generator)
    timestep = torch.tensor([300, 800])
    if "each token" in case:
        timestep = timestep[:, None] * (torch.arange(12) >= 6)
    output = transformer.predict(latents, timestep, text)
    routing = output.routing
    with torch.no_grad():
        ahead = transformer.route(latents, timestep, text)
    loss = (output.sample * weights).square().mean() + routing.phenomenon_maps.square().mean()
    (loss + routing.refinement_logits.square().mean()).backward()
    return {
        "sample": output.sample.detach(),
        "maps": routing.phenomenon_maps.detach(),
        "logits": routing.refinement_logits.detach(),
        "logits ahead": ahead.refinement_logits,
        **{name: value.grad for name, value in transformer.named_parameters() if value.grad is not None},
    }


def video(together: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Frames, and where phenomena act, by the embedded pipeline with guidance and knobs."""
    bare = load_pipeline("wan", "tiny", None, torch.float32, None)
    torch.manual_seed(0)
    physics = PHYSICS | {"physics_layers": [0, 3], "latent_shape": [2, 8, 8]}
    transformer = ProPhyWanTransformer3DModel.from_transformer(bare.transformer, physics).eval()
    pipeline = ProPhyWanPipeline(**bare.components | {"transformer": transformer}, max_sequence_length=32)
    awaken(pipeline)
    if together:
        transformer.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
    trace = PhysicsTrace()
    control = PhysicsControl(scale=1.5, strength={PHYSICS["phenomena"][0]: 3.0}, trace=trace)
    frames = torch.from_numpy(sample(pipeline, "np", physics=control))
    assert trace.phenomenon_maps is not None
    return frames, trace.phenomenon_maps


def alone_and_together(rank: int, folder: Path) -> Result:
    own = video(together=True)
    of_rank_1 = own[0].clone()
    torch.distributed.broadcast(of_rank_1, src=1)
    results: Result = {"video": (video(together=False), own)}
    results["same on both"] = torch.equal(of_rank_1, own[0])
    for case in CASES:
        alone = passes(model(case), case)
        shared = model(case)
        shared.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
        together = passes(shared, case)
        for name, _ in shared.named_parameters():
            if name in together:
                torch.distributed.all_reduce(together[name])
        results[case] = alone, together
    three_texts = torch.randn(2, 3, 16)
    with pytest.raises(ProPhyError, match="2 processes cannot share out 3 tokens"):
        shared.predict(torch.randn(LATENTS), torch.tensor([1, 2]), {"prompt_embeds": three_texts})
    with pytest.raises(ProPhyError, match="leave the step cache out"):
        shared.enable_cache(FirstBlockCacheConfig(threshold=0.1))
    return results


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory: pytest.TempPathFactory) -> Result:
    resolve_pretrained("tiny")  # builds it: of a group, transformers has the first process alone save
    return on_ranks(2, alone_and_together, tmp_path_factory.mktemp("ranks"))


@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_two_processes_compute_what_one_does(two_ranks: Result, case: str) -> None:
    """To the rounding of float32: tokens are summed in another order."""
    alone, together = two_ranks[case]
    assert alone.keys() == together.keys()
    outputs = {"sample", "maps", "logits", "logits ahead"}
    assert outputs | {"physics_branch.refinement.router.gate.weight"} <= alone.keys()
    # Some gradients are 0 but for rounding: no key's bias changes a softmax.
    largest = max(value.abs().max().item() for name, value in alone.items() if name not in outputs)
    for kind, names in {"outputs": outputs, "gradients": alone.keys() - outputs}.items():
        scale = 1.0 if kind == "outputs" else largest
        worst = max((together[name] - alone[name]).abs().max().item() for name in names)
        print(f"{case}: {kind} differ by {worst:.1e}, of up to {scale:.1e}")
        for name in names:
            torch.testing.assert_close(together[name], alone[name], rtol=1e-5, atol=1e-6 * scale, msg=name)


@pytest.mark.heavy
def test_two_processes_make_the_video_of_one(two_ranks: Result) -> None:
    (frames, maps), (shared_frames, shared_maps) = two_ranks["video"]
    print(f"frames differ by {(shared_frames - frames).abs().max():.1e}")
    assert frames.shape == (1, 5, 32, 32, 3) and frames.std() > 0 and maps.shape[1:4] == (2, 4, 4)
    torch.testing.assert_close(shared_frames, frames, rtol=0, atol=1e-4)
    torch.testing.assert_close(shared_maps, maps, rtol=0, atol=1e-5)
    assert two_ranks["same on both"]


def test_other_kinds_of_parallelism_are_refused(awakened: PhysicsTransformer) -> None:
    for config in (ContextParallelConfig(ring_degree=2), TensorParallelConfig(tp_degree=2)):
        with pytest.raises(ProPhyError, match="parallel in one way alone"):
            awakened.enable_parallelism(config=config)
    with pytest.raises(ProPhyError, match="3 processes cannot share out 2 attention heads"):
        awakened.enable_parallelism(config=ContextParallelConfig(ulysses_degree=3))
    with pytest.raises(ProPhyError, match="init_process_group"):
        awakened.enable_parallelism(config=ContextParallelConfig(ulysses_degree=2))
