"""The page at `/` in a real browser, against the real API and the real model, in one process without Ray."""

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

from pipelines.generation.limits import shape_limits
from pipelines.serving.middleware import hash_key, new_key
from pipelines.serving.replica import VideoGenerator
from tests.servers import PATIENCE_S, http_server, save_checkpoint, serve_config

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="Debian's chromium is not installed")
KEY = new_key()
PATIENCE_MS = 1000 * PATIENCE_S
HOSTILE = "<img src=x onerror=\"document.title='owned'\"> a red ball falls"

expect.set_options(timeout=PATIENCE_MS)


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("page")
    config = serve_config(
        folder / "run",
        save_checkpoint(folder / "model"),
        f"serve.api_keys=[{hash_key(KEY)}]",
        "serve.max_queued=20",
        'serve.examples=["a turquoise candle burns on the left"]',
    )
    generator = VideoGenerator(config, shape_limits(config))
    with http_server(config, generator.generate) as url:
        yield url


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


def fill_and_make(page: Page, prompt: str, steps: int = 1, seed: int = 7) -> None:
    page.get_by_label("Prompt", exact=True).fill(prompt)
    page.get_by_label("Seed").fill(str(seed))
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Denoising steps").fill(str(steps))
    page.get_by_role("button", name="Make the video").click()


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
    fill_and_make(page, f"a ball in {scheme}")
    made = row(page, f"a ball in {scheme}")
    expect(made).to_contain_text("Completed in")
    made.get_by_role("button", name="Look").click()
    expect(page.locator("#frame-number")).to_contain_text("1 of")
    page.get_by_text("Physics", exact=True).click()
    found = Axe().run(page)
    assert found.violations_count == 0, found.generate_report()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360, "nothing is wider than the window"


def test_make_watch_look_and_compare(open_page: Callable[..., Page], url: str) -> None:
    page = open_page()
    expect(page.locator("#model")).to_have_text("prophy-tiny")
    page.get_by_role("button", name="a turquoise candle burns on the left").click()
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a turquoise candle burns on the left")
    fill_and_make(page, "a blue ball falls and bounces")
    made = row(page, "a blue ball falls")
    expect(made).to_contain_text("Completed in")
    made.get_by_role("button", name="Look").click()
    expect(page.locator("#frame-number")).to_have_text("1 of 5")
    first = pixels(page, "film")
    assert len(set(first)) > 10, "a picture, not one colour"
    page.get_by_role("button", name="Next frame").click()
    expect(page.locator("#frame-number")).to_have_text("2 of 5")
    assert pixels(page, "film") != first

    # The frame on the canvas is the frame of the video.
    headers = {"authorization": f"Bearer {KEY}"}
    newest = httpx.get(f"{url}/v1/videos", params={"limit": 1}, headers=headers).json()["data"][0]
    assert newest["physics"]["return_maps"] is True and newest["seed"] == 7
    bars = page.locator("#bars li")
    expect(bars).to_have_count(17)
    page.get_by_role("button", name="Previous frame").click()
    page.get_by_label("Map of").select_option("collision")
    assert pixels(page, "film") != first, "the map lies over the frame"
    page.get_by_label("Opacity of the map").fill("0")
    assert pixels(page, "film") == first

    page.get_by_role("button", name="Make it with the branch off").click()
    option = page.locator("#compare option", has_text="the same with the branch off")
    expect(option).to_have_count(1)
    page.get_by_label("Compare with").select_option(label="the same with the branch off")
    expect(page.locator("#other-caption")).to_have_text("Branch off")
    expect(page.locator("#difference-caption")).to_contain_text("of 255 a pixel")
    other = pixels(page, "other")
    difference = [min(255, 4 * abs(a - b)) for a, b in zip(first, other, strict=True)]
    shown = pixels(page, "difference")
    assert [d for i, d in enumerate(shown) if i % 4 < 3] == [d for i, d in enumerate(difference) if i % 4 < 3]
    assert max(difference) > 8, "the branch changes the video"


def test_what_is_typed_before_the_settings_arrive_stays(open_page: Callable[..., Page]) -> None:
    page, held = open_page(key=None), []
    page.route("**/v1/settings", lambda route: held.append(route))
    with page.expect_request("**/v1/settings"):
        use_key(page)
    page.get_by_label("Prompt", exact=True).fill("a ball for the impatient")
    page.get_by_text("Sampling", exact=True).click()
    page.get_by_label("Denoising steps").fill("1")
    held.pop().continue_()
    expect(page.get_by_label("Size in pixels")).to_have_value("32x32")
    expect(page.get_by_label("Prompt", exact=True)).to_have_value("a ball for the impatient")
    expect(page.get_by_label("Denoising steps")).to_have_value("1")


def test_a_video_made_while_the_list_is_under_way_stays(open_page: Callable[..., Page]) -> None:
    page, held = open_page(key=None), []
    page.route("**/v1/videos?limit=20", lambda route: held.append((route, route.fetch())))
    use_key(page)
    expect(page.get_by_label("Size in pixels")).to_have_value("32x32")
    fill_and_make(page, "a ball during the list")
    made = row(page, "a ball during the list")
    expect(made).to_contain_text("Completed in")
    route, older = held.pop()
    route.fulfill(response=older)
    expect(page.locator("#status")).to_contain_text("Replicas")
    assert made.count() == 1


def test_cancel(open_page: Callable[..., Page]) -> None:
    page = open_page()
    fill_and_make(page, "a green ball that is cancelled", steps=200)
    made = row(page, "a green ball that is cancelled")
    made.get_by_role("button", name="Cancel").click()
    expect(made).to_have_count(0)


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
    page.get_by_label("collision", exact=True).fill("11")
    page.get_by_role("button", name="Make the video").click()
    expect(page.get_by_label("collision", exact=True)).to_have_attribute("aria-invalid", "true")
    expect(page.locator("#size-error")).to_have_count(0)


def test_a_wrong_key(open_page: Callable[..., Page]) -> None:
    page = open_page(key="prophy-wrong")
    expect(page.locator("#alert")).to_contain_text("a valid API key is needed")
    use_key(page)
    expect(page.locator("#model")).to_have_text("prophy-tiny")
    expect(page.locator("#alert")).to_be_hidden()
    assert KEY not in page.url and "prophy-wrong" not in page.url


def test_reload_in_the_middle_and_two_tabs(open_page: Callable[..., Page]) -> None:
    first, second = open_page(), open_page()
    fill_and_make(first, "a red pendulum swings", steps=30)
    expect(row(first, "a red pendulum swings")).to_contain_text(re.compile("Queued|Step"))
    first.reload()
    expect(row(first, "a red pendulum swings")).to_contain_text("Completed in")
    expect(row(second, "a red pendulum swings")).to_contain_text("Completed in")


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
    expect(page.locator("[id='physics.strength.collision']")).to_have_value("3")


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
