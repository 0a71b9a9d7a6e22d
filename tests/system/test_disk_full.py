"""A disk that is full for real, with database and videos on it: the job says so, and the server goes on."""

import io
from collections.abc import AsyncGenerator
from pathlib import Path

import httpx
import numpy as np
from PIL import Image

from pipelines.generation.spec import THUMBNAIL_FILE, VIDEO_FILE, VideoResult, VideoSpec
from pipelines.serving.dispatcher import GenerationStep
from tests.conftest import tiny_config
from tests.disks import small_disk
from tests.pipelines.serving.test_jobs import DURATIONS
from tests.servers import PROMPT, check_error, http_server, make, submit

DISK_BYTES = 4 << 20


async def as_large_as_its_seed(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
    yield GenerationStep(0.0)
    yield GenerationStep(1.0, VideoResult({VIDEO_FILE: bytes(spec.seed), THUMBNAIL_FILE: b"webp"}, DURATIONS))


def test_full_disk(tmp_path: Path) -> None:
    with (
        small_disk(tmp_path / "disk", DISK_BYTES) as disk,
        http_server(tiny_config(tmp_path / "run", f"serve.output={disk}"), as_large_as_its_seed) as url,
        httpx.Client(base_url=url) as client,
    ):
        too_large = submit(client, prompt=PROMPT, seed=DISK_BYTES)
        while (video := client.get(f"/v1/videos/{too_large}").json())["status"] != "failed":
            assert video["status"] != "completed"
        assert video["error"]["code"] == "generation_failed"
        assert "No space left on device" in video["error"]["message"]
        check_error(client.get(f"/v1/videos/{too_large}/content"), 409, "video_failed")
        noise, image = np.random.default_rng(0).integers(0, 256, (1300, 1300, 3), np.uint8), io.BytesIO()
        Image.fromarray(noise).save(image, "png", compress_level=0)
        sent = {"input_reference": image.getvalue()}
        refused = client.post("/v1/videos", data={"prompt": PROMPT}, files=sent)
        message = check_error(refused, 503, "storage_unavailable", "input_reference")
        assert message == "the image cannot be stored: No space left on device; try again later"
        assert make(client, seed=1000) == bytes(1000)
