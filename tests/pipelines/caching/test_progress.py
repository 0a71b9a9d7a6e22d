"""What the table of stages says."""

import io

import pytest
from rich.console import Console

from pipelines.caching.progress import GraphReport, StageReport, print_stages

REPORT = GraphReport(
    written=90,
    failed=10,
    seconds=40.0,
    stages=[
        StageReport("ReadClip", 100, busy_s=6.0, workers=2, first_s=2.0, last_s=25.0),
        StageReport("ExtractPriors", 100, busy_s=36.0, workers=2, first_s=10.0, last_s=29.0),
        StageReport("WriteRows", 100, busy_s=0.5, workers=1, first_s=12.0, last_s=30.0),
    ],
)


def test_utilisation_is_of_the_time_since_the_busiest_stage_began() -> None:
    read, extract, _ = REPORT.stages
    assert REPORT.busiest is extract
    assert REPORT.span_s == 20.0
    assert REPORT.utilisation(extract) == pytest.approx(0.9)
    assert REPORT.utilisation(read) == pytest.approx(0.15)


def test_the_table_names_every_stage() -> None:
    console = Console(width=100, record=True, file=io.StringIO())
    print_stages(console, "priors", REPORT)
    lines = console.export_text().splitlines()
    [extract] = [line for line in lines if "ExtractPriors" in line]
    assert "90%" in extract and "36.0" in extract
    assert sum("ReadClip" in line or "WriteRows" in line for line in lines) == 2
