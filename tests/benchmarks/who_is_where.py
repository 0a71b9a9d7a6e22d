"""Does alignment help a model to learn which thing is where, and in how many samples?

    python tests/benchmarks/who_is_where.py [FOLDER NUM_SEEDS NUM_STEPS]

The embedded backbone is given a text encoder like those of published backbones, which saw text alone: then
it cannot tell from a caption of two things which is on the left. Beside it, frozen, the same branch is
trained with alignment losses and without, at levels of noise where the text alone could tell, from equal
starts and on equal batches. Measured on clips of two phenomena that were never trained together, after a
quarter, a half and all of the steps: by how much more a clip costs with the sides exchanged in its caption.

All stays in FOLDER (runs/who_is_where), and the same command goes on where it was cut off; with more seeds
or steps it adds these.
"""

import argparse
import shutil
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import pyarrow.parquet as pq
import yaml
from rich.console import Console
from rich.table import Table

from pipelines.layout import RunFolder
from prophy.evaluation.statistics import Difference, Estimate, compare, estimate
from prophy.tiny import bundled

NUM_SEEDS, NUM_STEPS = 3, 200
NUM_CLIPS, BACKBONE_STEPS, BATCH = 600, 300, 16
NUM_MEASURED = 64  # held-out clips, of which half are of two phenomena
LEVELS = [0.98, 0.99]
SWAPPED = "sides, two things"
ARMS = {
    "aligned": {"semantic_alignment": 0.1, "token_alignment": 0.2, "load_balancing": 0.01},
    "unaligned": {"semantic_alignment": 0.0, "token_alignment": 0.0, "load_balancing": 0.01},
}

Scores = Mapping[tuple[str, str, float], Mapping[str, tuple[float, float | None]]]
"""Per measure, group and level the value of each unit, and with what is wrong in it."""


def prophy(*arguments: str, **keys: object) -> None:
    """A command of the product, with keys of the configuration: `a__b` is `a.b`."""
    settings = [f"--set={name.replace('__', '.')}={value}" for name, value in keys.items()]
    ended = subprocess.run([sys.executable, "-m", "pipelines.cli", *arguments, *settings], check=False)
    if ended.returncode:  # the command has said why
        sys.exit(ended.returncode)


def backbone_of_plain_text(folder: Path) -> Path:
    """A pipeline whose text encoder saw text alone, with the embedded backbone, taught to read it."""
    pipeline, run = folder / "pipeline", RunFolder(folder / "backbone")
    if pipeline.is_dir():
        return pipeline
    if not (run.pretrained / "vae").is_dir():
        shutil.copytree(bundled("vae"), run.pretrained / "vae")
    keys = {
        "run_dir": run.path,
        "pretrain__text_task": "missing_words",
        "pretrain__num_clips": NUM_CLIPS,
        "pretrain__backbone_steps": BACKBONE_STEPS,
        "pretrain__start_from": bundled("transformer"),
        "pretrain__seed": 41,
    }
    prophy("pretrain", "text_encoder", **keys)
    prophy("pretrain", "backbone", **keys)
    partial = pipeline.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(run.pretrained / "pipeline", partial)
    shutil.rmtree(partial / "transformer")
    shutil.copytree(run.pretrained / "transformer", partial / "transformer")
    partial.rename(pipeline)
    return pipeline


def train(folder: Path, arm: str, seed: int, steps: Sequence[int], **keys: object) -> dict[int, Path]:
    """The branch of an arm after so many steps."""
    run = RunFolder(folder / f"{arm}-{seed}")
    exports = {step: run.path / f"after-{step}" for step in steps}
    if not all(export.is_dir() for export in exports.values()):
        keys |= {f"train__loss_weights__{name}": value for name, value in ARMS[arm].items()}
        keys |= {"run_dir": run.path, "train__seed": seed, "train__num_steps": steps[-1]}
        prophy("train", train__save_every=steps[0], train__num_to_keep=steps[-1] // steps[0], **keys)
        for step, export in exports.items():
            if not export.is_dir():
                prophy("export", str(export), "--step", str(step), **keys)
    return exports


def read_scores(path: Path, contestant: str) -> Scores:
    """All scores of a contestant."""
    found: dict[tuple[str, str, float], dict[str, tuple[float, float | None]]] = {}
    for row in pq.read_table(path, filters=[("contestant", "=", contestant)]).to_pylist():
        place = row["measure"], row["group"], row["level"]
        found.setdefault(place, {})[row["unit"]] = row["value"], row["wrong"]
    return found


def gaps(scores: Scores, level: float) -> dict[str, float]:
    """By how many per cent more a clip costs with the wrong caption."""
    of_all = scores["captions", SWAPPED, level]
    return {unit: 100 * (wrong / right - 1) for unit, (right, wrong) in of_all.items() if wrong is not None}


def over_seeds(of_seeds: Sequence[Mapping[str, float]]) -> list[float]:
    """The mean of each unit over seeds, in the order of units."""
    return [sum(of_seed[unit] for of_seed in of_seeds) / len(of_seeds) for unit in sorted(of_seeds[0])]


def said(found: Estimate | Difference | None, digits: int = 1) -> str:
    """A mean with its interval."""
    if found is None:
        return ""
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs/who_is_where"))
    parser.add_argument("num_seeds", nargs="?", type=int, default=NUM_SEEDS)
    parser.add_argument("num_steps", nargs="?", type=int, default=NUM_STEPS)
    given = parser.parse_args()
    folder = given.folder.absolute()
    folder.mkdir(parents=True, exist_ok=True)
    if given.num_steps % 4:
        parser.error(f"NUM_STEPS is {given.num_steps}; choose a multiple of 4: a quarter and a half are kept")
    steps = [given.num_steps // 4, given.num_steps // 2, given.num_steps]
    trained = [int(place.name.rpartition("-")[2]) for place in folder.glob("*/after-*")]
    if trained and max(trained) not in steps:
        parser.error(
            f"{folder} holds models of {max(trained)} steps; choose NUM_STEPS as many, twice or four times "
            "as many"
        )

    pipeline = backbone_of_plain_text(folder)
    clips = RunFolder(folder / "clips")
    keys = {
        "backbone__pretrained": pipeline,
        "checkpoint": "null",
        "cache__output": clips.cache,
        "train__start_from": "null",
        "train__noise_levels": "[0.98,1.0]",
        "train__alignment": "cross_entropy",
        "train__micro_batch_size": BATCH // 2,
        "train__global_batch_size": BATCH,
    }
    simulated = {"run_dir": clips.path, "simulate__num_clips": NUM_CLIPS, "simulate__seed": 29}
    prophy("simulate", **keys, **simulated)
    prophy("cache", **keys, **simulated)

    contestants: dict[str, dict[str, object]] = {"backbone": {}}
    for seed in range(given.num_seeds):
        for arm in ARMS:
            for step, export in train(folder, arm, seed, steps, **keys).items():
                contestants[f"{arm} {seed} {step}"] = {"checkpoint": str(export)}
    compared = {
        "extends": "tiny",
        "run_dir": str(folder / "compared"),
        "checkpoint": None,
        "backbone": {"pretrained": str(pipeline)},
        "evaluate": {
            "contestants": contestants,
            "measures": ["loss", "captions", "routing"],
            "num_clips": NUM_MEASURED,
            "noise_levels": LEVELS,
        },
    }
    settings = folder / "compared.yaml"
    settings.write_text(yaml.safe_dump(compared, sort_keys=False))
    prophy("evaluate", "--config", str(settings))
    scores = folder / "compared" / "evaluation" / "scores.parquet"
    tell(scores, range(given.num_seeds), steps)


def tell(path: Path, seeds: Sequence[int], steps: Sequence[int]) -> None:
    """Prints what was found."""
    console, plain = Console(width=150), read_scores(path, "backbone")
    for level in LEVELS:
        found = estimate([*gaps(plain, level).values()])
        console.print(f"sigma {level:g}: without a branch the exchanged sides cost {said(found)} % more")
        table = Table(
            "samples",
            *[f"{arm}, % more" for arm in ARMS],
            "aligned minus unaligned",
            "of each seed",
            "right: aligned",
            "unaligned",
            "which: aligned",
            "loss, aligned minus unaligned",
            title=f"sigma {level:g}",
        )
        for step in steps:
            of_arms = {arm: [read_scores(path, f"{arm} {seed} {step}") for seed in seeds] for arm in ARMS}
            cost = {arm: [gaps(scores, level) for scores in found] for arm, found in of_arms.items()}
            mean = {arm: over_seeds(of_seeds) for arm, of_seeds in cost.items()}
            by_seed = [
                compare([*ours.values()], [*theirs.values()])
                for ours, theirs in zip(cost["aligned"], cost["unaligned"], strict=True)
            ]
            right = {
                arm: over_seeds([{unit: float(gap > 0) for unit, gap in one.items()} for one in of_seeds])
                for arm, of_seeds in cost.items()
            }
            losses, which = (
                {
                    arm: over_seeds(
                        [{u: value for u, (value, _) in s[(*place, level)].items()} for s in found]
                    )
                    for arm, found in of_arms.items()
                }
                for place in (("loss", "everywhere"), ("routing", "which"))
            )
            table.add_row(
                str(step * BATCH),
                *(said(estimate(mean[arm])) for arm in ARMS),
                said(compare(mean["aligned"], mean["unaligned"])),
                ", ".join(f"{found.mean:.1f}" for found in by_seed if found is not None),
                *(said(estimate(right[arm]), 2) for arm in ARMS),
                said(estimate(which["aligned"]), 2),
                said(compare(losses["aligned"], losses["unaligned"]), 4),
            )
        console.print(table)


if __name__ == "__main__":
    main()
