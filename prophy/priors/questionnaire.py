"""What the VLM is asked about a clip, and how the one answer with a closed vocabulary is read.

Knows no model: the wordings are the same for every Qwen2.5-VL, large or small.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from prophy.taxonomy import PHENOMENA, Phenomenon

NONE = "none"


@dataclass(frozen=True)
class Question:
    """One question: `id` is its key in the cached answers, `text` is what the VLM reads."""

    id: str
    text: str


CAPTION = Question("caption", "Describe this video in one sentence.")
BACKGROUND = Question("background", "Describe the background of this video in one sentence.")
PRESENCE = Question(
    "presence",
    f"Which of these physical phenomena can be seen in this video: {'; '.join(PHENOMENA)}? "
    f"Answer only with their names, exactly as written here and separated by ';', or with '{NONE}'.",
)


def describe(phenomenon: Phenomenon) -> Question:
    """The question whose answer's attention is the map of `phenomenon` (prophy/METHOD.md, section 4)."""
    return Question(str(phenomenon), f"Describe the {phenomenon} in this video in one sentence.")


QUESTIONNAIRE: tuple[Question, ...] = (CAPTION, PRESENCE, BACKGROUND, *map(describe, PHENOMENA))


def format_presence(phenomena: Iterable[Phenomenon]) -> str:
    """The answer to `PRESENCE` that names exactly these phenomena."""
    return "; ".join(phenomena) or NONE


def parse_presence(answer: str) -> tuple[tuple[Phenomenon, ...], tuple[str, ...]]:
    """Reads an answer to `PRESENCE` by its structure: names between semicolons, or the word none.

    Case, spaces around a name and one final full stop do not matter; nothing else is forgiven or guessed.

    Returns:
        The phenomena that are named, in taxonomy order and without repeats; and the pieces that are no name.
    """
    pieces = [piece.strip() for piece in answer.strip().removesuffix(".").split(";")]
    if [piece.lower() for piece in pieces] == [NONE]:
        return (), ()
    known = {piece.lower() for piece in pieces}
    return (
        tuple(phenomenon for phenomenon in PHENOMENA if phenomenon in known),
        tuple(piece for piece in pieces if piece.lower() not in PHENOMENA),
    )
