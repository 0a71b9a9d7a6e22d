"""What the VLM is asked about a clip, and how the one answer with a closed vocabulary is read.

Knows no model: the wordings are the same for every Qwen2.5-VL, large or small. The taxonomy says which
phenomena there are, and how the VLM is asked about each.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prophy.taxonomy import Entry, Taxonomy

NONE = "none"


@dataclass(frozen=True)
class Question:
    """One question: `id` is its key in the cached answers, `text` is what the VLM reads."""

    id: str
    text: str


CAPTION = Question("caption", "Describe this video in one sentence.")
BACKGROUND = Question("background", "Describe the background of this video in one sentence.")


def ask_presence(taxonomy: Taxonomy) -> Question:
    """The question which of a taxonomy's phenomena a clip shows."""
    return Question(
        "presence",
        f"Which of these physical phenomena can be seen in this video: {'; '.join(taxonomy.names)}? "
        f"Answer only with their names, exactly as written here and separated by ';', or with '{NONE}'.",
    )


def describe(phenomenon: Entry) -> Question:
    """The question whose answer's attention is the map of `phenomenon` (prophy/METHOD.md, section 4)."""
    return Question(phenomenon.name, f"Describe {phenomenon.wording} in this video in one sentence.")


def describe_named(taxonomy: Taxonomy, names: Iterable[str]) -> list[Question]:
    """The questions about the phenomena of these names, in the order of the names."""
    entries = {entry.name: entry for entry in taxonomy.phenomena}
    return [describe(entries[name]) for name in names]


def questionnaire(taxonomy: Taxonomy) -> tuple[Question, ...]:
    """All that can be asked about a clip."""
    return (CAPTION, ask_presence(taxonomy), BACKGROUND, *map(describe, taxonomy.phenomena))


def format_presence(phenomena: Iterable[str]) -> str:
    """The answer to `ask_presence` that names exactly these phenomena."""
    return "; ".join(phenomena) or NONE


def parse_presence(answer: str, names: Sequence[str]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Reads an answer to `ask_presence` by its structure: names between semicolons, or the word none.

    Case, spaces around a name and one final full stop do not matter; nothing else is forgiven or guessed.

    Args:
        answer: the VLM's.
        names: the taxonomy's.

    Returns:
        The phenomena that are named, in the taxonomy's order and without repeats; and the pieces that are no
        name.
    """
    pieces = [piece.strip() for piece in answer.strip().removesuffix(".").split(";")]
    if [piece.lower() for piece in pieces] == [NONE]:
        return (), ()
    known = {piece.lower() for piece in pieces}
    return (
        tuple(name for name in names if name in known),
        tuple(piece for piece in pieces if piece.lower() not in names),
    )
