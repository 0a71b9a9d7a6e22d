"""Operations against what the architecture says on paper, and activations against what autograd keeps."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from prophy.models.transformer_wan import ProPhyWanTransformer3DModel
from prophy.training.cost import count_flops, count_forward_flops, count_saved_bytes
from tests.wisa import PHENOMENA

LATENTS, TEXT, BATCH_SIZE = (16, 5, 16, 16), {"prompt_embeds": (64, 256)}, 2
N, D, F, L = 5 * 8 * 8, 768, 3072, 64  # tokens and widths
NUM_LAYERS, TOP_K = 4, 2


@pytest.fixture
def transformer() -> ProPhyWanTransformer3DModel:
    with torch.device("meta"):
        return ProPhyWanTransformer3DModel(
            num_attention_heads=12,
            attention_head_dim=64,
            ffn_dim=F,
            num_layers=NUM_LAYERS,
            text_dim=256,
            freq_dim=64,
            physics={
                "physics_layers": [1, 3],
                "top_k": TOP_K,
                "latent_shape": LATENTS[1:],
                "phenomena": PHENOMENA,
            },
        )


def product(rows: int, width: int, columns: int) -> int:
    return BATCH_SIZE * 2 * rows * width * columns


SELF_ATTENTION = 2 * product(N, D, N)  # scores, and the sum of values
CROSS_ATTENTION = 2 * product(N, D, L)
TEXT_PROJECTIONS = 2 * product(L, D, D)  # keys and values
TOKEN_PROJECTIONS = 6 * product(N, D, D) + 2 * product(N, D, F)  # q, k, v, out; q, out; feed-forward
BLOCK = TOKEN_PROJECTIONS + TEXT_PROJECTIONS + SELF_ATTENTION + CROSS_ATTENTION
BRANCH = 2 * BLOCK + (3 + TOP_K) * product(N, D, D)  # blocks; their and the refinement's injection; experts


def test_operations_where_all_is_trained(transformer: ProPhyWanTransformer3DModel) -> None:
    counted = count_flops(transformer, BATCH_SIZE, LATENTS, TEXT)
    assert counted == pytest.approx(3 * (NUM_LAYERS * BLOCK + BRANCH), rel=0.01)


def test_operations_with_a_frozen_backbone(transformer: ProPhyWanTransformer3DModel) -> None:
    """Behind the first injection it passes gradients on to its tokens; text and weights get none."""
    transformer.train_backbone("frozen")
    backward = (NUM_LAYERS - 2) * (TOKEN_PROJECTIONS + 2 * SELF_ATTENTION + CROSS_ATTENTION)
    text = 2 * TEXT_PROJECTIONS  # of the branch: gradients of weights alone
    expected = NUM_LAYERS * BLOCK + backward + 3 * BRANCH - text / 2
    assert count_flops(transformer, BATCH_SIZE, LATENTS, TEXT) == pytest.approx(expected, rel=0.005)


def test_checkpointing_and_batch_do_not_matter(transformer: ProPhyWanTransformer3DModel) -> None:
    expected = count_flops(transformer, 1, LATENTS, TEXT)
    transformer.enable_gradient_checkpointing()
    assert count_flops(transformer, BATCH_SIZE, LATENTS, TEXT) == 2 * expected
    assert transformer.is_gradient_checkpointing


def test_routing_ahead_runs_the_branch_alone_or_all_where_it_has_no_blocks(
    transformer: ProPhyWanTransformer3DModel,
) -> None:
    routing = count_forward_flops(transformer, BATCH_SIZE, LATENTS, TEXT, method="route")
    assert routing == pytest.approx(BRANCH, rel=0.02)
    physics = transformer.config.physics | {"physical_blocks": False}
    with torch.device("meta"):
        without = ProPhyWanTransformer3DModel.from_config({**transformer.config, "physics": physics})
    whole = count_flops(without, BATCH_SIZE, LATENTS, TEXT)
    routing = count_forward_flops(without, BATCH_SIZE, LATENTS, TEXT, method="route")
    assert routing == pytest.approx(whole / 3, rel=0.01)
    assert count_forward_flops(without, BATCH_SIZE, LATENTS, TEXT) == pytest.approx(whole / 3, rel=0.01)


def test_activations_are_those_that_autograd_keeps() -> None:
    transformer = ProPhyWanTransformer3DModel(
        num_attention_heads=4,
        attention_head_dim=24,
        ffn_dim=192,
        num_layers=2,
        text_dim=16,
        freq_dim=16,
        rope_max_seq_len=32,
        physics={"physics_layers": [0, 1], "latent_shape": LATENTS[1:], "phenomena": PHENOMENA},
    ).to(torch.bfloat16)
    transformer.train_backbone("frozen")
    kept: dict[int, torch.Tensor] = {}

    def pack(value: torch.Tensor) -> torch.Tensor:
        if value.grad_fn is not None:
            kept[value.untyped_storage().data_ptr()] = value
        return value

    with saved_tensors_hooks(pack, lambda value: value):
        transformer.predict(
            torch.randn(1, *LATENTS, dtype=torch.bfloat16),
            torch.full((1,), 500.0),
            {"prompt_embeds": torch.randn(1, 8, 16, dtype=torch.bfloat16)},
        )
    expected = sum(value.untyped_storage().nbytes() for value in kept.values())
    assert count_saved_bytes(transformer, 1, LATENTS, {"prompt_embeds": (8, 16)}) == pytest.approx(
        expected, rel=0.02
    )
