"""The names of what turns raw maps into targets; `grounding` holds what they do.

Apart from it, since a configuration is checked without importing torch.
"""

from itertools import product
from typing import Literal

SUBTRACTIONS = ("none", "minus_background", "minus_mean", "minus_others")
"""What is subtracted from a phenomenon's map; `minus_background` is the paper's."""

RECIPE_NAMES = tuple(
    subtraction + blur + motion
    for motion, blur, subtraction in product(("", "_motion"), ("", "_blur"), SUBTRACTIONS)
)
"""A subtraction, then `_blur` and `_motion` where they are applied."""

Negatives = Literal["ignore", "zero", "all"]
"""What tokens outside a phenomenon's map say: nothing, or "not here"; or that of absent phenomena too."""
