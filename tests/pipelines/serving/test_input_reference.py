"""Videos that begin with an image, over real HTTP with the real model; and images of strangers."""

import base64
import hashlib
import io
import json
import socket
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import openai
import pytest
from PIL import ExifTags, Image

from pipelines.config import Config
from pipelines.generation.limits import shape_limits
from pipelines.generation.spec import VIDEO_FILE, VideoSpec
from pipelines.serving.middleware import MAX_JSON_VALUES
from pipelines.serving.protocol import Settings
from pipelines.serving.replica import VideoGenerator
from prophy.images import fit_image, read_image
from tests.conftest import tiny_config
from tests.pipelines.serving.test_api import decode
from tests.servers import LIMITS, PROMPT, SHORT, check_error, http_server, make, submit, wait
from tests.wan import I2V_SEQUENCE_LENGTH, write_i2v


def written(image: Image.Image, format: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format, **options)
    return buffer.getvalue()


def picture(seed: int) -> bytes:
    """Four coloured squares, wider than high."""
    colours = np.random.default_rng(seed).integers(0, 256, (2, 3, 3), dtype=np.uint8)
    return written(Image.fromarray(colours.repeat(20, 0).repeat(20, 1)))


def data_url(content: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(content).decode()}"


def claiming(width: int, height: int) -> bytes:
    """A PNG that says it has this size, in a few bytes."""
    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    chunks = ((b"IHDR", header), (b"IDAT", zlib.compress(b"")), (b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        for kind, data in chunks
    )


def fields(**further: Any) -> dict[str, str]:
    """`SHORT` as a form has it."""
    return {name: str(value) for name, value in (SHORT | further).items()}


def post(client: httpx.Client, image: bytes, path: str = "/v1/videos", **further: Any) -> httpx.Response:
    return client.post(path, data=fields(**further), files={"input_reference": ("a.png", image)})


def content_of(client: httpx.Client, video_id: str) -> bytes:
    wait(client, video_id)
    return client.get(f"/v1/videos/{video_id}/content").raise_for_status().content


def test_one_image_in_every_shape_makes_one_video(client: httpx.Client, generator: VideoGenerator) -> None:
    image = picture(0)
    created = post(client, image).raise_for_status().json()
    assert created["image"] == hashlib.sha256(image).hexdigest()
    made = content_of(client, created["id"])
    spec = VideoSpec.model_validate(
        {name: created[name] for name in VideoSpec.model_fields if name in created}
    )
    assert made == generator._sampler.render(spec, image=image).files[VIDEO_FILE], "as `prophy generate` does"
    reference = {"image_url": data_url(image)}
    assert make(client, input_reference=reference) == made
    assert make(client, input_reference={"image_url": data_url(image, "application/octet-stream")}) == made
    assert post(client, image, "/v1/videos/sync").raise_for_status().content == made

    maker = openai.OpenAI(base_url=f"{client.base_url}/v1", api_key="unused", max_retries=0)
    knobs = {name: value for name, value in SHORT.items() if name != "prompt"}
    for given in (image, ("a.png", image, "image/png"), io.BytesIO(image)):
        video = maker.videos.create(prompt=PROMPT, input_reference=given, extra_body=knobs)
        assert content_of(client, video.id) == made
    video = maker.videos.create(prompt=PROMPT, extra_body=knobs | {"input_reference": reference})
    assert content_of(client, video.id) == made
    assert len({made, make(client), make(client, input_reference={"image_url": data_url(picture(1))})}) == 3


def test_the_video_begins_with_the_centre_of_the_image_upright(client: httpx.Client) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = written(Image.open(io.BytesIO(picture(2))), "JPEG", quality=95, exif=exif)
    video_id = post(client, lying, size="32x48", num_inference_steps="4").raise_for_status().json()["id"]
    first = decode(content_of(client, video_id))[0]
    expected = fit_image(read_image(lying, "it"), 48, 32)
    assert np.abs(first.astype(int) - expected).mean() < 20
    for wrong in (np.fliplr(expected), np.flipud(expected), fit_image(read_image(picture(3), "it"), 48, 32)):
        assert np.abs(first.astype(int) - wrong).mean() > 30
    preview = client.get(f"/v1/videos/{video_id}/input_reference", params={"variant": "preview"})
    assert preview.headers["content-type"] == "image/webp"
    assert np.abs(np.asarray(Image.open(io.BytesIO(preview.content))) - expected.astype(int)).mean() < 10


def test_the_image_lies_with_its_video_and_goes_with_it(client: httpx.Client, config: Config) -> None:
    image, other = picture(4), picture(5)
    ids = [post(client, content).json()["id"] for content in (image, other)]
    for video_id, content in zip(ids, (image, other), strict=True):
        file = client.get(f"/v1/videos/{video_id}/input_reference")
        assert (file.content, file.headers["content-type"]) == (content, "application/octet-stream")
        assert "attachment" in file.headers["content-disposition"]
        wait(client, video_id)
        assert client.get(f"/v1/videos/{video_id}").json()["image"] == hashlib.sha256(content).hexdigest()
    assert client.get(f"/v1/videos/{ids[0]}/input_reference").content == image
    folder = Path(config.serve.videos_location, ids[0])
    assert folder.exists()
    client.delete(f"/v1/videos/{ids[0]}").raise_for_status()
    assert not folder.exists()
    check_error(client.get(f"/v1/videos/{ids[0]}/input_reference"), 404, "video_not_found")
    of_text = submit(client, **SHORT)
    wait(client, of_text)
    check_error(client.get(f"/v1/videos/{of_text}/input_reference"), 409, "no_image")
    assert client.get(f"/v1/videos/{of_text}").json()["image"] is None


def test_an_idempotency_key_stands_for_its_image_too(client: httpx.Client) -> None:
    def ask(**content: Any) -> httpx.Response:
        return client.post("/v1/videos", headers={"idempotency-key": "image"}, **content)

    image = picture(6)
    first = ask(data=fields(), files={"input_reference": image}).raise_for_status().json()["id"]
    again = ask(json={**SHORT, "input_reference": {"image_url": data_url(image)}})
    assert again.raise_for_status().json()["id"] == first
    for other in (
        ask(json=SHORT),
        ask(data=fields(), files={"input_reference": picture(7)}),
    ):
        check_error(other, 422, "idempotency_key_reused", "idempotency-key")
    wait(client, first)


def animated(format: str) -> bytes:
    frames = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    return written(frames[0], format, save_all=True, append_images=frames[1:])


JPEG = written(Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), np.uint8)), "JPEG")
HOSTILE: dict[str, tuple[bytes, str]] = {
    "empty": (b"", "is no image that can be read; give a PNG, JPEG, WEBP file"),
    "text": (b"png", "is no image that can be read"),
    "GIF": (written(Image.new("RGB", (4, 4)), "GIF"), "is no image that can be read"),
    "TIFF": (written(Image.new("RGB", (4, 4)), "TIFF"), "is no image that can be read"),
    "SVG": (
        b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
        "is no image that can be read",
    ),
    "script of PostScript": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "is no image"),
    "cut PNG": (picture(0)[:-40], "is no image that can be read"),
    "cut JPEG": (JPEG[: len(JPEG) // 2], "is no image that can be read"),
    "cut WebP": (written(Image.open(io.BytesIO(JPEG)), "WEBP")[:200], "is no image that can be read"),
    "bomb": (claiming(2**31 - 1, 2**31 - 1), "is no image that can be read"),
    "60 megapixels": (claiming(10_000, 6_000), "has 10000x6000 pixels; give an image of at most 50000000"),
    "no pixels": (claiming(4, 4), "is no image that can be read"),
    "animated PNG": (animated("PNG"), "is animated; give a single picture"),
    "animated WebP": (animated("WEBP"), "is animated; give a single picture"),
    "16 bits": (written(Image.new("I;16", (4, 4))), "has more than 8 bits a channel"),
    "thousand scans": (JPEG[:-2] + 1000 * b"\xff\xda" + JPEG[-2:], "scans; give a JPEG of at most 100"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_no_image_is_said_at_its_field_and_leaves_nothing(
    client: httpx.Client, config: Config, name: str
) -> None:
    content, reason = HOSTILE[name]
    before = sorted(Path(config.serve.videos_location).iterdir())
    [newest] = client.get("/v1/videos", params={"limit": 1}).json()["data"] or [None]
    reference = {"image_url": data_url(content)}
    for answer in (
        post(client, content),
        post(client, content, "/v1/videos/sync"),
        client.post(
            "/v1/videos", data=fields(), files={"input_reference": ("../../a.png\x00", content, "x/y")}
        ),
        client.post("/v1/videos", json=SHORT | {"input_reference": reference}),
    ):
        message = check_error(answer, 422, "invalid_image", "input_reference")
        assert message.startswith("the image ") and reason in message
    assert client.get("/v1/videos", params={"limit": 1}).json()["data"] == [newest][: newest is not None]
    assert sorted(Path(config.serve.videos_location).iterdir()) == before


def test_an_image_is_fetched_from_nowhere(client: httpx.Client) -> None:
    with socket.create_server(("127.0.0.1", 0)) as asked:
        asked.settimeout(0.2)
        here = f"127.0.0.1:{asked.getsockname()[1]}/a.png"
        for url in (
            f"http://{here}",
            f"HTTPS://{here}",
            f"//{here}",
            "file:///etc/passwd",
            "/etc/passwd",
            "",
            "a",
        ):
            answers = [client.post("/v1/videos", json=SHORT | {"input_reference": {"image_url": url}})]
            if url:
                answers.append(client.post("/v1/videos", data=fields(**{"input_reference[image_url]": url})))
            for answer in answers:
                message = check_error(answer, 422, "invalid_value", "input_reference")
                assert "no URL is fetched here; send the image itself" in message
        with pytest.raises(TimeoutError):
            asked.accept()


SHAPES = 'give a file of a form, or {"image_url": '
NO_REFERENCES: tuple[tuple[Any, str], ...] = (
    ({"image_url": "data:image/png;base64,%%%"}, "is no base64"),
    ({"image_url": "data:image/png;base64,iVBO\nRw=="}, "is no base64"),
    ({"image_url": "data:image/png;base64,\u00e9"}, "is no base64"),
    ({"image_url": "data:image/svg+xml,%3Csvg/%3E"}, "is not in base64"),
    ({"image_url": "data:,"}, "is not in base64"),
    ({}, SHAPES),
    ({"file_id": "file-1"}, SHAPES),
    ({"image_url": None}, SHAPES),
    ({"image_url": data_url(b"x"), "file_id": "file-1"}, SHAPES),
    ("a.png", SHAPES),
    ([], SHAPES),
    (0, SHAPES),
    (False, SHAPES),
    ({"a": [{}] * 1000}, SHAPES),
)


@pytest.mark.parametrize(("reference", "reason"), NO_REFERENCES)
def test_what_stands_for_no_image(client: httpx.Client, reference: Any, reason: str) -> None:
    answer = client.post("/v1/videos", json=SHORT | {"input_reference": reference})
    assert reason in check_error(answer, 422, "invalid_value", "input_reference")


def test_a_file_stands_in_its_field_alone(client: httpx.Client) -> None:
    for name in ("prompt", "input_reference[image_url]", "image"):
        wrong = client.post("/v1/videos", data={"seed": "1"}, files={name: ("a.png", picture(0))})
        assert "takes no file; send text" in check_error(wrong, 422, "invalid_value", name)
    two = [("input_reference", ("a.png", picture(0))), ("input_reference", ("b.png", picture(1)))]
    check_error(client.post("/v1/videos", data=fields(), files=two), 400, "bad_request")
    name_alone = client.post("/v1/videos", data=fields(input_reference="a.png"))  # curl without its @
    assert "give a file of a form" in check_error(name_alone, 422, "invalid_value", "input_reference")


@pytest.fixture(scope="module")
def small(
    config: Config, generator: VideoGenerator, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Any]:
    """A server that takes small requests and images only."""
    folder = tmp_path_factory.mktemp("small")
    limited = config.serve.model_copy(
        update={"output": folder, "max_body_bytes": 1000, "max_image_bytes": 30_000}
    )
    own = config.model_copy(update={"serve": limited})
    with http_server(own, generator.generate) as url, httpx.Client(base_url=url, timeout=60) as client:
        yield client


def test_how_long_an_image_may_be(small: httpx.Client) -> None:
    assert small.get("/v1/settings").json()["max_image_bytes"] == 30_000
    just = picture(0) + bytes(30_000 - len(picture(0)))
    for answer in (
        post(small, just),
        small.post("/v1/videos", json=SHORT | {"input_reference": {"image_url": data_url(just)}}),
    ):
        wait(small, answer.raise_for_status().json()["id"])
    for answer in (
        post(small, just + b"x"),
        small.post("/v1/videos", json=SHORT | {"input_reference": {"image_url": data_url(just + b"x")}}),
    ):
        message = check_error(answer, 413, "image_too_large", "input_reference")
        assert message == "the image has 30001 bytes; give one of at most 30000"
    large = post(small, bytes(100_000))
    assert "send a smaller input_reference" in check_error(large, 413, "body_too_large", "input_reference")


def test_a_body_with_an_image_is_read_no_further_than_it_may_be_long(small: httpx.Client) -> None:
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        yield b'--x\r\ncontent-disposition: form-data; name="input_reference"; filename="a"\r\n\r\n'
        while sent < 1 << 28:
            sent += 1 << 16
            yield bytes(1 << 16)

    try:
        kind = {"content-type": "multipart/form-data; boundary=x"}
        answer = small.post("/v1/videos", content=endless(), headers=kind)
        check_error(answer, 413, "body_too_large", "input_reference")
    except httpx.WriteError:  # the server has hung up
        pass
    assert sent < 1 << 27


def test_json_with_room_for_an_image_holds_no_more_values(client: httpx.Client) -> None:
    body = json.dumps(SHORT | {"physics": {"strength": [{}] * MAX_JSON_VALUES}})
    many = client.post("/v1/videos", content=body, headers={"content-type": "application/json"})
    check_error(many, 400, "too_many_values")


@pytest.fixture(scope="module")
def of_images(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """A model that always takes an image, at random weights."""
    folder = tmp_path_factory.mktemp("i2v")
    return tiny_config(
        folder / "run",
        f"backbone.pretrained={write_i2v(folder / 'backbone')}",
        f"backbone.max_sequence_length={I2V_SEQUENCE_LENGTH}",
        "backbone.num_frames=5",
        "backbone.height=32",
        "backbone.width=32",
        "backbone.autocast=null",
        "checkpoint=null",
    )


def test_a_model_of_images_alone_is_served_and_says_so(of_images: Config) -> None:
    limits = shape_limits(of_images)
    generator = VideoGenerator(of_images, limits)
    with (
        http_server(of_images, generator.generate, limits=limits) as url,
        httpx.Client(base_url=url, timeout=60) as client,
    ):
        assert client.get("/v1/settings").json()["images"] == "required"
        missing = client.post("/v1/videos", json=SHORT)
        message = check_error(missing, 422, "missing_parameter", "input_reference")
        assert message == "this model makes videos of images alone; give one to begin with"
        first, second = (content_of(client, post(client, picture(seed)).json()["id"]) for seed in (0, 1))
    assert len(decode(first)) == 5 and first != second


def test_settings_say_whether_an_image_is_taken(client: httpx.Client, config: Config) -> None:
    settings = client.get("/v1/settings").json()
    assert (settings["images"], settings["max_image_bytes"]) == ("optional", 16 * 2**20)
    assert settings["image_formats"] == ["PNG", "JPEG", "WEBP"] and settings["max_image_pixels"] == 50_000_000
    cache = config.sampling.step_cache.model_copy(update={"sea": 0.1})
    sea = config.model_copy(update={"sampling": config.sampling.model_copy(update={"step_cache": cache})})
    assert Settings.of_run(sea, LIMITS).images == "never"
    assert Settings.of_run(config, LIMITS.model_copy(update={"images": "never"})).images == "never"
