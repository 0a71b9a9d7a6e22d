"""`prophy pretrain`: trains one part of the embedded default from nothing. Resumes by itself."""

import logging
import shutil
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file

from pipelines.caching import cache
from pipelines.config import Config, Part
from pipelines.layout import RunFolder
from pipelines.runtime import open_run
from pipelines.sandbox import simulate
from pipelines.training import train
from prophy.errors import ProPhyError
from prophy.pretraining.backbone import BackboneRecipe, pretrain_backbone
from prophy.pretraining.text import TextRecipe, pretrain_text
from prophy.pretraining.vae import VaeRecipe, pretrain_vae
from prophy.pretraining.vlm import VlmRecipe, pretrain_vlm
from prophy.sandbox import check_taxonomy
from prophy.taxonomy import load_taxonomy
from prophy.tiny import WEIGHTS, ship

logger = logging.getLogger(__name__)

_SMOOTHED_OVER = 20


def run(config: Config, part: Part) -> Path:
    """Trains a part: the VLM, the VAE, the text encoder, the transformer (after these two), or the branch.

    Args:
        config: the run; its `pretrain` section says how long. The branch is trained as any other, on
            simulated clips, by `prophy cache` and `prophy train`, for the parts that are bundled.
        part: which; `bundle` trains none, but makes what was trained in this run folder the embedded default.

    Returns:
        The folder with what was trained, its figures and pictures.
    """
    if part == "bundle":
        return _bundle(config.run_dir)
    if part == "branch":
        new = config.model_copy(update={"train": config.train.model_copy(update={"start_from": None})})
        simulate.run(new)
        cache.run(new)
        return train.run(new)
    folder = RunFolder(open_run(config, "pretrain")).pretrained
    folder.mkdir(exist_ok=True)
    settings = config.pretrain
    match part:
        case "vlm":
            taxonomy = load_taxonomy(config.taxonomy)
            check_taxonomy(taxonomy.names)
            recipe = VlmRecipe(num_steps=settings.vlm_steps, seed=settings.seed)
            progress = pretrain_vlm(folder, recipe, taxonomy)
        case "vae":
            progress = pretrain_vae(
                folder,
                VaeRecipe(num_steps=settings.vae_steps, num_clips=settings.num_clips, seed=settings.seed),
            )
        case "text_encoder":
            progress = pretrain_text(
                folder,
                TextRecipe(num_steps=settings.text_steps, task=settings.text_task, seed=settings.seed),
            )
        case "backbone":
            progress = pretrain_backbone(
                folder,
                BackboneRecipe(
                    num_steps=settings.backbone_steps,
                    num_clips=settings.num_clips,
                    seed=settings.seed,
                    start_from=settings.start_from,
                ),
            )
    _draw_curves(progress.history, folder / f"{part}_curves.png")
    logger.info("trained the %s in %s", part, folder)
    return folder


def _bundle(run_dir: Path) -> Path:
    """Raises `ProPhyError` where nothing was trained, or one half of what belongs together."""
    places = RunFolder(run_dir)
    trained = {part: places.pretrained / part for part in ("vlm", "vae", "text_encoder", "transformer")}
    trained["branch"] = places.model
    parts = {part: folder for part, folder in trained.items() if folder.is_dir()}
    if not parts:
        raise ProPhyError(f"nothing was trained in {run_dir}; run `prophy pretrain` with this run_dir first")
    if ("text_encoder" in parts) != ("transformer" in parts):
        raise ProPhyError(
            f"text encoder and backbone belong together, and {run_dir} has one of them; run `prophy pretrain "
            f"{'backbone' if 'text_encoder' in parts else 'text_encoder'}` with this run_dir first"
        )
    with tempfile.TemporaryDirectory() as rounded:
        if "branch" in parts:
            parts["branch"] = shutil.copytree(parts["branch"], Path(rounded) / "branch")
            [weights] = parts["branch"].glob("*.safetensors")
            save_file({name: value.bfloat16() for name, value in load_file(weights).items()}, weights)
        ship(parts)
    logger.info("the embedded default has new weights: %s", ", ".join(parts))
    return WEIGHTS


def _draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """One plot per quantity, smoothed where there are many values."""
    names = list(dict.fromkeys(name for entry in history for name in entry))
    figure = Figure(figsize=(3.6 * len(names), 2.6), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(names), squeeze=False)[0], names, strict=True):
        steps, values = np.array(
            [(step, entry[name]) for step, entry in enumerate(history) if name in entry]
        ).T
        width = min(_SMOOTHED_OVER, 1 + len(values) // _SMOOTHED_OVER)
        axes.plot(
            steps[width - 1 :], np.convolve(values, np.full(width, 1 / width), "valid"), color="#3366aa"
        )
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("step", fontsize=8)
        axes.set_yscale("log")
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3, which="both")
    figure.savefig(path, dpi=110)
