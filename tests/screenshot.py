"""Takes the README's picture of the page of a running server:

    prophy serve
    python -m tests.screenshot http://127.0.0.1:8000 page.png

It makes a video from the page's first example, the same with the branch off, and lays a map over it.
"""

import shutil
import sys

from playwright.sync_api import expect, sync_playwright

PATIENCE_MS = 300_000


def main(url: str, out: str) -> None:
    """Writes a PNG of the page at `url`, which must not ask for a key."""
    expect.set_options(timeout=PATIENCE_MS)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.goto(url)
        example = page.locator("#examples button").first
        example.click()
        page.get_by_label("Seed").fill("1")
        page.get_by_role("button", name="Make the video").click()
        row = page.get_by_role("list", name="Videos").get_by_role("listitem").first
        expect(row).to_contain_text("Completed in")
        row.get_by_role("button", name="Look").click()
        page.get_by_role("button", name="Make it with the branch off").click()
        twin = "the same with the branch off"
        expect(page.locator("#compare option", has_text=twin)).to_have_count(1)
        page.get_by_label("Compare with").select_option(label=twin)
        page.get_by_label("Map of").select_option(index=1)
        page.get_by_label("Opacity of the map").fill("60")
        page.get_by_label("Frame", exact=True).fill("8")
        page.screenshot(path=out, full_page=True)
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
