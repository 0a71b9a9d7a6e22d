"""Anti-aliased drawing of all frames of a clip at once, by distance fields. Knows nothing of physics.

A shape is its signed distance in metres, negative inside, as an array `[T or 1, h, w]`; shapes are joined
with `np.minimum`, cut with `np.maximum`, and painted by how much of each pixel they cover. A length that may
change with time is a scalar or an array `[T]`.
"""

from dataclasses import dataclass, field
from typing import TypeAlias

import numpy as np

Length: TypeAlias = "float | np.ndarray"
Colour: TypeAlias = "tuple[float, float, float]"

WORLD_M = 10.0
"""Height and width of the whole frame in metres."""

FLOOR_M = 1.0
"""Height of every floor."""

BACKGROUND = (12.0, 80.0)
"""Darkest and brightest value of any channel of a background."""

COLOURS: dict[str, Colour] = {
    "red": (228, 40, 44),
    "yellow": (250, 220, 50),
    "green": (56, 190, 70),
    "turquoise": (40, 210, 214),
    "blue": (52, 92, 236),
    "purple": (160, 60, 214),
}
"""RGB of each colour that a caption can name."""

WHITE: Colour = (240, 240, 240)
GREY: Colour = (128, 128, 132)
DARK: Colour = (58, 58, 64)
ICE: Colour = (205, 226, 240)


def mix(a: Colour, b: Colour, share: float) -> Colour:
    """The colour between `a` (share 0) and `b` (share 1)."""
    red, green, blue = ((1 - share) * x + share * y for x, y in zip(a, b, strict=True))
    return red, green, blue


def over_time(value: Length) -> np.ndarray:
    """A length as `[T or 1, 1, 1]`."""
    return np.asarray(value, np.float32).reshape(-1, 1, 1)


@dataclass
class Canvas:
    """The part of the frames in which one scene happens.

    The origin is in the middle of the part's lower edge, x to the right, y up.

    Attributes:
        frames: RGB float32 `[T, h, w, 3]`, 0 to 255; painted in place.
        times_s: when each frame is, `[T]`.
        pixels_per_m: scale.
        mask: bool `[T, h, w]`: where the phenomenon happens.
    """

    frames: np.ndarray
    times_s: np.ndarray
    pixels_per_m: float
    mask: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.mask = np.zeros(self.frames.shape[:3], bool)
        height, width = self.frames.shape[1:3]
        self.x = ((np.arange(width, dtype=np.float32) + 0.5 - width / 2) / self.pixels_per_m)[None, None, :]
        self.y = ((height - np.arange(height, dtype=np.float32) - 0.5) / self.pixels_per_m)[None, :, None]

    @property
    def half_width(self) -> float:
        """Metres from the middle to either side."""
        return self.frames.shape[2] / self.pixels_per_m / 2

    def disc(self, x: Length, y: Length, radius: Length) -> np.ndarray:
        """Distance to a disc."""
        return np.hypot(self.x - over_time(x), self.y - over_time(y)) - over_time(radius)

    def ellipse(self, x: Length, y: Length, half_width: Length, half_height: Length) -> np.ndarray:
        """Distance to an ellipse, to first order."""
        a, b = over_time(half_width), over_time(half_height)
        u, v = (self.x - over_time(x)) / a, (self.y - over_time(y)) / b
        return (u * u + v * v - 1) / (2 * np.hypot(u / a, v / b) + 1e-6)

    def box(
        self, left: Length, right: Length, bottom: Length, top: Length, rounding: Length = 0.0
    ) -> np.ndarray:
        """Distance to an upright rectangle whose corners are rounded with radius `rounding`."""
        radius = over_time(rounding)
        horizontal = np.maximum(over_time(left) - self.x, self.x - over_time(right)) + radius
        vertical = np.maximum(over_time(bottom) - self.y, self.y - over_time(top)) + radius
        outside = np.hypot(np.maximum(horizontal, 0), np.maximum(vertical, 0))
        return outside + np.minimum(np.maximum(horizontal, vertical), 0) - radius

    def line(self, start: tuple[Length, Length], end: tuple[Length, Length], thickness: Length) -> np.ndarray:
        """Distance to a line with round ends."""
        (x0, y0), (x1, y1) = (tuple(map(over_time, point)) for point in (start, end))
        along_x, along_y = x1 - x0, y1 - y0
        squared = np.maximum(along_x**2 + along_y**2, 1e-9)
        share = np.clip(((self.x - x0) * along_x + (self.y - y0) * along_y) / squared, 0, 1)
        nearest = np.hypot(self.x - x0 - share * along_x, self.y - y0 - share * along_y)
        return nearest - over_time(thickness) / 2

    def blobs(self, points: np.ndarray, width: Length, height: Length, amount: Length = 1.0) -> np.ndarray:
        """Sum of Gaussian blobs, `[T, h, w]`.

        Args:
            points: centres `[T, N, 2]`.
            width: standard deviation in x, a scalar or `[T, N]`.
            height: standard deviation in y, a scalar or `[T, N]`.
            amount: peak of each blob, a scalar or `[T, N]`.
        """
        points = points.astype(np.float32)
        width, height, amount = (
            np.broadcast_to(np.float32(value), points.shape[:2])[..., None]
            for value in (width, height, amount)
        )
        across = amount * np.exp(-0.5 * ((self.x - points[..., :1]) / width) ** 2)
        up = np.exp(-0.5 * ((self.y[..., 0][:, None] - points[..., 1:]) / height) ** 2)
        return up.swapaxes(1, 2) @ across

    def cover(self, distance: np.ndarray) -> np.ndarray:
        """How much of each pixel a shape covers, 0 to 1."""
        return np.clip(0.5 - distance * np.float32(self.pixels_per_m), 0, 1)

    def paint(
        self, distance: np.ndarray, colour: Colour, opacity: Length = 1.0, masked: bool = False
    ) -> None:
        """Paints a shape; `masked` says that the phenomenon happens there."""
        self.blend(self.cover(distance) * over_time(opacity), colour)
        if masked:
            self.mask |= (distance < 0) & (over_time(opacity) > 0)

    def blend(self, opacity: np.ndarray, colour: Colour, masked_above: float | None = None) -> None:
        """Lays a colour over the frames with the given opacity `[T or 1, h, w]`, each 0 to 1."""
        self.frames += opacity[..., None] * (np.asarray(colour, np.float32) - self.frames)
        if masked_above is not None:
            self.mask |= opacity > masked_above

    def share_up(self, bottom: Length, top: Length) -> np.ndarray:
        """How far up between two heights each row is: 0 at the bottom and below, 1 at the top and above."""
        low = over_time(bottom)
        return np.clip((self.y - low) / (over_time(top) - low), 0, 1)

    def floor(self) -> None:
        """Paints the floor."""
        self.paint(self.box(-WORLD_M, WORLD_M, -1, FLOOR_M), GREY)

    def tank(self, half_width: float, top: float) -> None:
        """Paints two walls and a floor around `x` from `-half_width` to `half_width`, open above."""
        inside = self.box(-half_width, half_width, FLOOR_M, WORLD_M + 1)
        self.paint(
            np.maximum(self.box(-half_width - 0.3, half_width + 0.3, FLOOR_M - 0.4, top), -inside), GREY
        )
