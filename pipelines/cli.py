"""`prophy <command>`: one command per step of the product. Nothing but argument parsing.

Each command imports its module only after its configuration is known to be right: torch and Ray take seconds.

Mistakes of the user end with one sentence and exit code 2; anything else is a bug and shows its traceback.
"""

import logging
import os
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.logging import RichHandler
from rich.markup import escape

from pipelines.config import (
    Config,
    Part,
    folder_or_s3,
    is_url,
    json_schema,
    load_config,
    preset_names,
    section_to_yaml,
    to_yaml,
)
from prophy.errors import ProPhyError

app = typer.Typer(
    name="prophy",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
)

ConfigOption = Annotated[
    str, typer.Option("--config", "-c", help=f"Preset ({', '.join(preset_names())}) or YAML file.")
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        "-s",
        metavar="KEY=VALUE",
        help="Change a value, such as train.learning_rate=1e-4. Repeatable.",
    ),
]
PrintOption = Annotated[
    bool, typer.Option("--print-config", help="Print what would run, every key explained, and stop.")
]


def path(text: object) -> Path:
    """A path of this machine, as the parser of an option: the class would take `s3://bucket` for one."""
    if is_url(str(text)):
        raise ProPhyError(f"{text} is a URL; give a path of this machine, or of a folder that it sees")
    return Path(str(text))


def place(text: object) -> str:
    """A folder of this machine or a place in S3, as the parser of an argument."""
    try:
        return folder_or_s3(str(text))
    except ValueError as error:
        raise ProPhyError(f"{text} is no place to write to: {error}") from None


PRESET = "tiny"  # what a command runs without --config: the small models

_START, _DATA = "Start here", "Training data"
_TRAINING, _VIDEOS, _DEFAULT = "Training", "Videos", "The embedded default"


def _configure(command: str, name: str, overrides: list[str] | None, print_config: bool) -> Config:
    config = load_config(name, overrides, None if print_config else command)
    if print_config:
        typer.echo(to_yaml(config), nl=False)
        raise typer.Exit
    return config


def _print_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"prophy-ray {version('prophy-ray')}")
        raise typer.Exit


@app.callback()
def prophy(
    _: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version, and stop."
        ),
    ] = False,
) -> None:
    """Train and run physics-aware video generation: a Physical Branch beside a video diffusion model.

    `prophy demo` does all of it on small models that come with the product, in some minutes on a laptop. The
    steps, each a command:

    1. `prophy simulate` makes clips to learn from; or take your own videos.
    2. `prophy cache` asks a vision-language model what physics they show and where, and encodes them.
    3. `prophy train` trains the branch on the cache.
    4. `prophy generate` makes videos, `prophy serve` offers them over HTTP, `prophy request` asks it for one.

    A run is one YAML file: `--config` takes a preset or your own, `--set section.key=value` changes single
    values, and `prophy config` prints all keys with their meaning. What was interrupted goes on when the same
    command is given again.
    """


@app.command(rich_help_panel=_START)
def config(
    section: Annotated[
        str | None, typer.Argument(help="A part of it, such as train or cache.limits; by default all.")
    ] = None,
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    schema: Annotated[
        bool, typer.Option("--schema", help="Print the JSON schema of configurations, for editors.")
    ] = False,
) -> None:
    """Print a configuration, every key explained: a file that --config takes."""
    if schema:
        typer.echo(json_schema(), nl=False)
        return
    resolved = load_config(config, set_)
    typer.echo(to_yaml(resolved) if section is None else section_to_yaml(resolved, section), nl=False)


@app.command(rich_help_panel=_DATA)
def simulate(
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
    contact_sheet: Annotated[
        Path | None,
        typer.Option(parser=path, help="Also write a picture of the first clips and their masks."),
    ] = None,
) -> None:
    """Write simulated physics clips: mp4 files and a manifest with captions, phenomena, masks and tracks."""
    resolved = _configure("simulate", config, set_, print_config)
    from pipelines.sandbox import simulate

    simulate.run(resolved, contact_sheet)


cache_app = typer.Typer(
    help="Cache physics priors (VLM) and encodings (VAE, text) of all videos to Parquet. Resumes by itself. "
    "Without a command, it caches.",
)
app.add_typer(cache_app, name="cache", rich_help_panel=_DATA)


@cache_app.callback(invoke_without_command=True)
def cache(
    context: typer.Context,
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
) -> None:
    """Cache physics priors (VLM) and encodings (VAE, text) of all videos to Parquet. Resumes by itself."""
    if command := context.invoked_subcommand:
        if set_ or print_config or config != PRESET:
            raise ProPhyError(f"options of `prophy cache {command}` come after its name")
        return
    resolved = _configure("cache", config, set_, print_config)
    from pipelines.caching import cache

    cache.run(resolved)


@cache_app.command()
def verify(config: ConfigOption = PRESET, set_: SetOption = None) -> None:
    """Check every file of the cache, set damaged ones aside, rebuild the indices."""
    resolved = load_config(config, set_, "cache verify")
    from pipelines.caching import verify

    verify.run(resolved)


@cache_app.command()
def prune(config: ConfigOption = PRESET, set_: SetOption = None) -> None:
    """Remove from the disk what is cached of videos that are in the input no more.

    The input is that of the last `prophy cache`. A training at work goes on, unless it draws what is removed.
    """
    resolved = load_config(config, set_)
    from pipelines.caching import prune

    prune.run(resolved)


@cache_app.command()
def inspect(
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    clips: Annotated[int, typer.Option(min=1, help="How many clips the picture shows.")] = 8,
    output: Annotated[
        Path, typer.Option(parser=path, help="The picture: frames, caption, phenomena, maps.")
    ] = Path("cache.png"),
) -> None:
    """Print what the cache holds, and draw some of its clips with their maps."""
    resolved = load_config(config, set_, "cache inspect")
    from pipelines.caching import inspect

    inspect.inspect(resolved, clips, output)


@cache_app.command()
def explain(
    clip: Annotated[str, typer.Argument(help="A video; its first clip is shown to the VLM.")],
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    phenomenon: Annotated[
        list[str] | None, typer.Option(help="Ask for this one, not for those that the VLM names. Repeatable.")
    ] = None,
    output: Annotated[Path, typer.Option(parser=path, help="The picture: one row of maps per layer.")] = Path(
        "explain.png"
    ),
) -> None:
    """Draw where each layer of the VLM looks, on average over vlm.heads: for choosing vlm.layers."""
    resolved = load_config(config, set_, "cache explain")
    from pipelines.caching import inspect

    inspect.explain(resolved, clip, phenomenon or [], output)


@app.command(rich_help_panel=_TRAINING)
def train(config: ConfigOption = PRESET, set_: SetOption = None, print_config: PrintOption = False) -> None:
    """Train the Physical Branch on the cache with Ray Train and DeepSpeed. Resumes by itself."""
    resolved = _configure("train", config, set_, print_config)
    from pipelines.training import train

    train.run(resolved)


@app.command(rich_help_panel=_TRAINING)
def plan(
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
    gpus: Annotated[
        int | None, typer.Option(min=1, help="Number of GPUs, all of one kind; by default train.num_workers.")
    ] = None,
    gpu_memory: Annotated[float, typer.Option(min=1, help="Memory of one GPU, in GB.")] = 80.0,
    price: Annotated[
        float | None, typer.Option(min=0, help="Price of one GPU for an hour, in any currency.")
    ] = None,
) -> None:
    """Predict how much memory `prophy train` takes on each GPU, what fits, and the fastest settings.

    And how long that takes, what the priors and the encodings of 1,000 clips take, and what memory
    `prophy serve` takes.

    Needs no GPU and no weights. The published models of the presets are known; of another one the
    configuration is read, from its folder or from the hub.

    ZeRO 0 keeps everything on every GPU. ZeRO 1 shares out the optimizer's state, ZeRO 2 the gradients too,
    and ZeRO 3 all parameters, the frozen ones as well; the higher, the more has to be communicated. Offload
    moves the optimizer, or also the parameters, to the CPU's memory, which is slower than any of them.
    Gradient checkpointing keeps few activations and computes the rest again.
    """
    workers = [] if gpus is None else [f"train.num_workers={gpus}"]
    resolved = _configure("plan", config, [*(set_ or []), *workers], print_config)
    from pipelines.training import plan

    plan.run(resolved, gpu_memory, price)


@app.command(rich_help_panel=_TRAINING)
def export(
    output: Annotated[
        str, typer.Argument(parser=place, help="New folder to write, or a place in S3: s3://bucket/folder.")
    ],
    complete: Annotated[
        bool, typer.Option(help="A whole diffusers pipeline with a model card, not the branch alone.")
    ] = False,
    step: Annotated[
        str | None,
        typer.Option(
            help="Which checkpoint: a number, or best (lowest held-out loss); by default the latest."
        ),
    ] = None,
    other: Annotated[
        Path | None,
        typer.Option(
            "--with",
            parser=path,
            help="What another run trained beside the other of the backbone's two transformers: writes both.",
        ),
    ] = None,
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
) -> None:
    """Turn a training checkpoint, of any ZeRO stage, into safetensors. Needs no GPU and little memory."""
    resolved = _configure("export", config, set_, print_config)
    if step is not None and step != "best" and not step.isdecimal():
        raise ProPhyError(f"--step is {step!r}; give the number of a checkpoint's steps, or best")
    number = int(step) if step is not None and step.isdecimal() else None
    which: int | Literal["best"] | None = "best" if step == "best" else number
    from pipelines.training import export, upload

    if is_url(output):
        upload.run(resolved, output, which, complete, other)
    else:
        export.run(resolved, Path(output).resolve(), which, complete, other)


@app.command(rich_help_panel=_VIDEOS)
def generate(
    prompt: Annotated[list[str] | None, typer.Option("--prompt", "-p", help="A prompt. Repeatable.")] = None,
    prompts: Annotated[
        Path | None, typer.Option(parser=path, help="Text file with one prompt per line.")
    ] = None,
    image: Annotated[
        list[Path] | None,
        typer.Option("--image", "-i", parser=path, help="What videos begin with: one for each, or for all."),
    ] = None,
    images: Annotated[
        Path | None,
        typer.Option(parser=path, help="Text file with one image per line, in the order of the prompts."),
    ] = None,
    contact_sheet: Annotated[
        Path | None, typer.Option(parser=path, help="Also write a picture of all videos.")
    ] = None,
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
) -> None:
    """Make videos from prompts, and from images where the model takes them, offline, with Ray Data."""
    resolved = _configure("generate", config, set_, print_config)
    texts, pictures = list(prompt or []), list(image or [])
    if prompts is not None:
        texts += _read_lines(prompts, "prompt")
    if images is not None:
        pictures += [images.parent / line for line in _read_lines(images, "image")]
    from pipelines.generation import generate
    from pipelines.pictures import check_picture

    if contact_sheet is not None:
        check_picture(contact_sheet)
    videos = generate.run(resolved, texts, pictures)
    if contact_sheet is not None:
        generate.write_contact_sheet(resolved, texts, videos, contact_sheet)


def _read_lines(path: Path, what: str) -> list[str]:
    """The lines of a file that are not blank; `what` each is."""
    try:
        # Not `splitlines`, which cuts a prompt at what Unicode calls a line separator too.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError):
        raise ProPhyError(f"no {what} file {path}; give a text file with one {what} per line") from None
    if any(line.lstrip().startswith("{") for line in lines):
        raise ProPhyError(
            f"{path} holds more than {what}s; give one per line and nothing else: prompts in --prompts, and "
            "images, where the model takes them, in --images"
        )
    return [line for line in lines if line.strip()]


@app.command(rich_help_panel=_VIDEOS)
def evaluate(
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
    ablation: Annotated[
        bool,
        typer.Option(
            "--ablation",
            help="Train the rows of the paper's ablation on the cache, and compare these with the backbone.",
        ),
    ] = False,
) -> None:
    """Compare models: does the branch, a checkpoint or a knob make anything better? Resumes by itself.

    All contestants see the same clips, captions, prompts, seeds and noise. What comes out is `report.html`,
    where every figure has its 95 % interval and every difference is paired, and `scores.parquet`.

    Without anything, the embedded model is compared with its branch off and on, in some minutes. What is
    compared stands in a file:

        extends: tiny
        run_dir: runs/compare
        evaluate:
          contestants:
            backbone: {}                                    # the others are compared with the first
            shipped: {checkpoint: tiny}
            mine: {checkpoint: runs/mine}                   # a run_dir, also while it trains
            stronger: {checkpoint: tiny, scale: 2}
          measures: [loss, captions, laws]                  # these generate nothing

    `prophy config evaluate` explains all keys. Your own clips are `evaluate.clips=cache` and
    `evaluate.pairs=LIST`.
    """
    resolved = _configure(f"evaluate{' --ablation' * ablation}", config, set_, print_config)
    if ablation:
        from pipelines.evaluation import ablation as rows

        rows.run(resolved)
        return
    from pipelines.evaluation import evaluate

    evaluate.run(resolved)


@app.command(rich_help_panel=_VIDEOS)
def serve(config: ConfigOption = PRESET, set_: SetOption = None, print_config: PrintOption = False) -> None:
    """Serve the OpenAI Videos API over HTTP with replicas that scale by themselves, until Ctrl-C."""
    resolved = _configure("serve", config, set_, print_config)
    from pipelines.serving import serve

    serve.run(resolved)


@app.command(rich_help_panel=_VIDEOS)
def request(
    prompt: Annotated[str, typer.Argument(help="What the video shows.")],
    out: Annotated[Path, typer.Option("--out", "-o", parser=path, help="The mp4 to write.")],
    url: Annotated[str, typer.Option(help="Where the server is.")] = "http://127.0.0.1:8000",
    api_key: Annotated[
        str | None, typer.Option(envvar="PROPHY_API_KEY", help="The key, if the server asks for one.")
    ] = None,
    fields: Annotated[
        list[str] | None,
        typer.Option(
            "--field", "-f", metavar="NAME=VALUE", help="Such as seconds=2 or physics.scale=0.5. Repeatable."
        ),
    ] = None,
    image: Annotated[
        Path | None, typer.Option(parser=path, help="A picture to start from, for a model that takes one.")
    ] = None,
) -> None:
    """Ask a server for a video, watch its progress, and save it. Ctrl-C cancels it on the server too."""
    from pipelines.serving import client

    client.run(url, prompt, out, fields or [], api_key, image)


@app.command(rich_help_panel=_VIDEOS)
def key() -> None:
    """Make an API key for a server: the key goes to a client, its hash into serve.api_keys."""
    from pipelines.serving.middleware import hash_key, new_key

    made = new_key()
    typer.echo(f"key:  {made}\nhash: {hash_key(made)}")


@app.command(rich_help_panel=_DEFAULT)
def pretrain(
    part: Annotated[
        Part,
        typer.Argument(
            help="vlm, vae, text_encoder, backbone, branch, each after those before it, or bundle."
        ),
    ],
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
) -> None:
    """Train a part of the embedded default from nothing, on simulated clips; `bundle` puts it in place."""
    resolved = _configure("pretrain branch" if part == "branch" else "pretrain", config, set_, print_config)
    from pipelines.sandbox import pretrain

    pretrain.run(resolved, part)


@app.command(rich_help_panel=_START)
def doctor(config: ConfigOption = PRESET, set_: SetOption = None) -> None:
    """Check that this machine or cluster has what a run needs: room, folders, versions, database."""
    resolved = load_config(config, set_)
    from pipelines import doctor

    doctor.run(resolved)


@app.command(rich_help_panel=_START)
def demo(
    config: ConfigOption = PRESET,
    set_: SetOption = None,
    print_config: PrintOption = False,
) -> None:
    """Run every step on the embedded default, in order, and write a report with pictures."""
    resolved = _configure("demo", config, ["run_dir=runs/demo", *(set_ or [])], print_config)
    from pipelines import demo

    demo.run(resolved)


def main() -> None:
    """Entry point of the `prophy` script."""
    logging.basicConfig(
        level=logging.INFO, format="%(message)s", datefmt="%X", handlers=[RichHandler(show_path=False)]
    )
    for name in ("pipelines", "prophy"):
        logging.getLogger(name).setLevel(logging.INFO)
    logging.getLogger("httpx").setLevel(logging.WARNING)  # each request
    # Whatever loads diffusers loads DeepSpeed, whose first word on a laptop is a warning that it has no GPU.
    logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.msg)
    # Workers inherit it: no bar for each file that a library loads.
    os.environ.setdefault("TQDM_DISABLE", "1")
    try:
        app()
    except ProPhyError as error:
        text = f"[bold red]error:[/] {escape(str(error))}"
        Console(stderr=True, emoji=False).print(text, highlight=False, soft_wrap=True)
        sys.exit(2)


if __name__ == "__main__":
    main()
