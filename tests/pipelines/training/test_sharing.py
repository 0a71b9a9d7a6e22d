"""Ranks that share samples train as one process with the joint batch: losses, gradients, steps."""

from pathlib import Path
from typing import Any

import pytest
import torch

from pipelines.config import LossWeights, TrainConfig
from prophy.models.weights import fill
from prophy.training.data import SemanticBatch, TrainBatch
from prophy.training.module import ProPhyTrainModule
from prophy.training.objectives import FlowMatching, VPrediction
from tests.models.conftest import BACKBONES, PHYSICS
from tests.ranks import Result, on_ranks

RANKS, SHARES, SAMPLES, TEXT_LENGTH = 4, 2, 4, 6
CASES: dict[str, tuple[str, int]] = {
    "wan, ZeRO 3": ("wan", 3),
    "cogvideox-5b, ZeRO 1": ("cogvideox-5b", 1),
}
"""Backbone and ZeRO stage. With Wan a first latent is given, and alignments are means; else they are sums."""
LOSSES = ("diffusion", "token_alignment", "load_balancing", "expert_load")


def configuration(zero_stage: int, **values: Any) -> TrainConfig:
    defaults = {"num_workers": RANKS, "sequence_parallel": SHARES, "gradient_clipping": 0.5}
    return TrainConfig(
        zero_stage=zero_stage,
        num_steps=2,
        micro_batch_size=1,
        global_batch_size=SAMPLES,
        precision="fp32",
        learning_rate=1e-3,
        warmup_steps=0,
        **defaults | values,
    )


def build(case: str, accumulation_steps: int) -> ProPhyTrainModule:
    """Branch and adapter are trained, and the branch injects something."""
    family, _ = CASES[case]
    upstream, ours, config = BACKBONES[family]
    is_wan = family == "wan"
    torch.manual_seed(0)
    length = {} if is_wan else {"max_text_seq_length": TEXT_LENGTH}
    transformer = ours.from_transformer(upstream(**config | length), PHYSICS)
    for name, parameter in transformer.physics_branch.named_parameters():
        if "injection" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    transformer.add_lora(rank=2, alpha=4)
    transformer.train_backbone("lora")
    if case.endswith("3"):
        transformer.enable_gradient_checkpointing()
    return ProPhyTrainModule(
        transformer,
        FlowMatching(3.0) if is_wan else VPrediction(torch.linspace(0.99, 0.01, 1000)),
        {"prompt_embeds": torch.zeros(TEXT_LENGTH, 16)},
        LossWeights(semantic_alignment=1.0, token_alignment=0.5, load_balancing=1.0),
        "mean" if is_wan else "sum",
        "absolute",
        accumulation_steps,
        takes_first_latent=is_wan,
    )


def samples(step: int, chosen: range) -> TrainBatch:
    """Some of the global batch of a step."""
    generator, number = torch.Generator().manual_seed(step), SAMPLES
    labels = torch.zeros(number, 17)
    labels[torch.arange(number), torch.arange(number) % 3] = 1.0
    labels[:, 5] = 1.0
    tensors = {
        "latents": torch.randn(number, 4, 2, 4, 6, generator=generator),
        "drop_caption": torch.arange(number) == 1,
        "phenomena": labels,
        "target_maps": torch.rand(number, 12, 17, generator=generator),
        "target_mask": torch.rand(number, 12, 17, generator=generator) < 0.3,
        "noise": torch.randn(number, 4, 2, 4, 6, generator=generator),
        "timestep_quantile": torch.rand(number, generator=generator),
        "given": torch.arange(number) == 2,
    }
    text = torch.randn(number, TEXT_LENGTH, 16, generator=generator)
    index = torch.tensor([*chosen])
    own = {name: value[index] for name, value in tensors.items()}
    return TrainBatch(sample_ids=[str(i) for i in chosen], text={"prompt_embeds": text[index]}, **own)


def train(case: str, rank: int) -> Result:
    """Losses and gradients of each of two steps through DeepSpeed, and what they made of the parameters."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad

    from pipelines.training.engine import initialize, optimizer_step, placement, set_learning_rate
    from pipelines.training.model import share_samples

    config = configuration(CASES[case][1])
    module = build(case, config.gradient_accumulation_steps)
    fill(module, lambda name: None, placement(config))
    share_samples(module.transformer, SHARES)
    engine = initialize(module, config)
    trained = {name: value for name, value in engine.module.named_parameters() if value.requires_grad}
    losses, gradients = [], []
    for step in range(config.num_steps):
        set_learning_rate(engine, config)
        places = range(rank // SHARES, SAMPLES, config.data_parallel_size)
        batches = [samples(step, range(place, place + 1)) for place in places]
        outputs, load, later = [], None, batches[1:]
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            outputs.append(engine(batch, SemanticBatch.join(batches) if last else None, load, later))
            load, later = outputs[-1].expert_load, []
            engine.backward(outputs[-1].loss)
            if last:
                gradients.append({name: safe_get_full_grad(value).clone() for name, value in trained.items()})
            optimizer_step(engine)
        means = {name: torch.stack([output[name] for output in outputs]).mean(0) for name in LOSSES}
        for value in means.values():
            torch.distributed.all_reduce(value)
            value /= RANKS
        losses.append(means | {"semantic_alignment": outputs[-1].semantic_alignment})
    parameters = {name: safe_get_full_fp32_param(value).clone() for name, value in trained.items()}
    return {"losses": losses, "gradients": gradients, "parameters": parameters}


def train_in_bare_torch(case: str) -> Result:
    """The same in one process, all samples of a step in one batch."""
    config, module = configuration(0), build(case, 1)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    groups = [
        {
            "params": [value],
            "lr": config.learning_rate if "physics_branch" in name else config.backbone_learning_rate,
        }
        for name, value in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    losses, gradients = [], []
    for step in range(config.num_steps):
        optimizer.zero_grad()
        joint = samples(step, range(SAMPLES))
        output = module(joint, SemanticBatch.join([joint]))
        output.loss.backward()
        gradients.append({name: value.grad.clone() for name, value in trained.items()})
        torch.nn.utils.clip_grad_norm_(trained.values(), config.gradient_clipping)
        optimizer.step()
        losses.append({name: output[name] for name in (*LOSSES, "semantic_alignment")})
    parameters = {name: value.detach() for name, value in trained.items()}
    return {"losses": losses, "gradients": gradients, "parameters": parameters}


def train_all(rank: int, folder: Path) -> Result:
    return {case: train(case, rank) for case in CASES}


@pytest.fixture(scope="module")
def four_ranks(tmp_path_factory: pytest.TempPathFactory) -> Result:
    return on_ranks(RANKS, train_all, tmp_path_factory.mktemp("ranks"))


@pytest.mark.slow
@pytest.mark.heavy
@pytest.mark.parametrize("case", CASES)
def test_two_groups_of_two_ranks_train_as_one_process(four_ranks: Result, case: str) -> None:
    """To the rounding of float32, by which AdamW's step for a gradient near zero is of any length."""
    result, expected = four_ranks[case], train_in_bare_torch(case)
    for losses, others in zip(result["losses"], expected["losses"], strict=True):
        torch.testing.assert_close(losses, others, rtol=1e-5, atol=1e-6)
    for gradients, others in zip(result["gradients"], expected["gradients"], strict=True):
        assert gradients.keys() == others.keys()
        largest = max(value.abs().max().item() for value in others.values())
        worst = max((gradients[name] - value).abs().max().item() for name, value in others.items())
        print(f"{case}: gradients of up to {largest:.1e} differ by {worst:.1e}")
        for name, value in others.items():
            torch.testing.assert_close(gradients[name], value, rtol=1e-4, atol=1e-6 * largest, msg=name)
    changes = [
        (result["parameters"][name] - value).abs().flatten() for name, value in expected["parameters"].items()
    ]
    off = (torch.cat(changes) > 1e-6).float().mean().item()
    print(f"{case}: parameters differ by {torch.cat(changes).max():.1e}, {off:.1e} of them by over 1e-6")
    assert off < 1e-3


def test_workers_that_share_samples_count_once() -> None:
    """As many micro-batches as a worker less has, and other clips in each group alone."""
    alone, shared = configuration(1, num_workers=2, sequence_parallel=1), configuration(1)
    assert alone.gradient_accumulation_steps == shared.gradient_accumulation_steps == 2
    assert (alone.data_parallel_size, shared.data_parallel_size) == (2, 2)
    assert [count for count in range(1, 9) if shared.shares_batch(count)] == [2, 4, 8]
