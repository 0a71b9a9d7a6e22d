"""Maps against masks."""

import numpy as np
import pytest

from prophy.evaluation.localization import localization_auroc, mask_on_grid


def test_mask_on_grid_counts_shares_of_cells() -> None:
    mask = np.zeros((2, 8, 8), bool)
    mask[0, 0, 0] = True  # 1 of 32 pixels of its cell: too little
    mask[:, 4:8, 0:4] = True
    np.testing.assert_array_equal(mask_on_grid(mask, (1, 2, 2), "slices"), [[[False, False], [True, False]]])


def test_perfect_reversed_and_constant_maps() -> None:
    mask = np.zeros((4, 8, 8), bool)
    mask[:, :4, :4] = True
    exact = mask_on_grid(mask, (4, 8, 8), "slices").astype(float)
    fire = "combustion"
    assert localization_auroc({fire: exact}, {fire: mask}, "slices") == {fire: 1.0}
    assert localization_auroc({fire: -exact}, {fire: mask}, "slices") == {fire: 0.0}
    assert localization_auroc({fire: exact * 0}, {fire: mask}, "slices")[fire] == pytest.approx(0.5)


@pytest.mark.parametrize(("num_tokens", "num_frames"), [(5, 17), (21, 81), (11, 81), (1, 1)])
def test_a_mask_on_tokens_is_that_of_their_frames(num_tokens: int, num_frames: int) -> None:
    """The first holds frame 0 alone, each other the next 4, or 8 of CogVideoX 1.5: never even slices."""
    each = (num_frames - 1) // max(num_tokens - 1, 1)
    for frame in range(num_frames):
        mask = np.zeros((num_frames, 2, 2), bool)
        mask[frame] = True
        inside = mask_on_grid(mask, (num_tokens, 1, 1), "tokens")
        token = 0 if frame == 0 else 1 + (frame - 1) // each
        assert inside.ravel().nonzero()[0].tolist() == [token]


def test_an_exact_map_of_tokens_scores_one() -> None:
    mask = np.zeros((17, 4, 4), bool)
    mask[1:9, :2, :2] = True
    exact = np.zeros((5, 2, 2))
    exact[1:3, 0, 0] = 1.0
    assert localization_auroc({"collision": exact}, {"collision": mask}, "tokens") == {"collision": 1.0}


def test_only_pairs_that_can_be_scored() -> None:
    everywhere = {
        "combustion": np.ones((1, 4, 4), bool),
        "collision": np.ones((1, 4, 4), bool),
    }
    assert localization_auroc({"combustion": np.random.rand(1, 4, 4)}, everywhere, "slices") == {}
