"""The name of what priors depend on. Imports no networks."""

import hashlib
import json

from prophy.priors.questionnaire import questionnaire
from prophy.taxonomy import Taxonomy

EXTRACTION_VERSION = 1  # raise it when the same model and questions would give other maps or answers


def priors_fingerprint(
    taxonomy: Taxonomy,
    *,
    model: str,
    dtype: str,
    layers: list[int] | None,
    heads: list[int] | None,
    max_new_tokens: int,
    num_frames: int,
    shapes: list[list[int]],
    video_frames: int,
) -> str:
    """Names everything that the priors of a clip depend on, besides the clip: sha256 in hexadecimal.

    Args:
        taxonomy: what the VLM is asked for.
        model: fingerprint of the VLM's files or its resolved commit.
        dtype: precision of the VLM.
        layers: as given to `PriorExtractor`.
        heads: as given to `PriorExtractor`.
        max_new_tokens: as given to `PriorExtractor`.
        num_frames: frames that the VLM sees.
        shapes: (height, width) in pixels that these frames may have.
        video_frames: `prophy.video.FRAMES_VERSION`, by which they were read.
    """
    parts = {
        "version": EXTRACTION_VERSION,
        "questions": [[question.id, question.text] for question in questionnaire(taxonomy)],
        "model": model,
        "dtype": dtype,
        "layers": layers,
        "heads": heads,
        "max_new_tokens": max_new_tokens,
        "frames": [num_frames, *shapes, video_frames],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()
