"""The command line: what it teaches, and mistakes that end with one sentence and exit code 2."""

import json
import re
import shutil
import socket
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml

from pipelines.cli import main
from pipelines.config import Config
from pipelines.config.run import NEEDS
from pipelines.generation import generate
from pipelines.sandbox import simulate
from prophy.schema import MANIFEST
from tests.conftest import tiny_config

COMMANDS = ("simulate", "cache", "train", "generate", "serve", "demo")


class CommandLine:
    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self.monkeypatch, self.capsys = monkeypatch, capsys

    def __call__(self, *arguments: str) -> tuple[int, str, str]:
        """Exit code, standard output, standard error."""
        self.monkeypatch.setattr(sys, "argv", ["prophy", *arguments])
        with pytest.raises(SystemExit) as caught:
            main()
        code = caught.value.code or 0
        assert isinstance(code, int)
        return code, *self.capsys.readouterr()

    def mistake(self, *arguments: str) -> str:
        """The one sentence that a mistake ends with."""
        code, _, error = self(*arguments)
        assert code == 2, error
        assert "Traceback" not in error
        sentence = [line for line in error.splitlines() if line.startswith("error: ")]
        assert len(sentence) == 1, error
        return sentence[0]


@pytest.fixture
def prophy(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    return CommandLine(monkeypatch, capsys)


def in_folder(folder: Path, *overrides: str) -> list[str]:
    return [part for override in (f"run_dir={folder}", *overrides) for part in ("--set", override)]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_and_prints_its_configuration(
    prophy: CommandLine, command: str
) -> None:
    _, shown, _ = prophy(command, "--help")
    assert "--print-config" in re.sub(r"\x1b\[[0-9;]*m", "", shown)
    code, shown, _ = prophy(command, "--print-config", "--set", "train.learning_rate=1e-4")
    assert code == 0
    assert Config.model_validate(yaml.safe_load(shown)).train.learning_rate == 1e-4


def test_the_front_page_teaches(prophy: CommandLine) -> None:
    code, shown, _ = prophy("--help")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert code == 0
    for name in ("demo", "config", "simulate", "cache", "train", "generate", "serve", "request"):
        assert f"prophy {name}" in " ".join(shown.split()), name
    code, shown, _ = prophy("--version")
    assert code == 0 and shown.strip() == f"prophy-ray {version('prophy-ray')}"


def test_a_configuration_explains_itself(prophy: CommandLine, tmp_path: Path) -> None:
    arguments = in_folder(tmp_path, "train.num_steps=7")
    code, shown, _ = prophy("config", *arguments)
    assert code == 0 and "# Optimizer steps after which training ends" in shown
    assert shown == prophy("train", "--print-config", *arguments)[1]
    code, shown, _ = prophy("config", "train.num_steps", *arguments)
    assert code == 0 and yaml.safe_load(shown) == {"train": {"num_steps": 7}}
    assert "did you mean 'train.num_steps'" in prophy.mistake("config", "train.num_step")
    assert json.loads(prophy("config", "--schema")[1])["title"]


def test_a_command_names_the_section_that_its_file_lacks(prophy: CommandLine, tmp_path: Path) -> None:
    (tmp_path / "mine.yaml").write_text(f"run_dir: {tmp_path}")
    sentence = prophy.mistake("cache", "explain", "clip.mp4", "--config", str(tmp_path / "mine.yaml"))
    assert "`prophy cache explain` needs the sections vlm, cache, which" in sentence
    sentence = prophy.mistake("pretrain", "branch", "--config", str(tmp_path / "mine.yaml"))
    assert "`prophy pretrain branch` needs the sections backbone, vlm, physics, simulate, cache" in sentence


@pytest.mark.heavy
def test_commands_do_with_the_sections_that_they_say_they_need(prophy: CommandLine, tmp_path: Path) -> None:
    whole = tiny_config(tmp_path, "simulate.num_clips=1").model_dump(mode="json")
    outcomes = {
        "simulate": None,
        "plan": None,
        "cache verify": "no cache in",
        "cache inspect": "no cache in",
        "export new": "no checkpoint in",
    }
    for line, mistake in outcomes.items():
        sections = NEEDS[line.removesuffix(" new")]
        (tmp_path / "only.yaml").write_text(
            yaml.safe_dump({key: whole[key] for key in ("run_dir", "checkpoint", *sections)})
        )
        arguments = (*line.split(), "--config", str(tmp_path / "only.yaml"))
        if mistake is None:
            code, _, error = prophy(*arguments)
            assert code == 0, error
        else:
            assert mistake in prophy.mistake(*arguments)
    assert (tmp_path / "clips" / MANIFEST).exists()


def test_misspelt_key(prophy: CommandLine) -> None:
    assert "did you mean 'train.learning_rate'" in prophy.mistake("train", "--set", "train.learning_rat=1")


def test_folder_of_another_run(prophy: CommandLine, tmp_path: Path) -> None:
    simulate.run(tiny_config(tmp_path, "simulate.num_clips=1"))
    sentence = prophy.mistake("simulate", *in_folder(tmp_path, "simulate.num_clips=2"))
    assert "belongs to another run: simulate.num_clips is 1 there and 2 here" in sentence


def test_the_commands_of_the_cache_take_their_options_after_their_names(
    prophy: CommandLine, tmp_path: Path
) -> None:
    for command in ("verify", "prune", "inspect", "explain"):
        assert "--set" in re.sub(r"\x1b\[[0-9;]*m", "", prophy("cache", command, "--help")[1])
    sentence = prophy.mistake("cache", *in_folder(tmp_path), "verify")
    assert "options of `prophy cache verify` come after its name" in sentence
    assert f"no cache in {tmp_path / 'cache'}" in prophy.mistake("cache", "verify", *in_folder(tmp_path))


def test_no_videos(prophy: CommandLine, ray_cluster: None, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    overrides = in_folder(tmp_path / "run", f"cache.input={tmp_path / 'empty'}")
    assert str(tmp_path / "empty") in prophy.mistake("cache", *overrides)
    overrides = in_folder(tmp_path / "run", f"cache.input={tmp_path / 'nowhere'}")
    assert str(tmp_path / "nowhere") in prophy.mistake("cache", *overrides)


def test_train_without_a_cache(prophy: CommandLine, ray_cluster: None, tmp_path: Path) -> None:
    assert "prophy cache" in prophy.mistake("train", *in_folder(tmp_path))


def test_encodings_of_another_grid(
    prophy: CommandLine, ray_cluster: None, tiny_cache: Config, tmp_path: Path
) -> None:
    overrides = in_folder(tmp_path, f"cache.output={tiny_cache.cache.output}", "backbone.height=32")
    assert "prophy cache" in prophy.mistake("train", *overrides)


@pytest.mark.parametrize("prompt", ["", "   "])
def test_empty_prompt(prophy: CommandLine, ray_cluster: None, tmp_path: Path, prompt: str) -> None:
    assert "prompt" in prophy.mistake("generate", "--prompt", prompt, *in_folder(tmp_path))


def test_missing_prompt_file(prophy: CommandLine, tmp_path: Path) -> None:
    assert "no prompt file" in prophy.mistake("generate", "--prompts", str(tmp_path / "none.txt"))
    assert "no prompt file" in prophy.mistake("generate", "--prompts", str(tmp_path))
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    assert "no prompt file" in prophy.mistake("generate", "--prompts", str(tmp_path / "a.png"))
    (tmp_path / "list.jsonl").write_text('{"prompt": "a ball", "image": "a.png"}\n')
    mistake = prophy.mistake("generate", "--prompts", str(tmp_path / "list.jsonl"))
    assert "give one per line and nothing else: prompts in --prompts, and images" in mistake


def test_prompts_are_lines_as_editors_of_any_system_write_them(
    prophy: CommandLine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken: list[str] = []
    monkeypatch.setattr(generate, "run", lambda config, prompts, images: taken.extend(prompts))
    prompts = tmp_path / "prompts.txt"
    prompts.write_bytes("\ufeffa ball\u2028falls\r\n\r\na cube\u0085melts\nsmoke".encode())
    code, _, error = prophy("generate", "--prompts", str(prompts), *in_folder(tmp_path))
    assert code == 0, error
    assert taken == ["a ball\u2028falls", "a cube\u0085melts", "smoke"]


@pytest.mark.parametrize("command", [("generate", "--prompt", "a ball falls"), ("serve",)])
def test_checkpoint_of_another_backbone(
    prophy: CommandLine, ray_cluster: None, branch_checkpoint: Path, tmp_path: Path, command: tuple[str, ...]
) -> None:
    other = tmp_path / "other"
    shutil.copytree(branch_checkpoint, other)
    for file in other.glob("*.json"):
        file.write_text(re.sub(r'("fingerprint": ")[0-9a-f]+', r"\g<1>0123456789abcdef", file.read_text()))
    sentence = prophy.mistake(*command, *in_folder(tmp_path / "run", f"checkpoint={other}"))
    assert "backbone" in sentence and str(other) in sentence


def test_checkpoint_that_is_not_there(prophy: CommandLine, ray_cluster: None, tmp_path: Path) -> None:
    sentence = prophy.mistake("serve", *in_folder(tmp_path, f"checkpoint={tmp_path / 'none'}"))
    assert str(tmp_path / "none") in sentence


def test_port_that_is_taken(prophy: CommandLine, ray_cluster: None, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert str(port) in prophy.mistake("serve", *in_folder(tmp_path, f"serve.port={port}"))


@pytest.mark.parametrize(
    "arguments",
    [
        ("simulate", "--contact-sheet"),
        ("generate", "-p", "a ball", "--contact-sheet"),
        ("cache", "inspect", "--output"),
        ("request", "a ball", "--out"),
    ],
    ids=" ".join,
)
def test_a_url_is_no_local_path(prophy: CommandLine, arguments: tuple[str, ...]) -> None:
    said = prophy.mistake(*arguments, "s3://bucket/x.png")
    assert "s3://bucket/x.png is a URL; give a path of this machine" in said


def test_an_export_goes_to_a_folder_or_to_s3(prophy: CommandLine) -> None:
    said = prophy.mistake("export", "gs://bucket/x")
    assert "gs://bucket/x is no place to write to: set this to a folder, or to a place in S3 such as" in said
