"""`prophy evaluate`: what is compared, and on what."""

from typing import Annotated, Literal, Self

from pydantic import BeforeValidator, Field, PositiveInt, model_validator

from pipelines.config.base import (
    BranchFolder,
    LocalPath,
    Location,
    NonNegativeInt,
    PoolConfig,
    Pretrained,
    Section,
)

Factor = Annotated[float, Field(ge=0.0, le=10.0)]
Measure = Literal["loss", "captions", "laws", "routing", "videos"]
"""What is measured, see `EvaluateConfig.measures`."""


def _names(contestants: object) -> object:
    for name in contestants if isinstance(contestants, dict) else ():
        if not isinstance(name, str) or not name.strip():
            raise ValueError(
                f"a contestant is called {name!r}; give it a name in quotes, since YAML reads on, off, "
                "yes, no and numbers otherwise"
            )
    return contestants


class Contestant(Section):
    """A model with its knobs."""

    checkpoint: BranchFolder | None = None
    """A trained branch or adapter: a folder, also in S3, that `prophy train` or `export` wrote, or a run_dir.

    Of a run_dir it is the newest checkpoint, also while it trains; the log says its step. 'tiny' is the
    embedded branch, null the backbone alone.
    """

    pretrained: Pretrained | None = None
    """Another backbone of backbone.family, such as a complete export. Null: backbone.pretrained."""

    scale: Factor = 1.0
    """Factor on all that the branch adds; 0 switches it off."""

    strength: dict[str, Factor] = Field({})
    """Factor per phenomenon on what the refinement experts add where it acts. By default none is changed."""

    invert_refinement: bool = False
    """Route tokens to the refinement experts that fit them least."""


class EvaluateConfig(Section):
    """The comparison of contestants on the same clips, prompts, seeds and noise."""

    output: LocalPath
    """Folder of scores, videos and report. By default `evaluation` in run_dir."""

    contestants: Annotated[dict[str, Contestant], BeforeValidator(_names)] = Field({})
    """What is compared, by name; the others are compared with the first.

    By default the model of `checkpoint` with its branch off, and on.
    """

    measures: list[Measure] = Field(["loss", "captions", "laws", "routing", "videos"])
    """What is measured. All but videos takes seconds a clip at most: nothing is generated.

    loss: how well clips are denoised that were never trained on, by level of noise, inside and outside the
    maps. captions: whether the right caption denoises a clip better than one with something wrong. laws:
    whether a clip denoises better than its twin that breaks a law. routing: whether the branch's maps are
    where a phenomenon is. videos: generated ones against the simulator; they alone are made with
    backbone.storage_dtype. Their judge simulates some 900 examples first and keeps them for the next run:
    20 s and 20 MB at 64 pixels, but half an hour and some GB in each actor at 480.
    """

    clips: Literal["sandbox", "cache"] = "sandbox"
    """Clips to denoise: new simulated ones of combinations that are never trained, or those of the cache.

    Of the cache it is train.num_held_out videos, or any where that is 0. The sandbox needs square frames.
    """

    num_clips: PositiveInt = 32
    """Clips for loss, captions and routing. 32 see a change of the loss of about 1 %.

    Those of the cache are of as many videos as it has; what is counted are videos, since clips of one are
    alike.
    """

    clips_per_law: NonNegativeInt = 8
    """Pairs for each law that the sandbox can break, over its scenes; below 6 there is no figure."""

    pairs: Location | None = None
    """A list of your own pairs: `path` and `caption`, and `wrong_caption` or `wrong_path` beside them.

    `wrong_path` is a video that breaks a law; `kind` names the group that a pair is counted in. Parquet, CSV
    or JSON Lines. By default there is none.
    """

    noise_levels: Annotated[list[Annotated[float, Field(gt=0.0, le=1.0)]], Field(min_length=1)] = Field(
        [0.6, 0.9, 0.99]
    )
    """Levels of noise, as shares of the last timestep. At .6 a clip shows its motion, at .99 only the text
    says what is where."""

    num_prompts: PositiveInt = 24
    """Prompts of videos, of combinations that are never trained: things alone, pairs and falls in turn."""

    shown: NonNegativeInt = 4
    """Videos of each contestant beside the first's in the report: half its largest wins, half losses.

    Of an odd number there is one more win.
    """

    batch_size: PositiveInt = 8
    """Clips denoised, or videos made, at once. A smaller one takes less memory."""

    pool: PoolConfig = PoolConfig()
    """Actors that hold a model each."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.measures:
            raise ValueError("measures is empty; name at least one")
        return self
