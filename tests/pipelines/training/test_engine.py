"""DeepSpeed on real processes: every ZeRO stage trains alike, resumes exactly and gives whole weights.

And the gradients of all losses, the global ones too, are those of one process with the joint batch.
"""

import shutil
from collections import OrderedDict
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from diffusers import WanTransformer3DModel
from torch import nn

from pipelines.config import LossWeights, TrainConfig
from pipelines.training.checkpoint import Checkpoint
from pipelines.training.checkpoint_places import FolderStore
from prophy.device import has_bfloat16
from prophy.models.acceleration import compile_blocks
from prophy.models.eight_bits import keep_in, stored_layers
from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.models.weights import fill
from prophy.training.data import SemanticBatch, TrainBatch
from prophy.training.module import ProPhyTrainModule
from prophy.training.objectives import FlowMatching
from tests.ranks import Result, on_ranks
from tests.wisa import PHENOMENA

pytestmark = pytest.mark.heavy

WORLD_SIZE = 2
STAGES = (0, 1, 2, 3)
ENGINES = {f"zero{stage}": (stage, "none") for stage in STAGES} | {
    "zero2-offload": (2, "optimizer"),
    "zero3-offload": (3, "all"),
}
EMA_DECAY = 0.4
SHORT = 6  # steps of a loss curve
Reduction = Literal["mean", "sum"]
REDUCTIONS: dict[int, Reduction] = {0: "sum", 1: "mean", 2: "sum", 3: "mean"}
GLOBAL = ("diffusion", "token_alignment", "load_balancing", "expert_load")


def train_config(zero_stage: int, **values: Any) -> TrainConfig:
    defaults = {
        "num_steps": 6,
        "micro_batch_size": 2,
        "num_workers": WORLD_SIZE,
        "global_batch_size": 8,
        "precision": "fp32",
        "learning_rate": 1e-2,
        "backbone_learning_rate": 5e-3,
        "warmup_steps": 4,
        "gradient_clipping": 0.5,
    }
    return TrainConfig(zero_stage=zero_stage, **(defaults | values))


def network() -> nn.Sequential:
    """Three layers: the first is frozen, the others have a learning rate each."""
    torch.manual_seed(0)
    layers = {"frozen": nn.Linear(8, 16), "physics_branch": nn.Linear(16, 16), "last": nn.Linear(16, 1)}
    layers["frozen"].requires_grad_(False)
    between = {"act": nn.GELU(), "act2": nn.GELU()}
    names = ("frozen", "act", "physics_branch", "act2", "last")
    return nn.Sequential(OrderedDict((name, (layers | between)[name]) for name in names))


def micro_batch(step: int, index: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + index))


def loss_of(prediction: torch.Tensor, inputs: torch.Tensor) -> torch.Tensor:
    return (prediction - inputs.sum(1, keepdim=True)).square().mean()


def everything_on_two_ranks(rank: int, folder: Path) -> Result:
    """Six steps by every kind of engine; and once more the last three, from the checkpoint after three."""
    trained = {}
    for kind, (zero_stage, offload) in ENGINES.items():
        history = train(folder / kind, 6, zero_stage, offload)
        if rank == 0:
            shutil.copytree(folder / kind / "step-00000003", folder / f"{kind}-again" / "step-00000003")
        torch.distributed.barrier()
        trained[kind] = history, train(folder / f"{kind}-again", 6, zero_stage, offload)
    gradients = {
        (stage, steps): gradients_through_deepspeed(rank, WORLD_SIZE, stage, steps, REDUCTIONS[stage])
        for stage in STAGES
        for steps in (1, 2)
    }
    stages = (1, 3) if has_bfloat16(torch.device("cpu")) else ()
    curves = {stage: loss_curve(stage, "bfloat16", num_steps=6)["losses"] for stage in stages}
    short = {(stage, "lora"): loss_curve(stage, "lora", SHORT) for stage in STAGES}
    compiled = loss_curve(3, "compiled", num_steps=3)["losses"]
    eight_bits = loss_curve(2, "8 bits", num_steps=3)["losses"]
    return {
        "trained": trained,
        "gradients": gradients,
        "bfloat16": curves,
        "loss_curves": short,
        "compiled": compiled,
        "8 bits": eight_bits,
    }


def on_to_step_5_on_one_rank(rank: int, folder: Path) -> Result:
    return {
        **gradients_through_deepspeed(rank, 1, zero_stage=1, accumulation_steps=2, reduction="sum"),
        "history": train(folder.parent / "moved", 5, zero_stage=1),
    }


def on_to_step_6_on_two_ranks(rank: int, folder: Path) -> Result:
    return {"history": train(folder.parent / "moved", 6, zero_stage=3)}


def train(root: Path, last: int, zero_stage: int, offload: str = "none") -> list[tuple[float, float]]:
    """From the latest checkpoint in `root` to step `last`, with a checkpoint after step 3 and at the end."""
    from pipelines.training.engine import (
        Ema,
        begin_save,
        fragments,
        initialize,
        load_optimizer,
        optimizer_step,
        placement,
        set_learning_rate,
    )
    from pipelines.training.saving import latest_on_every_rank

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    config = train_config(zero_stage, offload=offload, num_workers=world_size)
    module, store = network(), FolderStore(str(root))
    with latest_on_every_rank(store) as checkpoint:
        saved = {} if checkpoint is None else checkpoint.shapes
        fill(
            module,
            lambda name: checkpoint.tensor("parameter", name) if name in saved else None,
            placement(config),
        )
        engine = initialize(module, config)
        ema = Ema(EMA_DECAY, fragments(engine))
        if checkpoint is not None:
            load_optimizer(engine, ema, checkpoint)

    history = []
    for step in range(engine.global_steps, last):
        learning_rate = set_learning_rate(engine, config)
        for index in range(config.gradient_accumulation_steps):
            inputs = micro_batch(step, index * world_size + rank)
            engine.backward(loss_of(engine(inputs), inputs))
            norm = optimizer_step(engine)
            assert (norm is None) == (index < config.gradient_accumulation_steps - 1)
        ema.update(step + 1)
        history.append((norm, learning_rate))
        if step + 1 in (3, last):
            begin_save(engine, ema, store, {"name": "test"}).commit(num_to_keep=2)
    return history


def latest(root: Path) -> Checkpoint:
    with FolderStore(str(root)).latest() as checkpoint:
        return checkpoint


def train_in_bare_torch() -> Result:
    """The same six steps in one process: mean gradient, clipping, AdamW, linear warm-up, moving average."""
    module, config = network(), train_config(0)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    rates = [config.learning_rate, config.learning_rate] + [config.backbone_learning_rate] * 2
    groups = [{"params": [value], "rate": rate} for value, rate in zip(trained.values(), rates, strict=True)]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    history, average = [], {name: value.detach().clone() for name, value in trained.items()}
    for step in range(6):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * min(1.0, (step + 1) / 4)
        optimizer.zero_grad()
        for index in range(4):
            inputs = micro_batch(step, index)
            (loss_of(module(inputs), inputs) / 4).backward()
        norm = nn.utils.clip_grad_norm_(trained.values(), config.gradient_clipping)
        optimizer.step()
        history.append((norm.item(), optimizer.param_groups[0]["lr"]))
        decay = min(EMA_DECAY, (step + 2) / (step + 11))
        for name, value in trained.items():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
    return {"parameter": trained, "ema": average, "history": history}


def train_module(
    accumulation_steps: int, backbone_mode: str = "frozen", reduction: Reduction = "mean"
) -> ProPhyTrainModule:
    """A small transformer whose backbone and branch all matter: the injections are not zero."""
    torch.manual_seed(0)
    backbone = WanTransformer3DModel(
        num_attention_heads=2,
        attention_head_dim=12,
        in_channels=4,
        out_channels=4,
        text_dim=16,
        freq_dim=16,
        ffn_dim=32,
        num_layers=2,
        rope_max_seq_len=16,
    )
    transformer = ProPhyWanTransformer3DModel.from_transformer(
        backbone,
        {
            "physics_layers": [0, 1],
            "num_semantic_experts": 4,
            "num_refinement_experts": 4,
            "latent_shape": [3, 4, 4],
            "phenomena": PHENOMENA,
        },
    )
    for parameter in transformer.physics_branch.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    if backbone_mode == "lora":
        transformer.add_lora(rank=2, alpha=4)
    elif backbone_mode == "bfloat16":
        transformer.bfloat16().physics_branch.float()
    transformer.train_backbone(backbone_mode if backbone_mode in ("lora", "full") else "frozen")
    if backbone_mode == "8 bits":
        for layer in stored_layers(transformer):
            layer.weight.data = layer.weight.data.to(torch.float8_e4m3fn).float()
    weights = LossWeights(semantic_alignment=1.0, token_alignment=0.5, load_balancing=1.0)
    return ProPhyTrainModule(
        transformer,
        FlowMatching(3.0),
        {"prompt_embeds": torch.zeros(5, 16)},
        weights,
        reduction,
        "absolute",
        accumulation_steps,
    )


def joint_batch(size: int, seed: int = 3) -> TrainBatch:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.zeros(size, 17)
    labels[torch.arange(size), torch.arange(size) % 3] = 1.0
    labels[:, 5] = 1.0
    return TrainBatch(
        sample_ids=[str(i) for i in range(size)],
        latents=torch.randn(size, 4, 3, 4, 4, generator=generator),
        text={"prompt_embeds": torch.randn(size, 5, 16, generator=generator)},
        drop_caption=torch.arange(size) == 1,
        phenomena=labels,
        target_maps=torch.rand(size, 12, 17, generator=generator),
        target_mask=torch.rand(size, 12, 17, generator=generator) < 0.3,
        noise=torch.randn(size, 4, 3, 4, 4, generator=generator),
        timestep_quantile=torch.rand(size, generator=generator),
        given=torch.zeros(size, dtype=torch.bool),
    )


def curve_config(zero_stage: int, num_steps: int, num_workers: int, precision: str = "fp32") -> TrainConfig:
    """Micro-batches of one sample, four in a step; warm-up, then cosine to zero."""
    values: dict[str, Any] = {"micro_batch_size": 1, "num_workers": num_workers, "global_batch_size": 4}
    values |= {"precision": precision}
    values |= {"num_steps": num_steps, "learning_rate": 1e-3, "lr_schedule": "cosine"}
    return train_config(zero_stage, **values)


def curve_batch(step: int) -> TrainBatch:
    return joint_batch(4, seed=3 + step % 5)


def loss_curve(zero_stage: int, backbone_mode: str, num_steps: int) -> Result:
    """Losses by step, learning rates, and the moving average at the end, through DeepSpeed."""
    from pipelines.training.engine import (
        Ema,
        fragments,
        initialize,
        optimizer_step,
        placement,
        set_learning_rate,
    )

    rank, world_size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    precision = "bf16" if backbone_mode == "bfloat16" else "fp32"
    config = curve_config(zero_stage, num_steps, world_size, precision)
    module = train_module(config.gradient_accumulation_steps, backbone_mode)
    is_compiled = backbone_mode == "compiled"
    if is_compiled or (precision == "bf16" and zero_stage == 3):
        module.transformer.enable_gradient_checkpointing()
    if is_compiled:
        compile_blocks(module.transformer, "aot_eager")
    fill(module, lambda name: None, placement(config))
    engine = initialize(module, config, module.transformer._repeated_blocks if is_compiled else ())
    if backbone_mode == "8 bits":
        keep_in(torch.float8_e4m3fn, module.transformer)
    ema = Ema(EMA_DECAY, fragments(engine))
    losses, rates = [], []
    for step in range(num_steps):
        rates.append(set_learning_rate(engine, config))
        joint = curve_batch(step)
        batches = [one_sample(joint, i) for i in range(rank, 4, world_size)]
        outputs, load, later = [], None, batches[1:]
        for index, batch in enumerate(batches):
            last = index == len(batches) - 1
            outputs.append(engine(batch, SemanticBatch.join(batches) if last else None, load, later))
            load, later = outputs[-1].expert_load, []
            engine.backward(outputs[-1].loss)
            optimizer_step(engine)
        ema.update(step + 1)
        own = torch.stack(
            [torch.stack([o.diffusion, o.token_alignment, o.load_balancing]) for o in outputs]
        ).mean(0)
        torch.distributed.all_reduce(own)
        losses.append(torch.cat([own / world_size, outputs[-1].semantic_alignment[None]]))
    parts: list = [None] * world_size
    averages = [(part.name, part.start, ema.averages[part.name]) for part in fragments(engine)]
    torch.distributed.all_gather_object(parts, averages)
    whole: dict[str, dict[int, torch.Tensor]] = {}
    for name, start, average in (part for own in parts for part in own):
        whole.setdefault(name, {})[start] = average
    ema_values = {name: torch.cat([found[start] for start in sorted(found)]) for name, found in whole.items()}
    return {"losses": torch.stack(losses), "rates": rates, "ema": ema_values}


def loss_curve_of_bare_torch(backbone_mode: str, num_steps: int) -> Result:
    """The same steps in one process, all samples in one batch."""
    config, module = curve_config(0, num_steps, 1), train_module(1, backbone_mode)
    trained = {name: value for name, value in module.named_parameters() if value.requires_grad}
    groups = [
        {"params": [v], "rate": config.learning_rate if "physics_branch" in name else 5e-3}
        for name, v in trained.items()
    ]
    optimizer = torch.optim.AdamW(groups, weight_decay=config.weight_decay)
    steps = torch.arange(num_steps)
    factors = torch.where(
        steps < 4, (steps + 1) / 4, (1 + torch.cos(torch.pi * (steps - 4) / max(num_steps - 4, 1))) / 2
    )
    losses, average = [], {name: value.detach().clone() for name, value in trained.items()}
    for step in range(num_steps):
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * factors[step].item()
        optimizer.zero_grad()
        joint = curve_batch(step)
        output = module(joint, SemanticBatch.join([joint]))
        output.loss.backward()
        nn.utils.clip_grad_norm_(trained.values(), config.gradient_clipping)
        optimizer.step()
        decay = min(EMA_DECAY, (step + 2) / (step + 11))
        for name, value in trained.items():
            average[name] = decay * average[name] + (1 - decay) * value.detach()
        names = ("diffusion", "token_alignment", "load_balancing", "semantic_alignment")
        losses.append(torch.stack([output[name] for name in names]))
    ema = {name: value.flatten() for name, value in average.items()}
    return {"losses": torch.stack(losses), "rates": (config.learning_rate * factors).tolist(), "ema": ema}


def loss_curves(rank: int, folder: Path) -> Result:
    num_steps, modes = torch.load(folder / "task.pt")
    return {(stage, mode): loss_curve(stage, mode, num_steps) for stage in STAGES for mode in modes}


def assert_curves_of_one_process(curves: Result, num_steps: int, modes: tuple[str, ...]) -> None:
    """Two ranks with every ZeRO stage: losses, cosine schedule and moving average as in bare torch."""
    for mode in modes:
        expected = loss_curve_of_bare_torch(mode, num_steps)
        assert expected["losses"][-5:, 0].mean() < expected["losses"][:5, 0].mean()
        for stage in STAGES:
            curve = curves[stage, mode]
            worst = ((curve["losses"] - expected["losses"]).abs() / expected["losses"]).max()
            print(f"ZeRO {stage}, backbone {mode}, {num_steps} steps: losses differ by {worst:.1e} at most")
            torch.testing.assert_close(curve["losses"], expected["losses"], rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(curve["rates"], expected["rates"], rtol=1e-5, atol=1e-9)
            assert curve["ema"].keys() == expected["ema"].keys()
            for name, value in expected["ema"].items():
                torch.testing.assert_close(curve["ema"][name], value, rtol=1e-2, atol=1e-4, msg=name)


def test_compiled_blocks_train_alike_with_zero_3_and_gradient_checkpointing(two_ranks: Result) -> None:
    expected = loss_curve_of_bare_torch("frozen", 3)["losses"]
    print(f"compiled: losses differ by {(two_ranks['compiled'] - expected).abs().max():.1e} at most")
    torch.testing.assert_close(two_ranks["compiled"], expected, rtol=1e-4, atol=1e-5)


def test_a_frozen_backbone_in_8_bits_is_that_of_the_rounded_weights(two_ranks: Result) -> None:
    expected = loss_curve_of_bare_torch("8 bits", 3)["losses"]
    torch.testing.assert_close(two_ranks["8 bits"], expected, rtol=1e-4, atol=1e-5)
    other = loss_curve_of_bare_torch("frozen", 3)["losses"]
    print(f"8 bits: losses differ by {((other - expected).abs() / other).max():.1e} at most")
    assert not torch.equal(other, expected)


def test_loss_curves_are_those_of_one_process(two_ranks: Result) -> None:
    assert_curves_of_one_process(two_ranks["loss_curves"], SHORT, ("lora",))


@pytest.mark.slow
def test_long_loss_curves_are_those_of_one_process(tmp_path: Path) -> None:
    num_steps, modes = 50, ("frozen", "lora", "full")
    torch.save((num_steps, modes), tmp_path / "task.pt")
    assert_curves_of_one_process(on_ranks(2, loss_curves, tmp_path), num_steps, modes)


def one_sample(batch: TrainBatch, index: int) -> TrainBatch:
    chosen = slice(index, index + 1)
    own = {name: value[chosen] for name, value in vars(batch).items() if name != "text"}
    return TrainBatch(text={name: value[chosen] for name, value in batch.text.items()}, **own)


def gradients_through_deepspeed(
    rank: int, world_size: int, zero_stage: int, accumulation_steps: int, reduction: Reduction
) -> Result:
    """Gradients after one step of micro-batches of one sample each."""
    from deepspeed.utils import safe_get_full_grad

    from pipelines.training.engine import initialize

    values = {
        "micro_batch_size": 1,
        "num_workers": world_size,
        "global_batch_size": world_size * accumulation_steps,
    }
    module = train_module(accumulation_steps, reduction=reduction)
    engine = initialize(module, train_config(zero_stage, **values))
    joint = joint_batch(world_size * accumulation_steps)
    batches = [one_sample(joint, index * world_size + rank) for index in range(accumulation_steps)]
    outputs, load, later = [], None, batches[1:]
    for index, batch in enumerate(batches):
        last = index == len(batches) - 1
        outputs.append(engine(batch, SemanticBatch.join(batches) if last else None, load, later))
        load, later = outputs[-1].expert_load, []
        engine.backward(outputs[-1].loss)
        if not last:
            engine.step()
    losses = {name: torch.stack([output[name] for output in outputs]).mean(0) for name in GLOBAL}
    for value in losses.values():
        torch.distributed.all_reduce(value)
        value /= world_size
    gradients = {
        name: safe_get_full_grad(parameter).clone()
        for name, parameter in engine.module.named_parameters()
        if parameter.requires_grad
    }
    losses["semantic_alignment"] = outputs[-1].semantic_alignment
    return {"gradients": gradients, "losses": losses}


def gradients_of_the_joint_batch(size: int, reduction: Reduction) -> Result:
    """The same in one process, bare torch, all samples in one batch."""
    module = train_module(accumulation_steps=1, reduction=reduction)
    joint = joint_batch(size)
    output = module(joint, SemanticBatch.join([joint]))
    output.loss.backward()
    gradients = {
        name: parameter.grad for name, parameter in module.named_parameters() if parameter.requires_grad
    }
    losses = {name: output[name] for name in (*GLOBAL, "semantic_alignment")}
    return {"gradients": gradients, "losses": losses}


def assert_same_gradients(result: Result, expected: Result) -> None:
    torch.testing.assert_close(result["losses"], expected["losses"])
    assert result["gradients"].keys() == expected["gradients"].keys()
    for name, gradient in expected["gradients"].items():
        torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-3, atol=1e-6, msg=name)
    router = [gradient for name, gradient in expected["gradients"].items() if "semantic.router" in name]
    assert all(gradient.abs().max() > 1e-5 for gradient in router)


@pytest.fixture(scope="module")
def ranks_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def two_ranks(ranks_folder: Path) -> Result:
    return on_ranks(2, everything_on_two_ranks, ranks_folder)


def assert_trained_like_bare_torch(checkpoint: Checkpoint, history: list[tuple[float, float]]) -> None:
    expected = train_in_bare_torch()
    assert checkpoint.step == 6 and checkpoint.run == {"name": "test"}
    for kind in ("parameter", "ema"):
        assert checkpoint.shapes.keys() == expected[kind].keys()
        for name, value in expected[kind].items():
            torch.testing.assert_close(checkpoint.tensor(kind, name), value.detach(), rtol=1e-4, atol=1e-5)
    last = torch.tensor(expected["history"][-len(history) :])
    torch.testing.assert_close(torch.tensor(history), last, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_trains_like_bare_torch(two_ranks: Result, ranks_folder: Path, kind: str) -> None:
    assert_trained_like_bare_torch(latest(ranks_folder / kind), two_ranks["trained"][kind][0])


@pytest.mark.parametrize("kind", ENGINES)
def test_every_engine_resumes_exactly(two_ranks: Result, ranks_folder: Path, kind: str) -> None:
    through, resumed = latest(ranks_folder / kind), latest(ranks_folder / f"{kind}-again")
    history, resumed_history = two_ranks["trained"][kind]
    assert resumed_history == history[3:]
    assert resumed.kinds == through.kinds == {"parameter", "exp_avg", "exp_avg_sq", "ema"}
    for name in through.shapes:
        for tensors in through.kinds:
            assert torch.equal(resumed.tensor(tensors, name), through.tensor(tensors, name))


def test_other_numbers_of_ranks_and_stages_go_on_alike(
    two_ranks: Result, ranks_folder: Path, tmp_path: Path
) -> None:
    """Three steps on two ranks with ZeRO 2, two on one with ZeRO 1, the last on two with ZeRO 3."""
    shutil.copytree(ranks_folder / "zero2" / "step-00000003", tmp_path / "moved" / "step-00000003")
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
    result = on_ranks(1, on_to_step_5_on_one_rank, tmp_path / "one")
    history = result["history"] + on_ranks(2, on_to_step_6_on_two_ranks, tmp_path / "two")["history"]
    assert_trained_like_bare_torch(latest(tmp_path / "moved"), history)
    assert_same_gradients(result, gradients_of_the_joint_batch(2, "sum"))


def test_zero_3_trains_a_branch_on_a_checkpointed_bfloat16_backbone(two_ranks: Result) -> None:
    """As ZeRO 1 does without checkpointing: the configuration of the largest backbone."""
    curves = two_ranks["bfloat16"]
    if not curves:
        pytest.skip("this CPU has no bfloat16")
    assert curves[1].unique().numel() > 6
    torch.testing.assert_close(curves[3], curves[1], rtol=1e-2, atol=1e-4)


@pytest.mark.parametrize("zero_stage", STAGES)
@pytest.mark.parametrize("accumulation_steps", [1, 2])
def test_gradient_of_two_ranks_is_that_of_the_joint_batch(
    two_ranks: Result, zero_stage: int, accumulation_steps: int
) -> None:
    result = two_ranks["gradients"][zero_stage, accumulation_steps]
    assert_same_gradients(
        result, gradients_of_the_joint_batch(2 * accumulation_steps, REDUCTIONS[zero_stage])
    )


def test_buffers_move_and_parameters_stay() -> None:
    """ZeRO 3 has its shards where they belong before DeepSpeed sees the module, which then moves nothing."""
    from pipelines.training.engine import move_buffers

    module = train_module(accumulation_steps=1)
    saved = set(module.state_dict())
    move_buffers(module, torch.device("meta"))
    buffers = dict(module.named_buffers())
    assert {"null_text.prompt_embeds", "transformer.rope.freqs_cos", "transformer.rope.freqs_sin"} <= set(
        buffers
    )
    assert all(buffer.is_meta for buffer in buffers.values())
    assert not any(parameter.is_meta for parameter in module.parameters())
    assert set(module.state_dict()) == saved
