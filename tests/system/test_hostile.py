"""schemathesis over the whole description of the API: every check, against a real server."""

import base64
import io
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from pipelines.generation.spec import MAPS_FILE, THUMBNAIL_FILE, VIDEO_FILE, VideoResult, VideoSpec
from pipelines.serving.dispatcher import GenerationStep
from pipelines.serving.protocol import PhysicsMaps
from prophy.video import write_video
from tests.conftest import tiny_config
from tests.hostile import moving_square
from tests.pipelines.serving.test_jobs import DURATIONS
from tests.servers import PROMPT, http_server, submit, wait
from tests.wisa import PHENOMENA

pytestmark = pytest.mark.heavy

# Which sizes and lengths a model can make is more than a schema can say: a well-formed one may get 422.
SETTINGS = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 410, 416, 422, 429]
"""


async def at_once(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
    yield GenerationStep(0.0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / VIDEO_FILE
        write_video(path, moving_square(spec.num_frames, spec.height, spec.width), spec.fps)
        files = {VIDEO_FILE: path.read_bytes(), THUMBNAIL_FILE: b"webp"}
    if spec.physics is not None and spec.physics.return_maps:
        tokens = (spec.num_frames - 1) // 4 + 1
        maps = PhysicsMaps(
            semantic_weights=[1.0],
            token_grid=[tokens, 1, 2],
            maps={name: [[[0.0, 1.0]]] * tokens for name in PHENOMENA},
        )
        files[MAPS_FILE] = maps.model_dump_json().encode()
    yield GenerationStep(1.0, VideoResult(files, DURATIONS))


def described_with_an_id(client: httpx.Client) -> dict[str, Any]:
    """The description of the API with a finished video as the example wherever files are asked for.

    Where a phenomenon is asked for, it has the names of the branch.
    """
    image = io.BytesIO()
    Image.new("RGB", (8, 8)).save(image, "png")
    url = f"data:image/png;base64,{base64.b64encode(image.getvalue()).decode()}"
    asked = {"physics": {"return_maps": True}, "input_reference": {"image_url": url}}
    video_id = submit(client, prompt=PROMPT, **asked)
    wait(client, video_id)
    description = client.get("/openapi.json").json()
    for path, operations in description["paths"].items():
        if path.startswith("/v1/videos/{video_id}/"):
            [parameter] = [one for one in operations["get"]["parameters"] if one["name"] == "video_id"]
            parameter["example"] = video_id
        for parameter in operations.get("get", {}).get("parameters", []):
            if parameter["name"] == "phenomenon":  # which there are, the server's branch decides
                parameter["schema"]["enum"] = client.get("/v1/settings").json()["phenomena"]
    return description


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    with http_server(tiny_config(tmp_path / "run"), at_once) as url, httpx.Client(base_url=url) as client:
        (tmp_path / "openapi.json").write_text(json.dumps(described_with_an_id(client)))
        command = [str(Path(sys.executable).parent / "schemathesis"), "run", "openapi.json", f"--url={url}"]
        options = ["--max-examples=10", "--seed=0", "--checks=all", "--no-color", "--request-timeout=60"]
        run = subprocess.run(
            [*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    assert run.returncode == 0, run.stdout
    assert re.search(r"Tested: 15\n", run.stdout), run.stdout
    assert "WARNING" not in run.stdout.upper(), run.stdout  # as of an operation that never met a video
