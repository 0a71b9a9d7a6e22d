"""What videos are made of in a comparison: prompts whose truth the sandbox knows. Imports torch."""

from pipelines.config import Config
from pipelines.generation.generate import video_spec
from pipelines.generation.spec import VideoSpec
from prophy.errors import ProPhyError
from prophy.evaluation.generated import Request, fall_requests, held_out_requests
from prophy.sandbox import FEWEST_FRAMES

_FALLS = 240  # of which more prompts take the same first ones
_STRIDE = 7  # prime to the numbers of held-out combinations: neighbours are of different phenomena


def requests_of(config: Config) -> list[Request]:
    """Things alone, pairs and falls in turn, each kind spread over all that there are.

    Raises:
        ProPhyError: the frames are not square, or there is only one.
    """
    backbone, number = config.backbone, config.evaluate.num_prompts
    if backbone.height != backbone.width:
        raise ProPhyError(
            f"videos are held against square simulations, and the backbone's are {backbone.width}x"
            f"{backbone.height}; set backbone.height and backbone.width to one value, and "
            "backbone.aspect_buckets to null, or leave videos out of evaluate.measures"
        )
    if backbone.num_frames < FEWEST_FRAMES:
        raise ProPhyError(
            "videos are held against simulations of what happens, and backbone.num_frames is 1; raise it, or "
            "leave videos out of evaluate.measures"
        )
    held_out = held_out_requests(wordings=3)
    kinds = [[request for request in held_out if len(request.parts) == parts] for parts in (1, 2)]
    kinds.append(fall_requests(_FALLS))
    spread = [_spread(kind) for kind in kinds]
    most = 3 * min(len(kind) for kind in spread[:2])
    if number > most:
        raise ProPhyError(f"evaluate.num_prompts is {number}, and there are {most} such prompts; lower it")
    return [spread[index % 3][index // 3] for index in range(number)]


def _spread(requests: list[Request]) -> list[Request]:
    return [requests[index * _STRIDE % len(requests)] for index in range(len(requests))]


def unit_of(request: Request) -> str:
    """A prompt and its seed: what is counted."""
    return f"{request.prompt} (seed {request.seed})"


def spec_of(config: Config, request: Request) -> VideoSpec:
    """The video of a request as `prophy generate` would make it, with its own seed."""
    return video_spec(config, request.prompt).model_copy(update={"seed": request.seed})
