"""Which frames a token of a video model holds: the VAEs are causal, and encode the first frame alone."""

from typing import Literal

Cells = Literal["tokens", "slices"]
"""What a map's cells in time are: tokens of a video model, or even slices of the clip, as of a VLM's maps."""


def token_frames(num_tokens: int, num_frames: int) -> list[range]:
    """The frames of each token in time: the first holds frame 0 alone, each other the next c.

    Args:
        num_tokens: tokens in time, T'.
        num_frames: frames of the video, `1 + c (T' - 1)`.
    """
    each, rest = divmod(num_frames - 1, max(num_tokens - 1, 1))
    assert not rest and (num_tokens > 1 or num_frames == 1), f"{num_frames} frames, {num_tokens} tokens"
    starts = range(1, num_frames, each or 1)
    return [range(1), *(range(start, start + each) for start in starts)]


def token_centres(num_tokens: int, num_frames: int) -> list[float]:
    """The middle of each token's frames, in frames. The arguments are those of `token_frames`."""
    return [(frames[0] + frames[-1]) / 2 for frames in token_frames(num_tokens, num_frames)]
