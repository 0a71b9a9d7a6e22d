"""The names of files of a comparison: another code of what decides their content is another file."""

import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import pytest

from pipelines.config import Config, load_config
from pipelines.evaluation import work
from pipelines.evaluation.contestants import Entrant, enter
from pipelines.evaluation.items import Clip, Item
from pipelines.evaluation.work import Denoising, Filming
from prophy.backbones.pretrained import encoders_fingerprint
from prophy.errors import ProPhyError
from prophy.hashing import sources_sha256
from prophy.tiny.pipeline import pipeline_folder

Names = tuple[set[Path], set[Path], set[Path]]


@pytest.fixture
def names_of(tmp_path: Path) -> Callable[[], Names]:
    """The files of scores of clips, of videos, and the videos, each time that it is called."""
    pairs = tmp_path / "pairs.csv"
    pairs.write_text("path,caption,wrong_caption\na.mp4,a ball falls,a candle burns\n")
    sizes = [
        "evaluate.measures=[loss,captions,laws,videos]",
        "evaluate.num_clips=2",
        "evaluate.clips_per_law=1",
        "evaluate.num_prompts=3",
    ]
    config: Config = load_config("tiny", [f"run_dir={tmp_path}", f"evaluate.pairs={pairs}", *sizes])
    entrants: list[Entrant] = enter(config)[:1]

    def names() -> Names:
        clips, films = Denoising(config, entrants), Filming(config, entrants)
        return (
            {path for _, path in clips.files},
            {path for _, path in films.files},
            {path for videos in films.videos for path in videos.values()},
        )

    return names


@pytest.mark.parametrize(
    ("changed", "are_others"),
    [
        ("prophy/sandbox", (True, True, False)),
        ("evaluation/denoising.py", (True, False, False)),
        ("evaluation/semantics.py", (False, True, False)),
        ("prophy/generation", (False, True, True)),
        ("prophy/nothing", (False, False, False)),
    ],
)
def test_another_code_has_other_files(
    names_of: Callable[[], Names],
    monkeypatch: pytest.MonkeyPatch,
    changed: str,
    are_others: tuple[bool, bool, bool],
) -> None:
    before = names_of()

    def edited(*places: Path) -> str:
        return sources_sha256(*places) + "edited" * any(str(place).endswith(changed) for place in places)

    monkeypatch.setattr(work, "sources_sha256", edited)
    after = names_of()
    assert tuple(not ours & theirs for ours, theirs in zip(before, after, strict=True)) == are_others


@pytest.mark.parametrize(
    ("sample", "changed", "is_refused"),
    [
        ("a-0", None, False),
        ("a-0", "transformer/config.json", False),
        ("a-0", "vae/config.json", True),
        ("a-0", "tokenizer/tokenizer.json", True),
        (None, "vae/config.json", False),
    ],
)
def test_a_contestant_reads_the_cache_if_its_encoders_are_the_same_wherever_they_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sample: str | None, changed: str | None, is_refused: bool
) -> None:
    items = [Item(unit="a", clip=Clip(sample=sample), caption="a ball falls")]
    monkeypatch.setattr(work, "find_items", lambda config: items)
    config = load_config("tiny", [f"run_dir={tmp_path}", "evaluate.clips=cache"])
    folder = shutil.copytree(pipeline_folder(), tmp_path / "export")
    if changed is not None:
        with (folder / changed).open("a") as file:
            file.write(" ")
    [own, _] = enter(config)
    backbone = config.backbone.model_copy(update={"pretrained": str(folder)})
    encoders = encoders_fingerprint("wan", str(folder), None)
    other = replace(
        own, name="other", config=config.model_copy(update={"backbone": backbone}), encoders=encoders
    )
    said = "the contestant 'other' of .* has another VAE or text encoder than"
    with pytest.raises(ProPhyError, match=said) if is_refused else nullcontext():
        assert Denoising(config, [own, other]).files


def test_files_that_would_be_read_otherwise_are_encoded_again(
    names_of: Callable[[], Names], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names_of()
    monkeypatch.setattr(work, "FRAMES_VERSION", "another")
    after = names_of()
    assert before[0] - after[0], "the scores of the pair"
    assert before[0] & after[0] and not before[1] & after[1]


def test_videos_that_would_be_written_otherwise_are_made_again(
    names_of: Callable[[], Names], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = names_of()
    monkeypatch.setattr(work, "WRITING_VERSION", "another")
    after = names_of()
    assert before[0] == after[0] and not before[1] & after[1] and not before[2] & after[2]
