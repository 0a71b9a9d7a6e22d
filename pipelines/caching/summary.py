"""What a cache holds of its input after a run, as tables and sentences for people."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import pyarrow as pa
from rich.console import Console
from rich.markup import escape
from rich.table import Table as Grid

from pipelines.caching.progress import GraphReport, print_stages
from pipelines.caching.shapes import Misfit
from prophy.places import Place


@dataclass(frozen=True)
class CacheSummary:
    """What the cache holds of the input after a run.

    Attributes:
        num_videos: videos in the input.
        num_priors: clips of these videos in the priors; those that several paths lead to count once.
        num_encodings: these clips in the encodings of this backbone.
        num_copies: videos of the input with the content of another, by which they count.
        num_left_out: cached videos that are not in the input any more; training leaves them out.
        quarantined: why a row, a video or a clip of the input cannot be used, a sentence each.
        phenomena: number of clips by phenomenon.
        branch_of: branch of physics by phenomenon.
        unparsed: clips whose VLM said something of phenomena that is no name of one; that part was not used.
        cut: videos whose pictures are cut to the shape of what the VLM sees.
        stretched: videos whose pictures are stretched from that to the backbone's shape.
        added_priors: what this run did to the priors.
        added_encodings: what this run did to the encodings.
    """

    num_videos: int
    num_priors: int
    num_encodings: int
    num_copies: int
    num_left_out: int
    quarantined: list[str]
    phenomena: dict[str, int]
    branch_of: dict[str, str]
    unparsed: int
    cut: Misfit | None
    stretched: Misfit | None
    added_priors: GraphReport
    added_encodings: GraphReport


def count_phenomena(clips: pa.Table, names: Sequence[str]) -> dict[str, int]:
    """Number of clips by phenomenon, from most to fewest; phenomena of no clip are left out.

    Args:
        clips: rows of the priors, or of their index.
        names: the taxonomy's.
    """
    labels = clips["phenomena"].combine_chunks().flatten().to_numpy().reshape(len(clips), len(names))
    counts = Counter(dict(zip(names, (labels > 0.5).sum(axis=0).tolist(), strict=True)))
    return {name: count for name, count in counts.most_common() if count}


def print_summary(summary: CacheSummary, location: str, quarantine: Place) -> None:
    """Prints it; `location` is the input, `quarantine` the folder of what cannot be used."""
    console = Console(emoji=False)  # names may have what Rich would take for one, or for a style
    title = f"cache of {escape(location)}"
    grid = Grid("table", "clips", "added", "quarantined", "seconds", "clips/s", title=title)
    rows = [
        ("priors", summary.num_priors, summary.added_priors),
        ("encodings", summary.num_encodings, summary.added_encodings),
    ]
    for name, clips, added in rows:
        speed = f"{added.written / added.seconds:.2f}" if added.written else "-"
        grid.add_row(name, str(clips), str(added.written), str(added.failed), f"{added.seconds:.1f}", speed)
    console.print(grid)
    for name, _, added in rows:
        if added.stages:
            print_stages(console, name, added)
    widest = max(summary.phenomena.values(), default=0)
    for phenomenon, count in summary.phenomena.items():
        label = f"{phenomenon} ({summary.branch_of[phenomenon]})"
        console.print(f"{label:>38} {count:5d} " + "█" * math.ceil(30 * count / widest), highlight=False)
    if summary.unparsed:
        text = "clips of which the VLM said what is no phenomenon; kept in `unparsed`, not used"
        console.print(f"{summary.unparsed} {text}", highlight=False)
    if summary.num_copies:
        text = "video(s) have the content of others of the input; of each content the first counts"
        console.print(f"{summary.num_copies} {text}", highlight=False, soft_wrap=True)
    if summary.num_left_out:
        text = "cached video(s) are not in the input: training leaves them out, `cache prune` removes them"
        console.print(f"{summary.num_left_out} {text}", highlight=False, soft_wrap=True)
    if cut := summary.cut:
        text = (
            f"{cut.num_videos} of {summary.num_videos} videos are cut to the nearest shape of the VLM "
            f"(vlm.aspect_buckets), most {cut.worst}: {cut.share:.0%} of its picture is cut off"
        )
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if stretched := summary.stretched:
        text = (
            f"{stretched.num_videos} of {summary.num_videos} videos are stretched to the nearest shape of "
            f"the backbone (backbone.aspect_buckets), most {stretched.worst}: by {stretched.share:.1%}"
        )
        console.print(text, highlight=False, soft_wrap=True, markup=False)
    if not (summary.added_priors.written or summary.added_encodings.written):
        console.print("nothing new: all clips were cached before")
    for message in summary.quarantined:
        console.print(f"[yellow]quarantined:[/] {escape(message)}", highlight=False, soft_wrap=True)
    if summary.quarantined:
        text = f"a row is tried again once it is mended, a video once {quarantine} is deleted"
        console.print(text, highlight=False, soft_wrap=True, markup=False)
