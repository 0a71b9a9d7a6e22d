"""Maps against masks."""

import numpy as np
import pytest

from prophy.evaluation.localization import localization_auroc, mask_on_grid


def test_mask_on_grid_counts_shares_of_cells() -> None:
    mask = np.zeros((2, 8, 8), bool)
    mask[0, 0, 0] = True  # 1 of 32 pixels of its cell: too little
    mask[:, 4:8, 0:4] = True
    np.testing.assert_array_equal(mask_on_grid(mask, (1, 2, 2)), [[[False, False], [True, False]]])


def test_perfect_reversed_and_constant_maps() -> None:
    mask = np.zeros((4, 8, 8), bool)
    mask[:, :4, :4] = True
    exact = mask_on_grid(mask, (4, 8, 8)).astype(float)
    fire = "combustion"
    assert localization_auroc({fire: exact}, {fire: mask}) == {fire: 1.0}
    assert localization_auroc({fire: -exact}, {fire: mask}) == {fire: 0.0}
    assert localization_auroc({fire: exact * 0}, {fire: mask})[fire] == pytest.approx(0.5)


def test_only_pairs_that_can_be_scored() -> None:
    everywhere = {
        "combustion": np.ones((1, 4, 4), bool),
        "collision": np.ones((1, 4, 4), bool),
    }
    assert localization_auroc({"combustion": np.random.rand(1, 4, 4)}, everywhere) == {}
