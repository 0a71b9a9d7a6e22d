"""A taxonomy as data: what a file may say, one sentence for each mistake, and vectors over its names."""

import pickle
from pathlib import Path

import numpy as np
import pytest

from prophy.errors import ProPhyError
from prophy.sandbox import SCENES, Part, describe
from prophy.taxonomy import (
    RESERVED,
    built_in_taxonomies,
    difference,
    from_multi_hot,
    index_of,
    load_taxonomy,
    multi_hot,
    parse_phenomena,
    parse_phenomenon,
    spelled,
)
from tests.wisa import PHENOMENA, WISA

NAMES = ("melting", "rigid body motion", "combustion")
ONE = "branches: [a]\nphenomena: [{name: %s, branch: a, wording: the x}]"


def test_the_default_is_wisas_17_in_the_order_of_the_trained_branch() -> None:
    assert built_in_taxonomies() == ["wisa"]
    assert len(PHENOMENA) == 17 and PHENOMENA[0] == "collision" and PHENOMENA[16] == "unnatural light source"
    assert WISA.branches == ["dynamics", "thermodynamics", "optics"]
    sizes = {branch: list(WISA.branch_of.values()).count(branch) for branch in WISA.branches}
    assert sizes == {"dynamics": 6, "thermodynamics": 6, "optics": 5}
    assert all(entry.wording == f"the {entry.name}" for entry in WISA.phenomena)
    assert pickle.loads(pickle.dumps(WISA)) == WISA


def test_a_file_of_ones_own(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "branches: [heat, light]\n"
        "phenomena:\n"
        "  - {name: boiling, branch: heat, wording: where water boils}\n"
        "  - {name: neon light 2, branch: light, wording: the neon light}\n"
    )
    taxonomy = load_taxonomy(str(path))
    assert taxonomy.names == ("boiling", "neon light 2")
    assert taxonomy.branch_of == {"boiling": "heat", "neon light 2": "light"}
    assert taxonomy.phenomena[0].wording == "where water boils"


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        ("", "cannot be used: it holds no keys at the top"),
        ("- a", "cannot be used: it holds no keys at the top"),
        ("{", "is no YAML: "),
        ("branches: [a]", "the key 'phenomena' is missing; add it"),
        ("branches: []\nphenomena: []", "'branches' is empty; name at least one"),
        ("branches: [a]\nphenomena: []", "'phenomena' is empty; name at least one"),
        ("branches: [a]\nphenomena: x", "bad value 'x' for 'phenomena': Input should be a valid list"),
        ("branches: [3]\nphenomena: [{name: x, branch: a, wording: the x}]", "bad value 3 for 'branches'"),
        (
            "branches: [a]\nphenomena: [x]",
            r"phenomenon 1 \('x'\) must have the keys name, branch, wording, words",
        ),
        (
            "branches: [a]\nphenomena: [{name: x, branch: a}]",
            "the key 'wording' of phenomenon 1 is missing; add it",
        ),
        (
            "branches: [a]\nphenomena: [{name: x, branch: a, wording: the x, hue: 1}]",
            "unknown key 'hue' of phenomenon 1; the keys are name, branch, wording, words",
        ),
        ((ONE % "x") + "\nextra: 1", "unknown key 'extra'; the keys are branches, phenomena"),
        ((ONE % "x").replace("the x", "' '"), "bad value ' ' for 'wording' of phenomenon 1"),
        (
            (ONE % "x").replace("branch: a", "branch: b"),
            r"'x' is of the branch 'b', which is none of its branches \(a\)",
        ),
        (ONE % "x, branch: a, wording: y}, {name: x", "2 phenomena have the name 'x'; give each its own"),
        (ONE % "x, words: [y, 3]", "bad value 3 for 'words' of phenomenon 1"),
        (ONE % "x, words: melt", "bad value 'melt' for 'words' of phenomenon 1"),
        (
            ONE % "x, words: [Light  beam], branch: a, wording: y}, {name: z, words: [light beam]",
            "2 phenomena are called 'light beam'; let it stand for one of them",
        ),
        (ONE % "no", "bad value False for 'name' of phenomenon 1"),
        *[
            (ONE % f"'{name}'", "no phenomenon can have the name")
            for name in ("X", "a.b", "a/b", "a  b", "é")
        ],
        *[(ONE % f"'{name}'", "no phenomenon can have the name") for name in ("a;b", " a", "a_b", 65 * "a")],
        *[(ONE % name, f"the name '{name}', which means something else; rename it") for name in RESERVED],
    ],
)
def test_a_mistake_is_one_sentence(tmp_path: Path, content: str, sentence: str) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(content)
    with pytest.raises(ProPhyError, match=f"^the taxonomy {path} .*{sentence}") as caught:
        load_taxonomy(str(path))
    assert "\n" not in str(caught.value)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=r"no taxonomy '.*/none.yaml'; set taxonomy to .* one of: wisa$"):
        load_taxonomy(str(tmp_path / "none.yaml"))
    with pytest.raises(ProPhyError, match="cannot be read: Is a directory"):
        load_taxonomy(str(tmp_path))
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x01\x02")
    with pytest.raises(ProPhyError, match="is no YAML"):
        load_taxonomy(str(tmp_path / "binary.yaml"))


def test_spellings_of_a_name() -> None:
    for given in ("rigid body motion", " Rigid_Body-Motion. ", "RIGID  body\tmotion"):
        assert parse_phenomenon(given, NAMES) == spelled(given) == "rigid body motion"
    assert parse_phenomena(["Combustion", "melting", "melting."], NAMES) == ("melting", "combustion")
    with pytest.raises(ProPhyError, match="unknown phenomenon 'meltin'; did you mean 'melting'?"):
        parse_phenomenon("meltin", NAMES)
    for given in ("../secret", "", "none/", "a" * 65):
        with pytest.raises(ProPhyError, match="cannot be the name of a phenomenon"):
            spelled(given)


def test_vectors_follow_the_order_of_the_names() -> None:
    vector = multi_hot(["combustion", "melting"], NAMES)
    assert vector.dtype == np.float32 and vector.tolist() == [1, 0, 1]
    assert from_multi_hot(vector, NAMES) == ("melting", "combustion")
    assert multi_hot(["combustion"], NAMES[::-1]).tolist() == [1, 0, 0]
    assert index_of("combustion", NAMES) == 2
    with pytest.raises(ProPhyError, match="unknown phenomenon 'Combustion'"):
        index_of("Combustion", NAMES)


def test_what_tells_two_lists_apart() -> None:
    assert difference(NAMES, list(NAMES)) is None
    assert difference(NAMES[::-1], NAMES) == "phenomenon 1 is 'combustion' there and 'melting' here"
    assert difference(NAMES[:2], NAMES) == "there are 2 phenomena there and 3 here"


def test_prompts_of_the_sandbox_name_what_its_clips_show() -> None:
    for first in SCENES:
        for second in SCENES:
            parts = (Part(first, "red", "left"), Part(second, "blue", "right"))
            shown = {first.phenomenon, second.phenomenon}
            for prompt in describe(parts[: len(shown)]):
                assert set(WISA.named_in(prompt, PHENOMENA)) == shown, prompt


def test_a_prompt_names_a_phenomenon_by_its_name_or_the_beginning_of_a_word() -> None:
    assert WISA.named_in("Smoke, REFLECTIONS\nand  melted wax", PHENOMENA) == (
        "gas motion",
        "melting",
        "reflection",
    )
    for prompt in ("", "a cat sits", "smelting", "anti-", "unburned"):
        assert WISA.named_in(prompt, PHENOMENA) == ()


def test_of_phrases_that_begin_together_the_longest_counts() -> None:
    assert WISA.named_in("a block swings on a spring", PHENOMENA) == ("elastic motion",)
    assert WISA.named_in("a block swings", PHENOMENA) == ("rigid body motion",)


def test_a_branch_of_another_taxonomy_is_named_by_its_own_names() -> None:
    assert WISA.named_in("ice melts; hard impacts", ("hard impact", "melting")) == ("hard impact", "melting")
    assert WISA.named_in("ice melts; hard impacts", ("burning",)) == ()
