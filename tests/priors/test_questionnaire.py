import pytest

from prophy.priors.questionnaire import ask_presence, describe, format_presence, parse_presence, questionnaire
from tests.wisa import PHENOMENA, WISA

COLLISION, COMBUSTION = "collision", "combustion"


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
    answer: str, phenomena: tuple[str, ...], unparsed: tuple[str, ...]
) -> None:
    assert parse_presence(answer, PHENOMENA) == (phenomena, unparsed)


@pytest.mark.parametrize("phenomena", [(), *((one,) for one in PHENOMENA), PHENOMENA])
def test_presence_is_read_back(phenomena: tuple[str, ...]) -> None:
    assert parse_presence(format_presence(phenomena), PHENOMENA) == (phenomena, ())


def test_questions() -> None:
    ids = [question.id for question in questionnaire(WISA)]
    assert len(set(ids)) == len(ids) == 3 + len(PHENOMENA)
    for entry in WISA.phenomena:
        assert entry.name in ask_presence(WISA).text and entry.wording in describe(entry).text
