"""Rows of frames, and pictures made of them."""

import numpy as np

from prophy.sheets import evenly, film_sheet, side_by_side


def test_a_row_begins_and_ends_with_the_video() -> None:
    frames = np.arange(9, dtype=np.uint8)[:, None, None, None] * np.ones((1, 4, 6, 3), np.uint8)
    strip = side_by_side(evenly(frames, columns=3, scale=2))
    assert strip.shape == (8, 36, 3)
    assert [strip[0, x, 0] for x in (0, 12, 24)] == [0, 4, 8]


def test_a_sheet_has_a_row_for_each_video_under_its_caption() -> None:
    videos = [
        ("white", np.full((5, 4, 40, 3), 255, np.uint8)),
        ("grey", np.full((3, 4, 60, 3), 99, np.uint8)),
    ]
    sheet = np.asarray(film_sheet(videos, columns=2, scale=1))
    height = sheet.shape[0] // 2
    assert sheet.shape == (2 * height, 120, 3) and height > 4
    assert (sheet[height - 4 : height, :80] == 255).all()
    assert (sheet[-4:] == 99).all()
    assert sheet[height : 2 * height - 4].any(), "no caption"
