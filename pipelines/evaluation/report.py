"""The report of a comparison: figures with their intervals, and nothing that has none."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from pipelines.config import Config
from pipelines.evaluation.films import films_section
from pipelines.evaluation.items import CORRELATED, num_held_out_of
from pipelines.evaluation.tables import whole_file
from prophy.evaluation.comparison import MEASURES, Figure, Measure, correlations, figures, only_finite, ties
from prophy.evaluation.report import Section, Table, write_report
from prophy.evaluation.statistics import CONFIDENCE, FEWEST_UNITS, Difference, Estimate

logger = logging.getLogger(__name__)

REPORT = "report.html"


def write(
    config: Config,
    contestants: Sequence[str],
    scores: Sequence[Mapping[str, Any]],
    videos: Mapping[str, Mapping[str, Path]],
    notes: Sequence[str] = (),
) -> Path:
    """Writes `report.html` into the folder of the comparison.

    A unit whose loss is not finite is in no figure of that contestant. Notes are in report and log.

    Args:
        config: the run.
        contestants: their names; the others are compared with the first.
        scores: all of them.
        videos: the file of each unit, for each contestant that made any.
        notes: sentences on what was compared, without a full stop.
    """
    path = config.evaluate.output / REPORT
    scores, left_out = only_finite(scores)
    unusable = [
        f"contestant {name!r} gives no finite loss on {number} of {whole} clips (left out)"
        for name, (number, whole) in left_out.items()
    ]
    notes = [*notes, *unusable, *_tied(config, scores)]
    for note in notes:
        logger.warning("%s", note)
    sections = [_summary(contestants, notes)]
    for kind in config.evaluate.measures:
        for measure in MEASURES.get(kind, ()):
            measure = _of_clips(config, measure)
            sections += _section(measure, figures(measure, scores, contestants), contestants)
    if "routing" in config.evaluate.measures:
        sections += _correlation_section(correlations(scores, contestants, CORRELATED))
    for name in contestants[1:] if videos else ():
        sections += films_section(config, (contestants[0], name), scores, videos)
    with whole_file(path) as partial:
        write_report(partial, "Evaluation", sections)
    return path


def _summary(contestants: Sequence[str], notes: Sequence[str]) -> Section:
    first, *others = (f'"{name}"' for name in contestants)
    said = f"Compared with {first}: {', '.join(others)}. " if others else ""
    noted = "".join(f" {note[0].upper()}{note[1:]}." for note in notes)
    return Section(
        title="How to read this",
        text=f"{said}All saw the same clips, captions, prompts, seeds and noise. In brackets is the interval "
        f"of {CONFIDENCE:.0%}: Wilson's for a share of yes, else by means of random subsets of the clips or "
        "prompts. A difference is the mean of paired ones, with Tango's interval and McNemar's exact p for "
        "yes or no, else with random subsets and the sign-flip test that goes with them. The last column "
        "says which true difference this many pairs would have shown in four of five comparisons, and is "
        f"empty where none. What fewer than {FEWEST_UNITS} clips or prompts say is left out.{noted}",
    )


def _of_clips(config: Config, measure: Measure) -> Measure:
    """Says of losses which clips they are of."""
    if measure.source != "loss":
        return measure
    number = num_held_out_of(config)
    if config.evaluate.clips == "sandbox":
        title, said = "Loss of clips never trained on", "They are simulated, of combinations never trained."
    elif number:
        title = "Loss of held-out clips"
        said = f"They are of the cache, of the {number} videos that train.num_held_out keeps from training."
    else:
        title, said = "Loss of clips of the cache", "These may have been trained on: train.num_held_out is 0."
    return replace(measure, title=title, text=f"{said} {measure.text}")


def _tied(config: Config, scores: Sequence[Mapping[str, Any]]) -> list[str]:
    same, number = ties(scores)
    if not same:
        return []
    length = config.backbone.max_sequence_length
    return [
        f"{same} of {number} wrong captions and clips are the same as the right one to all contestants, and "
        f"count as half: two videos show the same, or a text is cut after {length} tokens "
        "(backbone.max_sequence_length)"
    ]


def _section(measure: Measure, found: Sequence[Figure], contestants: Sequence[str]) -> list[Section]:
    if not found:
        return []
    header = ["", "noise", "contestant", "value", "clips"]
    if len(contestants) > 1:
        header += [f"minus {contestants[0]}", "p", "pairs", "detectable"]
    has_levels = any(figure.level is not None for figure in found)
    rows = []
    for figure in found:
        level = "" if figure.level is None else f"{figure.level:g}"
        row = [figure.group, level, figure.contestant, interval(figure.estimate)]
        row.append(str(figure.estimate.num_units))
        if len(contestants) > 1:
            row += _difference(figure.difference)
        rows.append(row)
    if not has_levels:
        header = [header[0], *header[2:]]
        rows = [[row[0], *row[2:]] for row in rows]
    return [Section(title=measure.title, text=measure.text, table=Table(header=header, rows=rows))]


def _difference(difference: Difference | None) -> list[str]:
    if difference is None:
        return ["", "", "", ""]
    p_value = "< 0.001" if difference.p_value < 0.001 else f"{difference.p_value:.3f}"
    return [
        interval(difference, signed=True),
        p_value,
        str(difference.num_units),
        "" if difference.detectable is None else number(difference.detectable),
    ]


def _correlation_section(found: Mapping[tuple[str, str, str], Estimate]) -> list[Section]:
    if not found:
        return []
    rows = [
        [f"{first} and {second}", name, interval(between), str(between.num_units)]
        for (name, first, second), between in found.items()
    ]
    return [
        Section(
            title="Semantic experts: correlation of phenomena",
            text="Correlation of the mean weights that the semantic router gives to captions of two "
            "phenomena. The paper finds related ones alike, and unrelated ones not.",
            table=Table(header=["", "contestant", "correlation", "captions of each"], rows=rows),
        )
    ]


def interval(estimate: Estimate, signed: bool = False) -> str:
    """A figure with its interval."""
    sign = "+" if signed else ""
    return f"{number(estimate.mean, sign)} [{number(estimate.low, sign)}, {number(estimate.high, sign)}]"


def number(value: float, sign: str = "") -> str:
    """Three significant digits, or none after the point of large ones."""
    return f"{value:{sign}.0f}" if abs(value) >= 100 else f"{value:{sign}.3g}"
