"""Takes the page's pictures: `python -m demos.teach.screenshots` writes docs/teach-wide.png and docs/teach-narrow.png.

It teaches real digits for about a minute in Debian's headless Chromium, driven by Playwright.
"""

from __future__ import annotations

import shutil
import sys
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from demos.teach.__main__ import make_teacher
from demos.teach.serving import in_background

DOCS = Path(__file__).resolve().parents[2] / "docs"
LONG = 300_000  # milliseconds that a step may take on a slow machine
TALLEST = 2200  # pixels of a picture: the rest of a narrow page is cut off
COLOURS = 96  # in a file: flat areas and text need no more
Scheme = Literal["light", "dark"]


def teach_some(page: Page) -> None:
    """Two tasks, a picture that the server and the browser classify, and dreams."""
    for number in (1, 2):
        page.click("#teach-button")
        page.wait_for_selector(f"#known .task:nth-child({number})", timeout=LONG)
        page.wait_for_selector("#outcome.done", timeout=LONG)
    page.click("#try-sample")
    page.wait_for_selector('#answer[data-compared^="{"]', timeout=LONG)
    page.click("#dream-button")
    page.wait_for_selector("#dreams canvas", timeout=LONG)


def shoot(page: Page, path: Path, width: int, scheme: Scheme) -> None:
    """The page from its top, as a small PNG."""
    page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    page.set_viewport_size({"width": width, "height": 900})
    page.mouse.move(0, 0)
    page.evaluate("document.activeElement.blur()")
    whole: Any = Image.open(BytesIO(page.screenshot(full_page=True))).convert("RGB")
    top = whole.crop((0, 0, whole.width, min(whole.height, TALLEST)))
    top.quantize(COLOURS, dither=Image.Dither.NONE).save(path, optimize=True)
    print(f"{path} has {path.stat().st_size:,} bytes")


def main(folder: Path = DOCS) -> int:
    chromium = shutil.which("chromium")
    if chromium is None:
        print("Chromium is not installed; install it: apt-get install chromium", file=sys.stderr)
        return 1
    with in_background(make_teacher(None, False, None)) as url, sync_playwright() as playwright:
        page = playwright.chromium.launch(executable_path=chromium).new_page(viewport={"width": 1200, "height": 900})
        page.goto(url)
        page.wait_for_selector("body[data-ready]")
        teach_some(page)
        shoot(page, folder / "teach-wide.png", 1200, "light")
        shoot(page, folder / "teach-narrow.png", 390, "dark")
    return 0


if __name__ == "__main__":
    sys.exit(main())
