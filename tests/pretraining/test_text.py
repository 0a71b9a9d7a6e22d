import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, UMT5EncoderModel

from prophy.pretraining.paraphrases import COLOUR_SYNONYMS, SCENE_PARAPHRASES, SIDE_PHRASES
from prophy.pretraining.text import TextRecipe, pretrain_text, say
from prophy.sandbox import COLOURS, SCENES, Part, describe, draw_parts

RECIPE = TextRecipe(num_steps=3, num_held_out=20, batch_size=4)
PAIR = (Part(SCENES[0], "red", "left"), Part(SCENES[2], "blue", "right"))


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("text")
    pretrain_text(folder, RECIPE)
    return folder


def test_writes_an_encoder_its_tokenizer_and_its_measurements(trained: Path) -> None:
    encoder = UMT5EncoderModel.from_pretrained(trained / "text_encoder")
    tokenizer = AutoTokenizer.from_pretrained(trained / "text_encoder")
    ids = tokenizer("a red ball", return_tensors="pt")
    assert encoder(**ids).last_hidden_state.shape == (1, 5, 192)  # [CLS] and [SEP] are two of them
    measured = json.loads((trained / "text_encoder.json").read_text())
    assert 0 <= measured["side"] <= 1 and measured["cpu_seconds"] > 0


def test_word_embeddings_stay_what_they_were(trained: Path) -> None:
    before = UMT5EncoderModel.from_pretrained(trained / "text_encoder").state_dict()
    progress = pretrain_text(trained, replace(RECIPE, num_steps=4))
    after = UMT5EncoderModel.from_pretrained(trained / "text_encoder").state_dict()
    assert len(progress.history) == 4
    changed = {name for name, value in before.items() if not torch.equal(after[name], value)}
    assert changed and not any("shared" in name or "embed_tokens" in name for name in changed)


def test_missing_words_are_learned_from_those_around_them(tmp_path: Path) -> None:
    recipe = TextRecipe(num_steps=24, num_held_out=20, task="missing_words", batch_size=16, seed=1)
    losses = [entry["missing_word"] for entry in pretrain_text(tmp_path, recipe).history]
    assert np.mean(losses[-6:]) < 0.8 * np.mean(losses[:6])
    assert (tmp_path / "text_encoder" / "model.safetensors").exists()


def test_every_word_that_is_taught_is_in_the_vocabulary(trained: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(trained / "text_encoder")
    rng = np.random.default_rng(0)
    for _ in range(200):
        ids = tokenizer(say(draw_parts(rng), rng, 0.5).text)["input_ids"]
        assert tokenizer.unk_token_id not in ids


def test_a_clause_knows_its_part() -> None:
    for seed in range(20):
        said = say(PAIR, np.random.default_rng(seed), 0.5)
        assert {part for _, _, part in said.clauses} == set(PAIR)
        for first, last, part in said.clauses:
            assert part.side in said.text[first:last] and "and" not in (said.text[first], said.text[last:])


def test_without_paraphrases_it_says_captions() -> None:
    rng = np.random.default_rng(0)
    assert {say(PAIR, rng, 0.0).text for _ in range(50)} <= set(describe(PAIR))


def test_paraphrases_are_of_every_scene_colour_and_side_and_no_captions() -> None:
    assert SCENE_PARAPHRASES.keys() == {scene.name for scene in SCENES}
    assert COLOUR_SYNONYMS.keys() == COLOURS.keys()
    assert SIDE_PHRASES.keys() == {"left", "right"}
    for scene in SCENES:
        assert not set(SCENE_PARAPHRASES[scene.name]) & set(scene.wordings)
        assert all("{colour}" in sentence for sentence in SCENE_PARAPHRASES[scene.name])
