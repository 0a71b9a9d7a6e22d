"""`prophy demo`: every step of the product, in order, on real files and real requests; ends with a report.

A second run in the same folder does only what is missing: every step resumes by itself.
"""

import json
import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from pipelines.caching import cache
from pipelines.caching.tables import file_names
from pipelines.config import Config, is_url
from pipelines.generation import generate
from pipelines.generation.spec import PhysicsSpec
from pipelines.layout import CacheFolder, RunFolder
from pipelines.runtime import ray_session
from pipelines.sandbox import simulate
from pipelines.serving import client, serve
from pipelines.training import train
from prophy import sandbox
from prophy.errors import ProPhyError
from prophy.evaluation.report import Section, Table, write_report
from prophy.schema import open_file, read_phenomena
from prophy.taxonomy import load_taxonomy

logger = logging.getLogger(__name__)

PROMPTS = (
    "a red ball falls and bounces on the right",
    "green liquid pours into a tank on the left",
    "a turquoise candle burns on the left",
    "a yellow light beam hits a mirror on the left and a blue pendulum swings on the right",
)
CURVES = ("loss", "diffusion", "semantic_alignment", "token_alignment", "load_balancing", "gradient_norm")


class Stopwatch:
    """Says which step runs, and remembers how long each took."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}

    @contextmanager
    def step(self, name: str) -> Iterator[None]:
        """Times the block under `name`."""
        logger.info("[%d] %s", len(self.seconds) + 1, name)
        start = time.monotonic()
        yield
        self.seconds[name] = time.monotonic() - start


def run(config: Config) -> Path:
    """Simulates, caches, trains, generates and serves, and writes `report.html` into the run folder.

    Returns:
        The path of the report.

    Raises:
        ProPhyError: what the steps raise; or `generate.output` is a URL.
    """
    if is_url(config.generate.output):
        raise ProPhyError(
            f"the demo's report shows videos of a folder, and generate.output is {config.generate.output}; "
            "leave it out, or set it to a folder"
        )
    watch = Stopwatch()
    trained = config.model_copy(update={"checkpoint": str(RunFolder(config.run_dir).model)})
    with ray_session(config):
        with watch.step("simulate: physics clips with exact masks"):
            manifest = simulate.run(config)
        with watch.step("cache: priors by the VLM, latents and text embeddings"):
            cache.run(config)
        with watch.step("train: the Physical Branch, with DeepSpeed"):
            train.run(config)
        with watch.step("generate: offline, with Ray Data"):
            videos = generate.run(trained, list(PROMPTS))
        first, image = sandbox.read_truth(manifest)[0], config.run_dir / "first_frame.png"
        Image.fromarray(first.frames[0]).save(image)
        served, continued = (config.run_dir / name for name in ("served.mp4", "continued.mp4"))
        with watch.step("serve: videos over HTTP, of text and from an image"), serve.serving(trained) as url:
            client.run(url, PROMPTS[0], served, ["seed=1"])
            client.run(url, first.caption, continued, ["seed=1"], image=image)
    with watch.step("report"):
        offline = dict(zip(PROMPTS, map(Path, videos), strict=True))
        report = _report(trained, manifest, offline, {PROMPTS[0]: served}, continued, watch)
    logger.info("the report is %s", report.resolve())
    logger.info(
        "make videos of your own on the page at http://127.0.0.1:8000: "
        "prophy serve --set run_dir=%s --set checkpoint=%s",
        config.run_dir,
        trained.checkpoint,
    )
    return report


def _report(
    config: Config,
    manifest: Path,
    offline: dict[str, Path],
    served: dict[str, Path],
    continued: Path,
    watch: Stopwatch,
) -> Path:
    # Networks and plots: of no use until here.
    from pipelines.generation.sampler import VideoSampler
    from prophy.evaluation import sections
    from prophy.models.control import PhysicsTrace

    clips = sandbox.read_truth(manifest)
    priors, names = _priors_by_source(config), read_phenomena(CacheFolder(config.cache.folder).priors)
    metrics = [json.loads(line) for line in RunFolder(config.run_dir).metrics.read_text().splitlines()]
    trace = PhysicsTrace()
    frames = VideoSampler(config).sample(generate.video_spec(config, PROMPTS[0], PhysicsSpec()), trace=trace)
    named = load_taxonomy(config.taxonomy).named_in(PROMPTS[0], trace.phenomena)
    report = config.run_dir / "report.html"
    write_report(
        report,
        "ProPhy demo",
        [
            _summary_section(config, watch),
            sections.clips_section(clips),
            sections.priors_section(clips, [priors[str(clip.path)] for clip in clips], names),
            sections.training_section(metrics, CURVES),
            sections.routing_section(PROMPTS[0], frames, trace, named),
            sections.videos_section(
                "Generated offline", "prophy generate, with the trained branch.", offline
            ),
            sections.videos_section("Served", "POST /v1/videos, polled, downloaded.", served),
            sections.videos_section(
                "Served, from an image",
                f"The first frame of a simulated clip, as input_reference: {clips[0].caption}.",
                {"the simulator goes on": clips[0].path, "the model goes on": continued},
            ),
        ],
    )
    return report


def _summary_section(config: Config, watch: Stopwatch) -> Section:
    versions = yaml.safe_load(RunFolder(config.run_dir).versions.read_text())
    return Section(
        title="What ran",
        text="Every step of the product on the embedded default: real classes in small configurations, "
        "trained on simulated clips. The branch starts from the embedded one and goes on for a few steps.\n"
        + ", ".join(f"{name} {version}" for name, version in versions.items()),
        table=Table(
            header=["step", "seconds"],
            rows=[[name, f"{seconds:.1f}"] for name, seconds in watch.seconds.items()],
        ),
    )


def _priors_by_source(config: Config) -> dict[str, dict[str, Any]]:
    """The rows of the priors table, by the uri of their video."""
    folder = CacheFolder(config.cache.folder).priors
    rows = dict[str, dict[str, Any]]()
    for name in file_names(folder):
        with open_file(folder / name) as file:
            rows |= {row["source"]["uri"]: row for row in file.read().to_pylist()}
    return rows
