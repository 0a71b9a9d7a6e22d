"""The image of every node."""

import re
from pathlib import Path

from pipelines.runtime import WORKER_ENVIRONMENT
from pipelines.serving import haproxy

ROOT = Path(__file__).parent.parent.parent


def test_image_sets_what_a_local_ray_starts_with() -> None:
    image = dict(
        re.findall(r"^(?:ENV|   ) (\w+)=(\S+)", (ROOT / "cluster/Dockerfile").read_text(), re.MULTILINE)
    )
    folder = Path("/folder")
    local = WORKER_ENVIRONMENT | haproxy.environment(folder)
    of_one_server = {
        name for name, value in local.items() if name.endswith("_PORT") or value.startswith(str(folder))
    }
    assert image.keys() == local.keys() - of_one_server
    for name, value in image.items():
        assert Path(value).name == Path(local[name]).name  # the command lies elsewhere there
