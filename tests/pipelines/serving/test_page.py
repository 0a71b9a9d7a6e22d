"""The page at `/` in a real browser, against the real API and the real model, in one process without Ray."""

import asyncio
import base64
import hashlib
import json
import re
import shutil
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from contextlib import aclosing
from pathlib import Path
from typing import Any
from urllib.parse import quote

import httpx
import numpy as np
import pytest
from axe_playwright_python.sync_playwright import Axe
from PIL import Image
from playwright.sync_api import Browser, Locator, Page, Route, expect, sync_playwright

from pipelines.generation.limits import shape_limits
from pipelines.generation.spec import VideoResult, VideoSpec
from pipelines.serving.dispatcher import GenerationStep
from pipelines.serving.middleware import hash_key, new_key
from pipelines.serving.replica import VideoGenerator
from prophy.evaluation.pictures import heat_layer
from tests.servers import PATIENCE_S, http_server, save_checkpoint, serve_config, submit, until, wait

CHROMIUM = shutil.which("chromium")
pytestmark = [
    pytest.mark.heavy,
    pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed"),
]
KEY = new_key()
PATIENCE_MS = 1000 * PATIENCE_S
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> a red ball falls"

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def stopping() -> set[str]:
    return set()


@pytest.fixture
def held(stopping: set[str]) -> Iterator[set[str]]:
    """Prompts whose videos stop in the middle, after their first step, until they are taken out."""
    yield stopping
    stopping.clear()


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory, stopping: set[str]) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    config = serve_config(
        folder / "run",
        save_checkpoint(folder / "model"),
        f"serve.api_keys=[{hash_key(KEY)}]",
        "serve.max_queued=40",
        'serve.examples=["a turquoise candle burns on the left"]',
    )
    generator = VideoGenerator(config, shape_limits(config))
    render = generator._sampler.render

    # In the thread that makes it: what is made is not asked for the steps before.
    def render_held(spec: VideoSpec, on_step: Callable[[float], None], image: bytes | None) -> VideoResult:
        def report(progress: float) -> None:
            on_step(progress)
            while progress and spec.prompt in stopping:
                time.sleep(0.01)
                on_step(progress)

        return render(spec, report, image)

    setattr(generator._sampler, "render", render_held)  # noqa: B010 - to mypy a method is no variable
    turn = asyncio.Lock()

    async def generate(spec: VideoSpec, image: bytes | None) -> AsyncGenerator[GenerationStep, None]:
        async with turn, aclosing(generator.generate(spec, image)) as steps:
            async for step in steps:
                yield step

    with http_server(config, generate) as url:
        yield url


@pytest.fixture(scope="module")
def client(url: str) -> Iterator[httpx.Client]:
    headers = {"authorization": f"Bearer {KEY}"}
    with httpx.Client(base_url=url, headers=headers, timeout=PATIENCE_S) as client:
        yield client


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        flags = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-sync"]
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=flags)
        yield browser
        browser.close()


@pytest.fixture
def open_page(browser: Browser, url: str) -> Iterator[Callable[..., Page]]:
    """Opens the page in a tab of its own session, with the key given; whatever the page says to the console
    or asks of another server fails the test."""
    contexts, wrong = [], []

    def open_page(path: str = "/", key: str | None = KEY, **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(PATIENCE_MS)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda message: wrong.append(message.text) if "Policy" in message.text else None)
        page.on(
            "request", lambda asked: None if asked.url.startswith((url, "blob:")) else wrong.append(asked.url)
        )
        page.goto(url + path)
        # It asks for a key once the server has refused it without one.
        expect(page.get_by_label("API key")).to_be_visible()
        if key is not None:
            use_key(page, key)
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert wrong == []


def use_key(page: Page, key: str = KEY) -> None:
    page.get_by_label("API key").fill(key)
    page.get_by_role("button", name="Use this key").click()


def fill_and_make(page: Page, prompt: str, **fields: object) -> None:
    """Makes a video of one step, or of what `fields` says by the labels of the form."""
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_text("Sampling", exact=True).click()
    for label, value in ({"Seed": 7, "Denoising steps": 1} | fields).items():
        page.get_by_label(label, exact=True).fill(str(value))
    page.get_by_role("button", name="Make the video").click()


def strength(page: Page, phenomenon: str) -> Locator:
    return page.locator(f"[id='physics.strength.{phenomenon}']")


def own_clock(page: Page) -> None:
    """Lets a test say when the ten seconds are over after which the page asks for the list again."""
    page.clock.install()
    page.reload()
    expect(page.locator("#status")).to_contain_text("Replicas")


def newest(client: httpx.Client) -> dict[str, Any]:
    return client.get("/v1/videos", params={"limit": 1}).json()["data"][0]


def make_and_look(page: Page, prompt: str, **fields: object) -> None:
    """As `fill_and_make`; looks at the video when it is completed."""
    fill_and_make(page, prompt, **fields)
    look(page, prompt)


def look(page: Page, text: str) -> None:
    """Looks at the newest video whose row holds this text, until its first frame is drawn."""
    made = row(page, text)
    expect(made).to_contain_text("Completed in")
    made.get_by_role("button", name="Look").click()
    expect(page.get_by_role("heading", name="Look")).to_be_focused()


def row(page: Page, prompt: str) -> Locator:
    return page.get_by_role("list", name="Videos").get_by_role("listitem").filter(has_text=prompt).first


def pixels(page: Page, canvas: str) -> list[int]:
    script = (
        """(canvas) => [...canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height).data]"""
    )
    return page.locator(f"#{canvas}").evaluate(script)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_accessibility(open_page: Callable[..., Page], scheme: str) -> None:
    page = open_page(color_scheme=scheme, reduced_motion="reduce", viewport={"width": 360, "height": 740})
    make_and_look(page, f"a ball bounces in {scheme}")
    page.get_by_text("Physics", exact=True).click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than the window"


def test_make_watch_look_and_compare(open_page: Callable[..., Page], client: httpx.Client) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("prophy-tiny")
    page.get_by_role("button", name="a turquoise candle burns on the left").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a turquoise candle burns on the left")
    make_and_look(page, "a blue ball that waits")
    expect(page.locator("#frame-number")).to_have_text("1 of 5")
    first = pixels(page, "film")
    assert len(set(first)) > 10, "a picture, not one colour"
    page.get_by_role("button", name="Next frame").click()
    expect(page.locator("#frame-number")).to_have_text("2 of 5")
    second = pixels(page, "film")
    assert second != first
    page.get_by_role("button", name="Play").click()
    page.get_by_role("button", name="Pause").click()
    page.get_by_label("Frame", exact=True).fill("1")
    assert pixels(page, "film") == second, "each frame by its number"

    # What is beside it is the same but for the branch.
    page.get_by_role("button", name="Make it with the branch off").click()
    option = page.locator("#compare option", has_text="the same with the branch off")
    expect(option).to_have_count(1)
    page.get_by_label("Compare with").select_option(label="the same with the branch off")
    expect(page.locator("#other-caption")).to_have_text("Branch off")
    expect(page.locator("#difference-caption")).to_contain_text("of 255 a pixel")
    first, other = pixels(page, "film"), pixels(page, "other")
    difference = [min(255, 4 * abs(a - b)) for a, b in zip(first, other, strict=True)]
    shown = pixels(page, "difference")
    assert [d for i, d in enumerate(shown) if i % 4 < 3] == [d for i, d in enumerate(difference) if i % 4 < 3]
    assert max(difference) > 8, "the branch changes the video"
    expect(row(page, "a blue ball that waits")).to_contain_text("seed 7, branch off")
    two = client.get("/v1/videos", params={"limit": 2}).json()["data"]
    assert [video["physics"]["scale"] for video in two] == [0, 1] and two[1]["physics"]["return_maps"]
    assert {video["seed"] for video in two} == {7}

    # Another video is looked at alone.
    look(page, "a blue ball that waits")
    expect(page.get_by_label("Compare with")).to_have_value("")
    expect(page.locator("#other-figure")).to_be_hidden()
    expect(page.get_by_text("This video was made without maps.")).to_be_visible()


def test_the_map_is_of_what_the_prompt_names(open_page: Callable[..., Page], client: httpx.Client) -> None:
    page = open_page()
    make_and_look(page, "green liquid pours on melting ice")
    expect(page.locator("#named")).to_have_text(
        re.compile(r"The prompt names (liquid motion, melting|melting, liquid motion)\.")
    )
    expect(page.locator("#bars .named")).to_have_count(2)
    expect(page.locator("#bars li")).to_have_count(17)
    chosen = page.get_by_label("Map of")
    expect(chosen).to_have_value(re.compile("liquid motion|melting"))
    named = page.locator("optgroup[label='The prompt names'] option")
    assert sorted(named.all_text_contents()) == ["liquid motion", "melting"]

    # It lies over the frame as the report draws it: a corner has the colour of its token alone.
    opacity = page.get_by_label("Opacity of the map")
    expect(opacity).to_have_value("75")
    opacity.fill("0")
    plain = pixels(page, "film")
    opacity.fill("100")
    maps = client.get(f"/v1/videos/{newest(client)['id']}/physics").json()["maps"]
    for phenomenon in ("collision", "melting", "liquid motion"):
        chosen.select_option("")
        assert pixels(page, "film") == plain
        chosen.select_option(phenomenon)
        until(lambda: pixels(page, "film") != plain, "the map lies over the frame")
        heat = np.array(maps[phenomenon])
        layer = heat_layer(heat, (5, *heat.shape[1:]), "tokens")[0, [0, 0, -1, -1], [0, -1, 0, -1]].astype(
            float
        )
        opaque = layer[..., 3:] / 255
        frame, drawn = (
            np.reshape(picture, (32, 32, 4))[[0, 0, -1, -1], [0, -1, 0, -1], :3]
            for picture in (plain, pixels(page, "film"))
        )
        np.testing.assert_allclose(drawn, frame * (1 - opaque) + layer[..., :3] * opaque, atol=3)


def test_a_prompt_that_names_nothing_says_so(open_page: Callable[..., Page]) -> None:
    page = open_page()
    make_and_look(page, "a cat")
    expect(page.locator("#named")).to_contain_text("names no phenomenon that this model tells apart")
    expect(page.get_by_label("Map of")).to_have_value("")
    expect(page.locator("#bars .named")).to_have_count(0)
    plain = pixels(page, "film")
    page.get_by_label("Map of").select_option("refraction")
    until(lambda: pixels(page, "film") != plain, "any other map can be chosen")


def test_a_knob_and_the_result_beside_the_one_before(open_page: Callable[..., Page]) -> None:
    page = open_page()
    make_and_look(page, "a ball bounces once", **{"Denoising steps": 2})
    page.get_by_role("button", name="Change this one").click()
    expect(page.get_by_label("Prompt", exact=True)).to_be_focused()
    expect(page.get_by_label("Denoising steps")).to_have_value("2")
    page.get_by_text("Physics", exact=True).click()
    strength(page, "collision").fill("9")
    page.get_by_role("button", name="Make the video").click()
    look(page, "collision × 9")
    page.get_by_label("Compare with").select_option(label="knobs at 1")
    expect(page.locator("#other-caption")).to_have_text("knobs at 1")
    assert pixels(page, "other") != pixels(page, "film")


def test_a_negative_prompt_may_be_left_blank(open_page: Callable[..., Page]) -> None:
    """Where the server has one by default: the form shows it, and blank is none."""

    def say(route: Route) -> None:
        settings = route.fetch().json()
        route.fulfill(json=settings | {"defaults": settings["defaults"] | {"negative_prompt": "blurry"}})

    page = open_page(key=None)
    page.route("**/v1/settings", say)
    use_key(page)
    expect(page.get_by_label("Negative prompt")).to_have_value("blurry")
    with page.expect_request(lambda asked: asked.method == "POST") as asked:
        fill_and_make(page, "a ball without blur", **{"Negative prompt": "", "Guidance": ""})
    assert asked.value.post_data_json["negative_prompt"] == ""
    assert "guidance_scale" not in asked.value.post_data_json, "any other blank field is the server's default"


def test_what_is_typed_before_the_settings_arrive_stays(open_page: Callable[..., Page]) -> None:
    page, waiting = open_page(key=None), []
    page.route("**/v1/settings", lambda route: waiting.append(route), times=1)
    with page.expect_request("**/v1/settings"):
        use_key(page)
    expect(page.get_by_role("button", name="Make the video")).to_be_disabled()
    page.get_by_label("Prompt", exact=True).fill("a ball for the impatient")
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Denoising steps").fill("1")
    waiting.pop().continue_()
    expect(page.get_by_label("Size in pixels")).to_have_value("32x32")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a ball for the impatient")
    expect(page.get_by_label("Denoising steps")).to_have_value("1")


def test_a_video_made_while_the_list_is_under_way_stays(open_page: Callable[..., Page]) -> None:
    page, waiting = open_page(key=None), []
    page.route("**/v1/videos?limit=20", lambda route: waiting.append((route, route.fetch())), times=1)
    use_key(page)
    until(lambda: page.title() == "ProPhy" and len(waiting) == 1, "the list is under way")
    fill_and_make(page, "a ball during the list")
    made = row(page, "a ball during the list")
    expect(made).to_contain_text("Completed in")
    [(route, older)] = waiting
    route.fulfill(response=older)
    expect(page.locator("#status")).to_contain_text("Replicas")
    expect(made).to_have_count(1)


def test_a_request_that_is_not_answered_is_sent_again_and_makes_one_video(
    open_page: Callable[..., Page], client: httpx.Client
) -> None:
    page, answers = open_page(), []

    def lose(route: Route) -> None:
        answers.append(route.fetch().json())
        route.abort()

    page.route("**/v1/videos", lose, times=1)
    fill_and_make(page, "a ball that is asked for twice")
    expect(row(page, "a ball that is asked for twice")).to_contain_text("Completed in")
    listed = client.get("/v1/videos", params={"limit": 2}).json()["data"]
    assert [video["id"] for video in listed if "twice" in video["prompt"]] == [answers[0]["id"]]


def test_cancel(open_page: Callable[..., Page], held: set[str]) -> None:
    page, prompt = open_page(), "a green ball that is cancelled"
    held.add(prompt)
    fill_and_make(page, prompt, **{"Denoising steps": 3})
    made = row(page, prompt)
    expect(made).to_contain_text("Step 1 of 3")
    made.get_by_role("button", name="Cancel").click()
    expect(made).to_have_count(0)


def test_a_deleted_video_does_not_come_back_with_a_list_that_was_under_way(
    open_page: Callable[..., Page],
) -> None:
    page, waiting = open_page(), []
    own_clock(page)
    fill_and_make(page, "a ball that goes")
    made = row(page, "a ball that goes")
    expect(made).to_contain_text("Completed in")
    page.route("**/v1/videos?limit=20", lambda route: waiting.append((route, route.fetch())), times=1)
    page.clock.fast_forward(10_000)
    until(lambda: page.title() == "ProPhy" and len(waiting) == 1, "the list is under way")
    made.get_by_role("button", name="Delete").click()
    expect(made).to_have_count(0)
    [(route, older)] = waiting
    assert "a ball that goes" in older.text()
    with page.expect_request("**/metrics"):
        route.fulfill(response=older)
    expect(made).to_have_count(0)


def test_the_queue_and_what_is_left(open_page: Callable[..., Page], held: set[str]) -> None:
    page = open_page()
    held.add("first of three")
    for prompt in ("first of three", "second of three", "third of three"):
        page.get_by_label("Prompt", exact=True).fill(prompt)
        page.get_by_role("button", name="Make the video").click()
        expect(row(page, prompt)).to_be_visible()
    expect(row(page, "first of three")).to_contain_text("Step 1 of 2")
    expect(row(page, "second of three")).to_contain_text("Queued, next")
    expect(row(page, "third of three")).to_contain_text("Queued, 1 before it")
    held.discard("first of three")
    for prompt in ("first of three", "second of three", "third of three"):
        expect(row(page, prompt)).to_contain_text("Completed in")


def test_a_wrong_field_is_said_at_the_field(open_page: Callable[..., Page]) -> None:
    page = open_page()
    page.get_by_label("Prompt", exact=True).fill("a ball")
    size = page.get_by_label("Size in pixels")
    size.fill("33x32")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator("#size-error")).to_contain_text("does not fit this model")
    expect(size).to_have_attribute("aria-invalid", "true")
    expect(size).to_be_focused()
    size.fill("32x32")
    page.get_by_text("Physics", exact=True).click()
    strength(page, "collision").fill("11")
    page.get_by_role("button", name="Make the video").click()
    expect(strength(page, "collision")).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#size-error")).to_have_count(0)


def test_a_wrong_key(open_page: Callable[..., Page]) -> None:
    page = open_page(key="prophy-wrong")
    expect(page.locator("#alert")).to_contain_text("a valid API key is needed")
    use_key(page)
    expect(page.locator("#model")).to_have_text("prophy-tiny")
    expect(page.locator("#alert")).to_be_hidden()
    assert KEY not in page.url and "prophy-wrong" not in page.url


def test_reload_in_the_middle_and_two_tabs(open_page: Callable[..., Page], held: set[str]) -> None:
    first, second = open_page(), open_page()
    own_clock(second)
    prompt = "a red pendulum swings"
    held.add(prompt)
    fill_and_make(first, prompt, **{"Denoising steps": 2})
    expect(row(first, prompt)).to_contain_text("Step 1 of 2")
    first.reload()
    expect(row(first, prompt)).to_contain_text("Step 1 of 2")
    second.clock.fast_forward(10_000)
    expect(row(second, prompt)).to_contain_text("Step 1 of 2")
    held.discard(prompt)
    for page in (first, second):
        expect(row(page, prompt)).to_contain_text("Completed in")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    """Red on the left and blue on the right, wider than high."""
    image = Image.new("RGB", (96, 48), "red")
    image.paste("blue", (48, 0, 96, 48))
    image.save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def image_field(page: Page) -> Locator:
    return page.get_by_label("Image to begin with")


def choose_image(page: Page, file: Path) -> None:
    """As a user does, once the server has said that it takes one."""
    expect(image_field(page)).to_be_visible()
    image_field(page).set_input_files(file)


def test_a_video_from_an_image_and_all_that_makes_it_again(
    open_page: Callable[..., Page], url: str, client: httpx.Client, photo: Path
) -> None:
    page, prompt = open_page(), "a ball that was painted"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    choose_image(page, photo)
    preview = page.get_by_role("img", name="The image that was chosen")
    expect(preview).to_be_visible()
    assert pixels(page, "image-preview")[:4] == [255, 0, 0, 255]
    make_and_look(page, prompt)
    made = newest(client)
    assert made["image"] == hashlib.sha256(photo.read_bytes()).hexdigest()
    expect(row(page, prompt)).to_contain_text("seed 7, from an image")
    beginning = row(page, prompt).get_by_role("img", name="The image that it begins with")
    expect(beginning).to_be_visible()
    assert beginning.evaluate("(canvas) => [canvas.width, canvas.height]") == [32, 32], "cut as the video"
    first = np.reshape(pixels(page, "film"), (32, 32, 4)).astype(float)
    for half, (red, blue) in ((first[:, :14], (1, 0)), (first[:, 18:], (0, 1))):
        assert np.abs(half[..., :3].mean((0, 1)) / 255 - (red, 0, blue)).max() < 0.3

    page.get_by_role("button", name="Make it with the branch off").click()
    expect(page.locator("#compare option", has_text="the same with the branch off")).to_have_count(1)
    assert (newest(client)["image"], newest(client)["physics"]["scale"]) == (made["image"], 0)
    with page.expect_download() as recipe:
        page.get_by_role("button", name="Save the recipe").click()
    again = submit(client, **json.loads(recipe.value.path().read_text()))
    wait(client, again)
    contents = [client.get(f"/v1/videos/{video_id}/content").content for video_id in (again, made["id"])]
    assert contents[0] == contents[1]

    page.get_by_role("button", name="Remove the image").click()
    expect(preview).to_be_hidden()
    expect(image_field(page)).to_be_focused()
    page.get_by_role("button", name="Change this one").click()
    expect(preview).to_be_visible()
    page.get_by_role("button", name="Back to the defaults").click()
    expect(preview).to_be_hidden()
    page.get_by_role("button", name="Copy a link").click()
    expect(page.locator("#said")).to_have_text("Copied; whoever opens it must choose the image again.")
    link = page.evaluate("navigator.clipboard.readText()")
    other = open_page(link.removeprefix(url))
    expect(other.get_by_label("Prompt", exact=True)).to_have_value(prompt)
    expect(other.locator("#input_reference-error")).to_contain_text("which no link holds; choose it again")


def test_a_wrong_file_is_said_at_the_field(
    open_page: Callable[..., Page], photo: Path, tmp_path: Path
) -> None:
    page, said = open_page(), "#input_reference-error"
    expect(page.locator("#input_reference-hint")).to_contain_text("PNG, JPEG, WEBP, at most 16 MiB")
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "large.png").write_bytes(photo.read_bytes() + bytes(16 * 2**20))
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "blue")]
    frames[0].save(tmp_path / "moving.png", save_all=True, append_images=frames[1:])
    page.get_by_label("Prompt", exact=True).fill("a ball")
    for name, reason in (
        ("text.png", "text.png is no image that this browser can read"),
        ("large.png", "choose one of at most 16777216"),
    ):
        choose_image(page, tmp_path / name)
        expect(page.locator(said)).to_contain_text(reason)
        expect(image_field(page)).to_have_attribute("aria-invalid", "true")
        expect(image_field(page)).to_be_focused()
    choose_image(page, tmp_path / "text.png")
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(said)).to_contain_text(
        "the image is no image that can be read; give a PNG, JPEG, WEBP file"
    )
    choose_image(page, tmp_path / "moving.png")
    expect(page.locator(said)).to_have_count(0)
    page.get_by_role("button", name="Make the video").click()
    expect(page.locator(said)).to_contain_text("the image is animated; give a single picture")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a ball")


DROP_OR_PASTE = """([event, names]) => {
    const data = new DataTransfer();
    for (const name of names) {
        const bytes = Uint8Array.from(atob(window.photo), (character) => character.charCodeAt(0));
        data.items.add(new File([bytes], name, { type: "image/png" }));
    }
    const made = event === "drop"
        ? new DragEvent(event, { dataTransfer: data, bubbles: true, cancelable: true })
        : new ClipboardEvent(event, { clipboardData: data, bubbles: true, cancelable: true });
    return document.getElementById("prompt").dispatchEvent(made);
}"""


@pytest.mark.parametrize("event", ["drop", "paste"])
def test_an_image_is_dropped_or_pasted(open_page: Callable[..., Page], photo: Path, event: str) -> None:
    page = open_page()
    expect(image_field(page)).to_be_visible()
    page.evaluate("(photo) => { window.photo = photo }", base64.b64encode(photo.read_bytes()).decode())
    assert page.evaluate(DROP_OR_PASTE, [event, ["a.png"]]) is False, "the browser does not leave the page"
    expect(page.get_by_role("img", name="The image that was chosen")).to_be_visible()
    assert image_field(page).evaluate("(input) => input.files[0].name") == "a.png"
    page.evaluate(DROP_OR_PASTE, [event, ["a.png", "b.png"]])
    expect(page.locator("#input_reference-error")).to_contain_text("These are 2 files; give one image.")


@pytest.mark.parametrize("images", ["never", "required"])
def test_a_model_that_takes_no_image_or_always_one(
    open_page: Callable[..., Page], photo: Path, images: str
) -> None:
    def say(route: Route) -> None:
        route.fulfill(json=route.fetch().json() | {"images": images})

    page = open_page(key=None)
    page.route("**/v1/settings", say)
    page.evaluate("(photo) => { window.photo = photo }", base64.b64encode(photo.read_bytes()).decode())
    assert page.evaluate(DROP_OR_PASTE, ["drop", ["a.png"]]) is False
    expect(page.locator("#alert")).to_contain_text("has not said yet whether it takes an image")
    use_key(page)
    expect(page.locator("#status")).to_contain_text("Replicas")
    if images == "required":
        expect(image_field(page)).to_have_attribute("required", "")
        expect(page.locator("#input_reference-hint")).to_contain_text("This model needs one.")
        return
    expect(image_field(page)).to_be_hidden()
    for event in ("drop", "paste"):
        assert page.evaluate(DROP_OR_PASTE, [event, ["a.png"]]) is False
        expect(page.locator("#alert")).to_contain_text("made from text alone here; an image is not taken")
        page.evaluate("document.getElementById('alert').textContent = ''")


def test_a_hostile_prompt_stays_text(open_page: Callable[..., Page]) -> None:
    page = open_page()
    fill_and_make(page, HOSTILE)
    made = row(page, HOSTILE)
    expect(made).to_contain_text("Completed in")
    made.get_by_role("button", name="Look").click()
    expect(page.locator("#look-prompt")).to_have_text(HOSTILE)
    assert page.locator("img").count() == 0 and page.title() == "ProPhy"


def test_a_link_fills_in_the_form(open_page: Callable[..., Page]) -> None:
    request = {"prompt": "a ball", "seed": 3, "physics": {"scale": 0.5, "strength": {"collision": 3}}}
    page = open_page(f"/#{json.dumps(request)}")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a ball")
    expect(page.get_by_label("Seed")).to_have_value("3")
    expect(strength(page, "collision")).to_have_value("3")


def test_a_link_that_is_not_of_this_server(open_page: Callable[..., Page]) -> None:
    page = open_page()
    expect(page.get_by_label("Size in pixels")).to_have_value("32x32")
    for link, sentence in (
        ("{", "The link does not describe a video."),
        ('{"model": "sora-2"}', "made by sora-2; this server has prophy-tiny."),
        ('{"promt": 1, "physics": {"strength": {"magic": 2}}}', "know: promt, physics.strength.magic."),
    ):
        page.evaluate("(hash) => { location.hash = hash }", quote(link))
        expect(page.locator("#alert")).to_contain_text(sentence)


def test_a_video_is_made_again_from_its_link_and_its_recipe(
    open_page: Callable[..., Page], url: str, client: httpx.Client
) -> None:
    page, prompt = open_page(), "a ball bounces & melts #1 100%"
    page.context.grant_permissions(["clipboard-read", "clipboard-write"], origin=url)
    page.get_by_text("Physics", exact=True).click()
    strength(page, "melting").fill("4")
    page.get_by_label("Invert the refinement experts").check()
    make_and_look(page, prompt, Seed=2**53 - 1)
    with page.expect_download() as mp4:
        page.get_by_role("button", name="Save the mp4").click()
    with page.expect_download() as recipe:
        page.get_by_role("button", name="Save the recipe").click()
    page.get_by_role("button", name="Copy a link").click()
    expect(page.locator("#said")).to_have_text("Copied.")
    link = page.evaluate("navigator.clipboard.readText()")

    other = open_page(link.removeprefix(url))
    expect(other.get_by_label("Seed")).to_have_value(str(2**53 - 1))
    expect(other.locator("#alert")).to_be_hidden()
    before = newest(client)["id"]
    other.get_by_role("button", name="Make the video").click()
    until(lambda: newest(client)["id"] != before, "the video of the link is asked for")
    by_link = newest(client)["id"]
    by_recipe = submit(client, **json.loads(recipe.value.path().read_text()))
    for video_id in (by_link, by_recipe):
        wait(client, video_id)
        assert client.get(f"/v1/videos/{video_id}/content").content == mp4.value.path().read_bytes()


def test_older_videos(open_page: Callable[..., Page], client: httpx.Client, held: set[str]) -> None:
    held.add("one of many")
    ids = [submit(client, prompt="one of many", seed=seed) for seed in range(25)]
    page = open_page()
    rows = page.get_by_role("list", name="Videos").get_by_role("listitem")
    expect(rows).to_have_count(20)
    expect(rows.first).to_contain_text("seed 24")
    page.get_by_role("button", name="Older videos").click()
    many = rows.filter(has_text="one of many")
    expect(many).to_have_count(25)
    seeds = [int(re.findall(r"seed (\d+)", text)[0]) for text in many.all_inner_texts()]
    assert seeds == sorted(seeds, reverse=True), "newest first"
    for video_id in reversed(ids):
        client.delete(f"/v1/videos/{video_id}").raise_for_status()


def test_the_status_holds_figures_and_no_secret(open_page: Callable[..., Page], client: httpx.Client) -> None:
    wait(client, submit(client, prompt="a ball", num_inference_steps=1))
    client.post("/v1/videos", json={"prompt": ""})
    page = open_page()
    status = page.locator("#status")
    expect(status).to_contain_text("Replicas")
    figures = dict(zip(*[status.locator(tag).all_inner_texts() for tag in ("dt", "dd")], strict=True))
    assert figures["Replicas"] == "1" and figures["Failed"] == "0"
    assert float(figures["Seconds per video"]) > 0 and int(figures["Requests refused or failed"]) > 0
    assert KEY not in page.content() and hash_key(KEY) not in page.content()


def test_with_the_keyboard_alone(open_page: Callable[..., Page]) -> None:
    page = open_page(key=None)
    expect(page.get_by_label("API key")).to_be_focused()
    page.keyboard.type(KEY)
    page.keyboard.press("Enter")
    expect(page.get_by_role("button", name="Make the video")).to_be_enabled()
    tab_to(page, page.get_by_label("Prompt", exact=True))
    page.keyboard.type("a ball bounces by keyboard")
    tab_to(page, page.get_by_role("button", name="Make the video"))
    page.keyboard.press("Enter")
    made = row(page, "a ball bounces by keyboard")
    expect(made).to_contain_text("Completed in")
    tab_to(page, made.get_by_role("button", name="Look"))
    page.keyboard.press("Enter")
    expect(page.get_by_role("heading", name="Look")).to_be_focused()
    tab_to(page, page.get_by_label("Frame", exact=True))
    page.keyboard.press("ArrowRight")
    expect(page.locator("#frame-number")).to_have_text("2 of 5")
    tab_to(page, page.get_by_label("Map of"))
    expect(page.get_by_label("Map of")).to_have_value("collision")
    page.keyboard.press("Home")
    expect(page.get_by_label("Map of")).to_have_value("")


def tab_to(page: Page, wanted: Locator) -> None:
    """Presses Tab until the focus is there."""
    for _ in range(100):
        if wanted.evaluate("(element) => element === document.activeElement"):
            return
        page.keyboard.press("Tab")
    raise AssertionError(f"Tab does not lead to {wanted}")


def test_the_page_is_served_with_its_policy(url: str) -> None:
    for path, kind in (
        ("/", "text/html"),
        ("/page/main.js", "text/javascript"),
        ("/page/style.css", "text/css"),
    ):
        answer = httpx.get(url + path)
        assert answer.status_code == 200 and answer.headers["content-type"].startswith(kind)
        assert answer.headers["content-security-policy"].startswith("default-src 'self';")
    assert httpx.get(f"{url}/page/..%2Fapi.py").status_code == 404
    assert httpx.get(f"{url}/page/nothing.js").json()["error"]["code"] == "not_found"


def test_the_package_holds_the_page() -> None:
    folder = Path(__file__).parents[3] / "pipelines/serving/page"
    scripts = {path.name for path in folder.glob("*.js")}
    imported = {
        name for path in folder.glob("*.js") for name in re.findall(r'from "\./(.+)"', path.read_text())
    }
    assert scripts == imported | {"main.js"}
