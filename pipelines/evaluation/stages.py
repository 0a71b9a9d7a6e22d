"""The row callables of a comparison: encode what is denoised, denoise it. They know nothing of Ray.

Each writes a file that is there in whole or not at all, named after all that decides it.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save

from pipelines.actors import told_by_the_first_call
from pipelines.caching.stages import decoder, video_encoder
from pipelines.caching.video_files import LocalFiles
from pipelines.config import Config, VideoLimits
from pipelines.evaluation.contestants import Entrant
from pipelines.evaluation.items import Clip, Item
from pipelines.evaluation.tables import score, whole_file, write_scores
from pipelines.generation.limits import check_same_model
from prophy.backbones.families import FAMILIES
from prophy.backbones.loading import load_pipeline
from prophy.backbones.placement import Placement
from prophy.device import default_device
from prophy.errors import ProPhyError
from prophy.evaluation.comparison import SEMANTIC_WEIGHT
from prophy.evaluation.denoising import Answer, Denoiser, Question, bare_branch
from prophy.evaluation.localization import discrimination_auroc, localization_auroc, mask_on_grid
from prophy.models.control import PhysicsControl
from prophy.models.physics_transformer import PhysicsTransformer
from prophy.models.stored import local_folder
from prophy.priors.grounding import make_targets
from prophy.sandbox import SCENES, Law, Part, SimulatedClip, play_parts
from prophy.training.cache import PriorCache
from prophy.training.data import ClipShape
from prophy.video import VideoError

_INSIDE = 0.5  # a cell is inside a map of the cache where its target, 0 to 1, is at least this


@dataclass(frozen=True)
class Inputs:
    """The tensors of an item.

    Attributes:
        latents: `[C, T, H, W]`; None of a caption alone.
        text: the caption, encoded.
        wrong: latents and text of each wrong thing; the right one's where that is not wrong.
        masks: per phenomenon its cells, bool `[T', H', W']`.
    """

    latents: torch.Tensor | None
    text: dict[str, torch.Tensor]
    wrong: list[tuple[torch.Tensor, dict[str, torch.Tensor]]]
    masks: dict[str, np.ndarray]


@told_by_the_first_call
class EncodeItems:
    """Row callable `{"items", "paths"}` -> `{"paths"}`: holds VAE and text encoder, writes items' tensors.

    Args:
        config: the run, with the backbone whose encoders are held.
        shape: the shape of its clips.
    """

    def __init__(self, config: Config, shape: ClipShape) -> None:
        backbone = self._backbone = config.backbone
        self._shape = shape
        self._encoder = video_encoder(backbone)
        limits = VideoLimits()
        self._files, self._decoder = LocalFiles(limits.max_bytes), decoder(limits)

    def __call__(self, row: dict[str, list[str]]) -> dict[str, list[str]]:
        """Encodes a batch of items, and leaves out what is there."""
        for item, path in zip(row["items"], row["paths"], strict=True):
            if not Path(path).exists():
                self._encode(Item.model_validate_json(item), Path(path))
        return {"paths": row["paths"]}

    def _encode(self, item: Item, path: Path) -> None:
        tensors: dict[str, torch.Tensor] = {}
        assert item.caption is not None
        captions = [item.caption, *(wrong.caption for wrong in item.wrong if wrong.caption is not None)]
        text = self._encoder.encode_text(captions)
        names = ["text", *(f"wrong.{i}.text" for i, wrong in enumerate(item.wrong) if wrong.caption)]
        for index, place in enumerate(names):
            tensors |= {f"{place}.{name}": value[index] for name, value in text.items()}
        clips = {} if item.clip is None else {"latents": item.clip}
        clips |= {f"wrong.{i}.latents": wrong.clip for i, wrong in enumerate(item.wrong) if wrong.clip}
        if clips:
            latents = self._encoder.encode_video(np.stack([self._frames(clip) for clip in clips.values()]))
            tensors |= dict(zip(clips, latents, strict=True))
        if item.clip is not None and item.clip.parts:
            masks = self._simulate(item.clip).masks
            tensors |= {
                f"mask.{name}": torch.from_numpy(mask_on_grid(mask, self._shape.token_grid, "tokens"))
                for name, mask in masks.items()
            }
        content = save({name: value.contiguous().clone() for name, value in tensors.items()})
        with whole_file(path) as partial:
            partial.write_bytes(content)

    def _frames(self, clip: Clip) -> np.ndarray:
        if clip.parts:
            return self._simulate(clip).frames
        assert clip.path is not None
        backbone, seconds = self._backbone, (self._backbone.num_frames - 1) / self._backbone.fps
        size = (backbone.num_frames, backbone.height, backbone.width)
        try:
            with self._files.open(clip.path) as path:
                return self._decoder.read_frames(
                    path, 0.0, seconds, *size, aspect_ratio=backbone.width / backbone.height
                )
        except (VideoError, OSError) as error:
            raise ProPhyError(
                f"the video {clip.path} of evaluate.pairs cannot be read: {error}; mend or remove its row"
            ) from None

    def _simulate(self, clip: Clip) -> SimulatedClip:
        scenes = {scene.name: scene for scene in SCENES}
        backbone = self._backbone
        return play_parts(
            tuple(Part(scenes[name], colour, side) for name, colour, side in clip.parts),
            np.random.default_rng(clip.seed),
            num_frames=backbone.num_frames,
            fps=backbone.fps,
            size=backbone.height,
            broken=None if clip.broken is None else Law(clip.broken),
        )


@told_by_the_first_call
class DenoiseItems:
    """Row callable `{"entrant", "items", "encodings", "path"}` -> `{"path"}`: holds a model, writes scores.

    Args:
        config: the run.
        entrants: what is compared.
        shape: the shape of clips that are not the cache's.
        open_cache: opens the cache, where clips are the cache's.
        clip_shapes: the shapes of the cache's clips.
    """

    def __init__(
        self,
        config: Config,
        entrants: Sequence[Entrant],
        shape: ClipShape,
        open_cache: Callable[[], PriorCache] | None,
        clip_shapes: Sequence[ClipShape],
    ) -> None:
        self._config = config
        self._entrants = list(entrants)
        self._shapes = {each.latents: each for each in (shape, *clip_shapes)}
        self._cache = None if open_cache is None else open_cache()
        self._held: tuple[int, Denoiser] | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        """Scores a batch of items."""
        denoiser = self._denoiser(row["entrant"])
        items = [Item.model_validate_json(item) for item in row["items"]]
        rows: list[dict[str, Any]] = []
        for item, path in zip(items, row["encodings"], strict=True):
            rows += self._score(denoiser, item, self._read(item, path))
        write_scores(Path(row["path"]), rows)
        return {"path": row["path"]}

    def _denoiser(self, index: int) -> Denoiser:
        if self._held is None or self._held[0] != index:
            self._held = None  # before the next is loaded
            self._held = index, load_denoiser(self._entrants[index], self._config.evaluate.batch_size)
        return self._held[1]

    def _read(self, item: Item, path: str) -> Inputs:
        if item.clip is not None and item.clip.sample is not None:
            return self._read_sample(item)
        tensors = load_file(path)

        def text(place: str) -> dict[str, torch.Tensor]:
            start = f"{place}.text." if place else "text."
            return {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}

        latents = tensors.get("latents")
        wrong = [
            (tensors.get(f"wrong.{index}.latents", latents), text(f"wrong.{index}") or text(""))
            for index in range(len(item.wrong))
            if latents is not None
        ]
        masks = {
            key.removeprefix("mask."): value.numpy()
            for key, value in tensors.items()
            if key.startswith("mask.")
        }
        return Inputs(latents, text(""), wrong, masks)

    def _read_sample(self, item: Item) -> Inputs:
        cache, config = self._cache, self._config
        assert cache is not None and item.clip is not None and item.clip.sample is not None
        sample = cache.read(item.clip.sample)
        shape = self._shapes.get(tuple(sample.latents.shape))
        if shape is None:
            raise ProPhyError(
                f"the cached latents of {item.clip.sample} have a shape that this backbone does not make; "
                "run `prophy cache` with this configuration"
            )
        targets, _ = make_targets(
            sample.maps,
            sample.map_phenomena,
            sample.latents,
            grid=shape.token_grid,
            num_frames=shape.num_frames,
            slices=sample.slices,
            num_phenomena=len(sample.phenomena),
            recipe=config.train.recipe,
        )
        inside = (targets >= _INSIDE).T.reshape(-1, *shape.token_grid).numpy()
        masks = {cache.phenomena[index]: inside[index] for index in sample.map_phenomena}
        wrong = [
            (sample.latents, cache.read(each.clip.sample).text)
            for each in item.wrong
            if each.clip is not None and each.clip.sample is not None
        ]
        return Inputs(sample.latents, sample.text, wrong, masks)

    def _score(self, denoiser: Denoiser, item: Item, inputs: Inputs) -> Iterator[dict[str, Any]]:
        if inputs.latents is None:
            yield from _semantic_weights(denoiser.transformer, item, inputs)
            return
        grid = self._shapes[tuple(inputs.latents.shape)].token_grid
        pairs = [(inputs.latents, inputs.text), *inputs.wrong]
        levels = self._config.evaluate.noise_levels
        questions = [Question(*pair, level, item.unit) for pair in pairs for level in levels]
        answers = list(denoiser.answer(questions, grid))
        by_pair = [answers[start : start + len(levels)] for start in range(0, len(answers), len(levels))]
        # What is the same has the same loss, wherever in a batch it was: a tie.
        by_pair = [
            by_pair[0] if _is_same(pairs[0], pair) else own for pair, own in zip(pairs, by_pair, strict=True)
        ]
        for place, (level, right) in enumerate(zip(levels, by_pair[0], strict=True)):
            if item.is_measured:
                yield from _losses(item, level, right, inputs.masks)
                yield from _routing(item, level, right, inputs.masks, denoiser.transformer)
            for wrong, of_pair in zip(item.wrong, by_pair[1:], strict=True):
                value, other = right.error.mean().item(), of_pair[place].error.mean().item()
                yield score(wrong.measure, wrong.kind, item.unit, value, level, other)


def _is_same(
    ours: tuple[torch.Tensor, dict[str, torch.Tensor]], theirs: tuple[torch.Tensor, dict[str, torch.Tensor]]
) -> bool:
    """Whether two clips with their texts are equal to the last bit, as texts are that differ where cut."""
    latents, text = theirs
    return torch.equal(ours[0], latents) and all(torch.equal(ours[1][name], text[name]) for name in text)


def load_denoiser(entrant: Entrant, batch_size: int) -> Denoiser:
    """The transformer of a contestant, without its encoders.

    Raises:
        ProPhyError: another model lies there by now.
    """
    check_same_model(entrant.config, entrant.model)
    checkpoint = entrant.config.checkpoint
    backbone, family = entrant.config.backbone, FAMILIES[entrant.config.backbone.family]
    pipeline = load_pipeline(
        backbone.family,
        backbone.pretrained,
        backbone.revision,
        getattr(torch, backbone.dtype),
        None if checkpoint is None else local_folder(checkpoint),
        Placement(default_device()),
        **dict.fromkeys(family.encoders),
    )
    transformer, classes = pipeline.transformer, family.classes()
    knobs = PhysicsControl()
    if isinstance(transformer, PhysicsTransformer):
        if entrant.knobs is not None:
            knobs = PhysicsControl(**entrant.knobs.model_dump(exclude={"return_maps"}))
    else:
        transformer = classes.prophy_transformer.from_transformer(
            transformer, bare_branch(["nothing"], [1, 1, 1])
        )
        knobs = PhysicsControl(scale=0.0)
    return Denoiser(
        transformer.eval().to(default_device()),
        classes.objective.from_scheduler(pipeline.scheduler.config),
        knobs,
        backbone.autocast,
        batch_size,
    )


def _losses(
    item: Item, level: float, answer: Answer, masks: dict[str, np.ndarray]
) -> Iterator[dict[str, Any]]:
    yield score("loss", "everywhere", item.unit, answer.error.mean().item(), level)
    inside = np.any(list(masks.values()), axis=0) if masks else None
    if inside is not None and inside.any() and not inside.all():
        error = answer.error.numpy()
        yield score("loss", "inside the maps", item.unit, float(error[inside].mean()), level)
        yield score("loss", "outside the maps", item.unit, float(error[~inside].mean()), level)


def _routing(
    item: Item,
    level: float,
    answer: Answer,
    masks: dict[str, np.ndarray],
    transformer: PhysicsTransformer,
) -> Iterator[dict[str, Any]]:
    """Mean AUROC of the clip's phenomena; nothing without a branch that has maps, or that are all numbers."""
    if answer.routing is None or answer.routing.phenomenon_maps is None:
        return
    if not answer.routing.phenomenon_maps.isfinite().all():
        return
    names, grid = transformer.physics.phenomena, answer.error.shape
    found = answer.routing.phenomenon_maps[0].unflatten(0, tuple(grid)).numpy()
    maps = {name: found[..., names.index(name)] for name in masks if name in names}
    for group, scores in (
        ("where", localization_auroc(maps, masks, "tokens")),
        ("which", discrimination_auroc(maps, masks, "tokens")),
    ):
        if scores:
            yield score("routing", group, item.unit, float(np.mean(list(scores.values()))), level)


@torch.no_grad()
def _semantic_weights(
    transformer: PhysicsTransformer, item: Item, inputs: Inputs
) -> Iterator[dict[str, Any]]:
    semantic = transformer.physics_branch.semantic
    if semantic is None:
        return
    text = inputs.text[transformer.semantic_text][None].to(transformer.device, transformer.dtype)
    assert item.phenomenon is not None
    for expert, weight in enumerate(semantic.router(text)[0].tolist()):
        yield score(f"{SEMANTIC_WEIGHT}{expert}", item.phenomenon, item.unit, weight)
