"""A report: one HTML file that needs nothing else, made of sections with text, tables and pictures."""

from dataclasses import dataclass, field
from pathlib import Path

import jinja2


@dataclass(kw_only=True)
class Picture:
    """An image or a video, as a `data:` URI, and what it shows."""

    uri: str
    caption: str

    @property
    def is_video(self) -> bool:
        """Whether to show it with a player."""
        return self.uri.startswith("data:video/")


@dataclass(kw_only=True)
class Table:
    """Rows under a header; every cell is shown as it prints."""

    header: list[str]
    rows: list[list[str]]


@dataclass(kw_only=True)
class Section:
    """A heading, what it says, and what it shows."""

    title: str
    text: str
    pictures: list[Picture] = field(default_factory=list)
    table: Table | None = None


def write_report(path: Path, title: str, sections: list[Section]) -> None:
    """Writes the sections, in order, to a self-contained HTML file."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True, trim_blocks=True
    )
    html = environment.get_template("report.html").render(title=title, sections=sections)
    path.write_text(html, encoding="utf-8")
