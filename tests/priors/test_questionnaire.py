import pytest

from prophy.priors.questionnaire import PRESENCE, QUESTIONNAIRE, describe, format_presence, parse_presence
from prophy.taxonomy import PHENOMENA, Phenomenon

COLLISION, COMBUSTION = Phenomenon.COLLISION, Phenomenon.COMBUSTION


@pytest.mark.parametrize(
    ("answer", "phenomena", "unparsed"),
    [
        ("none", (), ()),
        ("None.", (), ()),
        ("collision", (COLLISION,), ()),
        ("Combustion; collision.", (COLLISION, COMBUSTION), ()),
        ("collision ;collision;  combustion", (COLLISION, COMBUSTION), ()),
        ("collision; a fire", (COLLISION,), ("a fire",)),
        ("collision, combustion", (), ("collision, combustion",)),
        ("there is no collision", (), ("there is no collision",)),
        ("none; collision", (COLLISION,), ("none",)),
        ("collision; combus", (COLLISION,), ("combus",)),
        ("", (), ("",)),
    ],
)
def test_presence_is_parsed_by_structure(
    answer: str, phenomena: tuple[Phenomenon, ...], unparsed: tuple[str, ...]
) -> None:
    assert parse_presence(answer) == (phenomena, unparsed)


@pytest.mark.parametrize("phenomena", [(), *((one,) for one in PHENOMENA), PHENOMENA])
def test_presence_is_read_back(phenomena: tuple[Phenomenon, ...]) -> None:
    assert parse_presence(format_presence(phenomena)) == (phenomena, ())


def test_questions() -> None:
    ids = [question.id for question in QUESTIONNAIRE]
    assert len(set(ids)) == len(ids) == 3 + len(PHENOMENA)
    for phenomenon in PHENOMENA:
        assert phenomenon in PRESENCE.text and phenomenon in describe(phenomenon).text
