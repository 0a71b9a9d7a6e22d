"""Does the embedded VLM know what it sees, and which recipe turns its attention into the best targets?

    python tests/benchmarks/vlm.py [NUM_CLIPS]

On clips that hold a combination which was never trained: shares of right answers; then for every recipe the
area under the ROC curve of its maps against the exact masks ("where": all cells of the clip) and of each map
at telling its own mask from the other phenomenon's ("which"). The winner is chosen on the even clips; all
figures are of the odd ones.
"""

import argparse
from collections import defaultdict

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from prophy.backbones.encoding import VideoEncoder
from prophy.evaluation.localization import discrimination_auroc, localization_auroc
from prophy.pretraining.recipe import NUM_FRAMES, held_out_clips
from prophy.pretraining.vlm import VLM_FPS, extraction_quality, vlm_frames
from prophy.priors.extractor import Clip, PriorExtractor
from prophy.priors.grounding import RECIPES
from prophy.sandbox import SimulatedClip
from prophy.taxonomy import load_taxonomy

WISA = load_taxonomy("wisa")
PHENOMENA = WISA.names
GRID = (5, 8, 8)

Scores = dict[str, dict[str, list[list[float]]]]  # recipe -> where or which -> scores of the even, odd clips


def score(clips: list[SimulatedClip]) -> tuple[Scores, dict[str, list[float]]]:
    """All recipes on all clips, labels given; and "where" of each phenomenon by the plain VLM map."""
    extractor = PriorExtractor("tiny", WISA, dtype="float32", max_new_tokens=40)
    encoder = VideoEncoder("tiny", None, "float32", "bfloat16", 32, family="wan")
    scores: Scores = {name: {"where": [[], []], "which": [[], []]} for name in RECIPES}
    by_phenomenon: dict[str, list[float]] = defaultdict(list)
    for number, clip in enumerate(clips):
        [priors] = extractor([Clip(vlm_frames(clip.frames), VLM_FPS, clip.phenomena)])
        latents = encoder.encode_video(clip.frames[None])[0]
        slices = torch.tensor(priors.slice_times, dtype=torch.float64) * clip.fps / (NUM_FRAMES - 1)
        for name, recipe in RECIPES.items():
            signed = recipe(torch.from_numpy(priors.maps), latents, GRID, NUM_FRAMES, slices)
            maps = {
                PHENOMENA[index]: map_.numpy()
                for index, map_ in zip(priors.map_phenomena, signed, strict=True)
            }
            where = localization_auroc(maps, clip.masks, "tokens")
            scores[name]["where"][number % 2] += where.values()
            which = discrimination_auroc(maps, clip.masks, "tokens")
            scores[name]["which"][number % 2] += which.values()
            for phenomenon, value in where.items():
                by_phenomenon[f"{name} {phenomenon}"].append(value)
    return scores, by_phenomenon


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("num_clips", nargs="?", type=int, default=200)
    clips = held_out_clips(parser.parse_args().num_clips)
    console = Console(width=110)
    for name, share in extraction_quality("tiny", WISA, clips).items():
        console.print(f"{name}: {share:.4f} of {len(clips)} clips")
    scores, by_phenomenon = score(clips)
    winner = max(RECIPES, key=lambda name: sum(np.mean(halves[0]) for halves in scores[name].values()))
    table = Table("recipe", "where", "which", title=f"AUROC on {len(clips) // 2} clips; 0.5 is chance")
    for name, kinds in scores.items():
        mark = " (chosen on the others)" if name == winner else ""
        table.add_row(name + mark, *(f"{np.mean(halves[1]):.3f}" for halves in kinds.values()))
    console.print(table)
    table = Table("phenomenon", "maps", "where", title=f"by phenomenon, {winner}, all clips")
    for phenomenon in PHENOMENA:
        values = by_phenomenon[f"{winner} {phenomenon}"]
        table.add_row(phenomenon, str(len(values)), f"{np.mean(values):.3f}")
    console.print(table)


if __name__ == "__main__":
    main()
