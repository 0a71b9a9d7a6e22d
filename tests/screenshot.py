"""Takes the README's picture of the page of a running server:

    prophy serve
    python -m tests.screenshot http://127.0.0.1:8000 page.webp

It makes a video from the page's first example and the same with the branch off, which it lays the map of what
the prompt names beside.
"""

import io
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import expect, sync_playwright

PATIENCE_MS = 600_000
EXAMPLE = "a yellow light beam hits a mirror on the left"


def main(url: str, out: str) -> None:
    """Writes a picture, as its name ends, of the page at `url`, which must not ask for a key."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 1150})
        page.set_default_timeout(PATIENCE_MS)
        page.goto(url)
        page.get_by_role("button", name=EXAMPLE).click()
        page.get_by_label("Seed").fill("1")
        with page.expect_response("**/v1/videos") as answer:
            page.get_by_role("button", name="Make the video").click()
        row = page.locator(f"[data-id={answer.value.json()['id']}]")
        expect(row).to_contain_text("Completed in")
        row.get_by_role("button", name="Look").click()
        page.get_by_role("button", name="Make it with the branch off").click()
        twin = "the same with the branch off"
        expect(page.locator("#compare option", has_text=twin).first).to_be_attached()
        page.get_by_label("Compare with").select_option(label=twin)
        expect(page.locator("#other-caption")).to_have_text("Branch off")
        page.get_by_label("Opacity of the map").fill("60")
        page.get_by_label("Frame", exact=True).fill("8")
        with page.expect_response("**/metrics"):  # the figures of the status that are true now
            pass
        page.evaluate("scrollTo(0, 0)")
        picture = Image.open(io.BytesIO(page.screenshot()))
        picture.save(Path(out), quality=80)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
