"""Reading a configuration: strict keys, overrides, presets, files that extend others or lack sections."""

from pathlib import Path

import pytest

from pipelines.config import RESOLVED, Config, load_config, preset_names, to_yaml
from prophy.errors import ProPhyError


@pytest.mark.parametrize("name", preset_names())
def test_presets_are_valid_and_round_trip(name: str, tmp_path: Path) -> None:
    config = load_config(name)
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "copy.yaml")) == config


@pytest.mark.parametrize(
    "key",
    [
        "run_dir",
        "serve.output",
        "simulate.output",
    ],
)
@pytest.mark.parametrize("url", ["s3://bucket/x", "gs://bucket", "file:///tmp/x"])
def test_what_must_be_a_folder_is_not_taken_from_a_url(key: str, url: str) -> None:
    with pytest.raises(ProPhyError, match=rf"'{key}' .*this cannot be a URL; set it to a folder.*{url}"):
        load_config("tiny", [f"{key}={url}"])


def test_videos_and_models_are_in_a_folder_or_in_s3(tmp_path: Path) -> None:
    places = {
        "s3://bucket/videos/": "s3://bucket/videos",
        "s3://bucket": "s3://bucket",
        "~/videos": str(Path.home() / "videos"),
        str(tmp_path): str(tmp_path),
    }
    for place, meant in places.items():
        assert load_config("tiny", [f"generate.output={place}"]).generate.output == meant
        assert load_config("tiny", [f"checkpoint={place}"]).checkpoint == meant
        assert load_config("tiny", [f"cache.output={place}"]).cache.output == meant
    for url in ("gs://bucket/x", "file:///tmp/x", "s3://", "s3:///x", "simplecache::s3://bucket/x"):
        keys = ("cache.output", "generate.output", "checkpoint", "train.start_from", "train.checkpoints")
        for key in (*keys, "backbone.pretrained"):
            with pytest.raises(ProPhyError, match=rf"'{key}' .*a folder, or to a place in S3.*{url}"):
                load_config("tiny", [f"{key}={url}"])


def test_override_wins_and_is_typed() -> None:
    config = load_config(
        "tiny", ["train.learning_rate=1e-4", "physics.physics_layers=[1,3]", "run_dir=elsewhere"]
    )
    assert config.train.learning_rate == 1e-4
    assert config.physics.physics_layers == [1, 3]
    assert config.cache.output == str(Path("elsewhere/cache").absolute())  # references follow the override


@pytest.mark.parametrize(
    "text",
    [
        "/data/out #2",
        "/data/a: b",
        "/data/yes:",
        "/data/[1]{2}",
        "/data/'it' \"is\"",
        "/data/ends in a space ",
        "/data/two\nlines",
        "/data/a=b\\c%20d,é~",
    ],
)
def test_a_path_arrives_as_it_was_typed(text: str) -> None:
    config = load_config("tiny", [f"cache.{key}={text}" for key in ("input", "output")] + [f"run_dir={text}"])
    assert (config.cache.input, config.cache.output, config.run_dir) == (text, text, Path(text))


@pytest.mark.parametrize(
    "text",
    ["yes", "1e3", "a: b", "*a", "&a", "!a", "@a", "`a`", "a:", "- a", "", "null", "# a", "[a", "2024"],
)
def test_a_text_is_not_read_as_yaml(text: str) -> None:
    assert load_config("tiny", [f"sampling.negative_prompt={text}"]).sampling.negative_prompt == text
    if text:
        revision = load_config("tiny", [f"vlm.revision={text}"]).vlm.revision
        assert revision == (None if text == "null" else text)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "run_dir=",
            "bad value for 'run_dir' on the command line: this is empty; set it to a place, or to .",
        ),
        ("run_dir= ", "this is empty"),
        ("cache.input=", "bad value for 'cache.input' on the command line: this is empty"),
        ("cache.output=", "this is empty"),
        ("evaluate.output=", "this is empty"),
        ("backbone.pretrained=", "this is empty"),
        ("taxonomy=", "this is empty"),
        ("checkpoint=", "checkpoint is empty on the command line; give it a value, or write checkpoint=null"),
        ("train.checkpoints=", "write train.checkpoints=null"),
        ("checkpoint", "'checkpoint' sets nothing; write KEY=VALUE, such as"),
        ("train.num_steps", "'train.num_steps' sets nothing"),
    ],
)
def test_a_variable_of_the_shell_that_is_not_set_is_no_folder(override: str, message: str) -> None:
    with pytest.raises(ProPhyError, match=message):
        load_config("tiny", [override])


def test_an_empty_place_in_a_file_is_no_folder(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("extends: tiny\ncache: {output: ''}\n")
    with pytest.raises(ProPhyError, match=r"'cache.output' in .*run.yaml: this is empty"):
        load_config(str(path))


def test_other_values_are_yaml() -> None:
    overrides = [
        "checkpoint=~",
        "train.sample_prompts=[a b, 'c: d']",
        "vlm.layers=null",
        "cache.read={size: 3}",
    ]
    config = load_config("tiny", [*overrides, "train.caption_dropout=1e-1 # a tenth"])
    assert (config.checkpoint, config.vlm.layers) == (None, None)
    assert config.train.sample_prompts == ["a b", "c: d"]
    assert (config.cache.read.size, config.train.caption_dropout) == (3, 0.1)


def test_a_tilde_is_the_home_folder() -> None:
    config = load_config("tiny", ["run_dir=~/runs", "cache.input=~/a b"])
    assert (config.run_dir, config.cache.input) == (Path.home() / "runs", str(Path.home() / "a b"))


def test_local_paths_become_absolute_and_the_rest_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "model").mkdir()
    monkeypatch.chdir(tmp_path)
    config = load_config(
        "tiny",
        ["cache.input=s3://bucket/clips", "backbone.pretrained=model", "checkpoint=c", "vlm.pretrained=a/b"],
    )
    assert config.cache.input == "s3://bucket/clips"
    assert config.backbone.pretrained == str(tmp_path / "model")
    assert config.checkpoint == str(tmp_path / "c")
    assert config.vlm.pretrained == "a/b"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "train.learing_rate=1",
            "unknown key 'train.learing_rate' on the command line; did you mean 'train.learning_rate'",
        ),
        ("train.lora.rank=2", "unknown key 'train.lora' on the command line; did you mean 'train.lora_rank'"),
        ("backbone.aspect_buckets=[[1]]", "missing key 'backbone.aspect_buckets.0.1' on the command line"),
        ("train=[1]", "tiny.yaml with what the command line adds is not a valid configuration"),
        ("cache.read.sise=2", "did you mean 'cache.read.size'"),
        ("trian=1", "did you mean 'train'"),
        ("train.num_steps=0", "bad value for 'train.num_steps' on the command line: .*greater than 0"),
        ("physics.top_k=9", r"top_k \(9\) must not exceed num_refinement_experts \(8\)"),
        (
            "train.num_workers=3",
            r"global_batch_size \(4\) must be a multiple of micro_batch_size \(2\) times num_workers \(3\)",
        ),
        ("train.min_workers=4", r"min_workers \(4\) is more than num_workers \(2\); lower it"),
        (
            "train.noise_levels=[0.9,0.5]",
            r"noise_levels begins at 0.9 and ends at 0.5; begin with the lesser",
        ),
        ("train.offload=all", "offload 'all' needs zero_stage 3 at least"),
        ("train={storage_dtype: float8_e4m3fn, zero_stage: 3}", "zero_stage is 3; set that to 2, or leave"),
        (
            "train={storage_dtype: float8_e4m3fn, backbone: full}",
            "for what is frozen, and backbone is 'full'",
        ),
        ("cache.input=${nowhere}", "nowhere"),
        ("sampling.step_cache.first_blok=0.1", "did you mean 'sampling.step_cache.first_block'"),
        (
            "sampling.step_cache={first_block: 0.1, taylorseer: 3}",
            "at most one of first_block, sea, taylorseer",
        ),
        ("sampling.step_cache.taylorseer=0", "bad value for 'sampling.step_cache.taylorseer'"),
        (
            "train.recipe=minus_all",
            "bad value for 'train.recipe' on the command line: .* set it to one of: none, minus_background, ",
        ),
        ("taxonomy=none.yaml", "bad value for 'taxonomy' on the command line: no taxonomy '/.*/none.yaml'"),
        ("cache.read=null", "bad value for 'cache.read' on the command line"),
    ],
)
def test_mistakes_name_the_key_and_the_cure(override: str, message: str) -> None:
    with pytest.raises(ProPhyError, match=message):
        load_config("tiny", [override])


def test_nothing_to_train() -> None:
    nothing = ["physics.physical_blocks=false"]
    nothing += [f"physics.num_{kind}_experts=0" for kind in ("semantic", "refinement")]
    with pytest.raises(ProPhyError, match="nothing to train: .*; set it to 'lora' or 'full'") as caught:
        load_config("tiny", nothing)
    assert len(str(caught.value)) < 400
    assert not load_config("tiny", [*nothing, "train.backbone=lora"]).physics.any


def test_an_evaluation_beside_the_workers_of_a_gpu() -> None:
    """It would take a GPU that a worker has."""
    beside = ["train.gpus_per_worker=1", "train.sample_prompts=[a ball falls]"]
    with pytest.raises(ProPhyError, match=r"evaluation_gpus is 0 while workers have gpus_per_worker \(1\)"):
        load_config("tiny", beside)
    assert load_config("tiny", [*beside, "train.evaluation_gpus=1"]).train.evaluates


def test_precisions_that_do_not_go_together() -> None:
    mixed = ["train.precision=fp32", "backbone.dtype=bfloat16"]
    with pytest.raises(
        ProPhyError, match="'fp32' cannot compute with backbone.dtype 'bfloat16'; set that to"
    ):
        load_config("tiny", mixed)
    assert load_config("tiny", [*mixed, "train.backbone=full"]).backbone.dtype == "bfloat16"


@pytest.mark.parametrize("section", ["backbone", "vlm"])
def test_a_size_that_no_clip_is_cut_to_is_refused(section: str) -> None:
    size = [f"{section}.height=728", f"{section}.width=1288"]
    with pytest.raises(ProPhyError, match=rf"'{section}' .*\[728, 1288\].* set aspect_buckets too, to null"):
        load_config("wan2.1-14b", size)
    for buckets in ("null", "[[728, 1288], [616, 616]]"):
        changed = load_config("wan2.1-14b", [*size, f"{section}.aspect_buckets={buckets}"])
        assert (728, 1288) in getattr(changed, section).frame_shapes


def test_a_file_that_was_read_is_not_overwritten(tmp_path: Path) -> None:
    written = write(tmp_path, cache=f"extends: tiny\nrun_dir: {tmp_path}\n")
    mine = write(tmp_path, mine="extends: cache.yaml\n")
    for path in (written, mine):
        for command in ("cache", "pretrain branch", "demo"):
            said = f"`prophy {command}` would overwrite {written}, which was read, .*; give that file another"
            with pytest.raises(ProPhyError, match=said):
                load_config(path, command=command)
        for command in ("train", "plan", "cache verify", "evaluate --ablation", None):
            load_config(path, command=command)
        load_config(path, [f"run_dir={tmp_path / 'elsewhere'}"], "cache")
    (tmp_path / "serve.yaml").mkdir()  # which no command was given
    load_config("tiny", [f"run_dir={tmp_path}"], "serve")
    Path(written).write_text(RESOLVED + Path(written).read_text())  # as a command leaves it
    load_config(written, command="cache")


@pytest.mark.parametrize("given", ["my-secret", "[[my-secret]]", "{my-secret: 1}", "[my-secret"])
def test_a_key_in_the_place_of_its_hash_is_not_shown(given: str) -> None:
    with pytest.raises(ProPhyError, match=r"serve.api_keys") as caught:
        load_config("tiny", [f"serve.api_keys={given}"])
    assert "my-secret" not in str(caught.value)


@pytest.mark.parametrize("key", ["run_dir", "train.num_steps", "vlm.layers", "sampling.negative_prompt"])
def test_a_value_that_is_to_be_given_is_missed(key: str, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=f"^{key} is \\?\\?\\? on the command line, .*; give it one$"):
        load_config("tiny", [f"{key}=???"])
    section, _, name = key.rpartition(".")
    line = f"{section}: {{{name}: '???'}}" if section else f"{name}: ???"
    template = write(tmp_path, template=f"extends: tiny\n{line}\n")
    with pytest.raises(ProPhyError, match=rf"^{key} is \?\?\? in .*/template.yaml, "):
        load_config(template)
    load_config(template, [f"{key}={[5] if name == 'layers' else 5}"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.num_steps=010", "YAML reads 010 as a number of base 8; write it in base 10, without a 0"),
        ("vlm.layers=[1, 07]", "YAML reads 07 as a number of base 8"),
        ("train.num_steps=1:30", "YAML reads 1:30 as a number of base 60"),
        ("train.zero_stage=yes", "give a number; YAML reads yes, no"),
        ("train.num_workers=yes", r"'train.num_workers' .*: give a number; YAML reads yes, no, .*got True"),
        ("train.learning_rate=on", "'train.learning_rate' .*give a number"),
        ("vlm.layers=[1, no]", "'vlm.layers' .*give a number"),
        ("vlm.aspect_buckets=[[64, 64], [yes, 64]]", "'vlm.aspect_buckets' .*give a number"),
        ("evaluate.contestants={a: {strength: {collision: on}}}", "contestants.a.strength' .*give a number"),
        ("serve.expire_after_s=off", "'serve.expire_after_s' .*give a number"),
        ("train.learning_rate=.inf", "'train.learning_rate' .*finite number"),
        ("sampling.guidance_scale=.inf", "'sampling.guidance_scale' .*finite number"),
        ("sampling.guidance_scale=.nan", "'sampling.guidance_scale' .*finite number"),
        ("train.cpus_per_worker=.inf", "'train.cpus_per_worker' .*finite number"),
        ("evaluate.contestants={a: {strength: {collision: .inf}}}", "finite number|less than or equal"),
    ],
)
def test_what_is_no_number_of_ours_is_not_taken_for_one(override: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(ProPhyError, match=message):
        load_config("tiny", [override])
    section, _, rest = override.partition(".")
    path = write(tmp_path, mine=f"extends: tiny\n{section}: {{{rest.replace('=', ': ', 1)}}}\n")
    with pytest.raises(ProPhyError, match=message):
        load_config(path)


def test_texts_of_digits_and_words_stay_texts(tmp_path: Path) -> None:
    assert load_config("tiny", ["backbone.revision=0123456"]).backbone.revision == "0123456"
    path = write(tmp_path, mine="extends: tiny\nbackbone: {revision: '0123456'}\ntrain: {seed: 0}\n")
    assert load_config(path).backbone.revision == "0123456"


def test_missing_file_lists_the_presets() -> None:
    with pytest.raises(ProPhyError, match="no configuration 'tinny'.*tiny"):
        load_config("tinny")


def test_broken_yaml_is_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "broken.yaml"
    for text in ("train: [1, 2", "[1]", "5"):
        path.write_text(text)
        with pytest.raises(ProPhyError, match="not a valid configuration") as caught:
            load_config(str(path))
        assert "\n" not in str(caught.value)


def test_configuration_is_frozen(config: Config) -> None:
    with pytest.raises(ValueError, match="frozen"):
        config.train.num_steps = 1  # type: ignore[misc]


def write(folder: Path, **files: str) -> str:
    """Writes YAML files and returns the path of the first."""
    folder.mkdir(exist_ok=True)
    for name, text in files.items():
        (folder / f"{name}.yaml").write_text(text)
    return str(folder / f"{next(iter(files))}.yaml")


def test_a_file_says_only_what_differs(tmp_path: Path) -> None:
    mine = write(
        tmp_path, mine="extends: shared/team.yaml\nrun_dir: runs/mine\ntrain: {num_steps: 7}\n", other=""
    )
    write(tmp_path / "shared", team="extends: tiny\ntrain: {num_steps: 5, seed: 3}\n")
    config = load_config(mine, ["train.log_every=2"])
    preset = load_config("tiny")
    assert (config.train.num_steps, config.train.seed, config.train.log_every) == (7, 3, 2)
    assert config.cache.input == str(Path("runs/mine/clips").absolute())
    assert config.physics == preset.physics and config.vlm == preset.vlm


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (
            {"a": "extends: b.yaml", "b": "extends: a.yaml"},
            "a.yaml, which extends .*b.yaml, which extends .*a.yaml",
        ),
        ({"a": "extends: a.yaml"}, "no file may extend itself"),
        ({"a": "extends: ../{tmp}/a.yaml"}, "no file may extend itself"),
        ({"a": "extends: tinny"}, "a.yaml extends 'tinny', which does not exist; .*tiny"),
        ({"a": "extends: [tiny]"}, r"a.yaml extends \['tiny'\]; give the name of a preset"),
        ({"a": "extends: b.yaml", "b": "train: ["}, "b.yaml is not a valid configuration"),
        (
            {"a": "extends: b.yaml", "b": "extends: tiny\ntrain: {num_stepps: 5}"},
            "unknown key 'train.num_stepps' in .*b.yaml; did you mean 'train.num_steps'",
        ),
        (
            {"a": "extends: b.yaml\ntrain: {seed: x}", "b": "extends: tiny\ntrain: {seed: 5}"},
            "bad value for 'train.seed' in .*a.yaml: .*got 'x'",
        ),
        (
            {"a": "extends: tiny\nphysics: {top_k: 9}"},
            "bad values for 'physics' in .*a.yaml extending .*tiny.yaml: top_k",
        ),
        (
            {"a": "extends: base\nrun_dir: x\nbackbone: {fps: 8, num_frames: 9}"},
            "missing key 'backbone.family' in .*a.yaml",
        ),
    ],
)
def test_mistakes_in_what_is_extended_name_the_file(
    tmp_path: Path, files: dict[str, str], message: str
) -> None:
    files = {name: text.replace("{tmp}", tmp_path.name) for name, text in files.items()}
    with pytest.raises(ProPhyError, match=message) as caught:
        load_config(write(tmp_path, **files))
    assert "\n" not in str(caught.value)


def test_what_presets_have_in_common_is_no_preset() -> None:
    assert "base" not in preset_names()
    with pytest.raises(ProPhyError, match="no configuration 'base'"):
        load_config("base")


SERVE_ALONE = """
run_dir: runs/served
backbone:
  {family: wan, pretrained: tiny, num_frames: 17, height: 64, width: 64, fps: 8, max_sequence_length: 32}
"""


def test_a_file_for_serve_alone_needs_no_other_section(tmp_path: Path) -> None:
    path = write(tmp_path, serve=SERVE_ALONE)
    config = load_config(path, command="serve")
    assert config.serve.output == Path("runs/served/serve").absolute()
    assert config.sampling.num_inference_steps == 50
    (tmp_path / "copy.yaml").write_text(to_yaml(config))
    assert load_config(str(tmp_path / "copy.yaml")) == config
    assert "train" not in config.model_dump()


def test_a_missing_section_is_named_with_the_command_that_needs_it(tmp_path: Path) -> None:
    path = write(tmp_path, serve=SERVE_ALONE)
    with pytest.raises(
        ProPhyError, match="`prophy train` needs the sections vlm, physics, cache, train, which .*serve.yaml"
    ):
        load_config(path, command="train")
    with pytest.raises(ProPhyError, match="`prophy simulate` needs the section simulate, which"):
        load_config(path, command="simulate")
    with pytest.raises(ProPhyError, match="this needs the section 'train', which the configuration does not"):
        _ = load_config(path).train
