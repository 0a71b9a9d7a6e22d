"""schemathesis over the whole description of the API: every check, against a real server."""

import re
import subprocess
import sys
from collections.abc import AsyncGenerator
from pathlib import Path

from pipelines.dispatcher import GenerationStep
from pipelines.spec import VideoSpec
from tests.conftest import tiny_config
from tests.pipelines.servers import http_server
from tests.pipelines.test_dispatcher import RESULT

# Which sizes and lengths a model can make is more than a schema can say: a well-formed one may get 422.
SETTINGS = """
[checks]
positive_data_acceptance.expected-statuses = ["2xx", 401, 403, 404, 409, 410, 416, 422, 429]
"""


async def at_once(spec: VideoSpec) -> AsyncGenerator[GenerationStep, None]:
    yield GenerationStep(0.0)
    yield GenerationStep(1.0, RESULT)


def test_every_answer_is_as_described(tmp_path: Path) -> None:
    (tmp_path / "schemathesis.toml").write_text(SETTINGS)
    with http_server(tiny_config(tmp_path / "run"), at_once) as url:
        command = [Path(sys.executable).parent / "schemathesis", "run", f"{url}/openapi.json", "--no-color"]
        options = ["--max-examples=10", "--seed=0", "--checks=all"]
        run = subprocess.run(
            [*command, *options], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
    assert run.returncode == 0, run.stdout
    assert re.search(r"Tested: 12\n", run.stdout), run.stdout
