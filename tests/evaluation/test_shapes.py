import numpy as np

from prophy.evaluation.shapes import drawn, shape_iou
from prophy.sandbox import SCENES, Part, play_parts

SCENE = {scene.name: scene for scene in SCENES}
TANK, CANDLE = Part(SCENE["freezing_tank"], "red", "left"), Part(SCENE["candle"], "blue", "right")


def true(*parts: Part) -> np.ndarray:
    return play_parts(parts, np.random.default_rng(77), num_frames=9, fps=8.0, size=64).frames


def test_a_true_clip_has_the_shape_of_what_it_shows_and_of_nothing_else() -> None:
    frames = true(TANK, CANDLE)
    own = shape_iou(frames, [TANK, CANDLE], 8.0)
    swapped = [Part(TANK.scene, "red", "right"), Part(CANDLE.scene, "blue", "left")]
    assert own > 0.6
    assert shape_iou(frames, swapped, 8.0) < own - 0.2
    assert shape_iou(frames, [TANK], 8.0) < own - 0.1


def test_colour_plays_no_part_and_an_empty_video_has_no_shape() -> None:
    frames = true(CANDLE)
    green = Part(CANDLE.scene, "green", "right")
    assert abs(shape_iou(frames, [CANDLE], 8.0) - shape_iou(frames, [green], 8.0)) < 0.02
    empty = np.full_like(frames, 30)
    assert not drawn(empty).any()
    assert shape_iou(empty, [CANDLE], 8.0) == 0
