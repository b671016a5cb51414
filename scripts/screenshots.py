"""Pictures of the page for the documents: desktop, phone, dark, a film in the making, the memory check.

python scripts/screenshots.py

Starts the page with the tiny model on this machine, and uses it in a real Chromium or Chrome, which has to be on PATH.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from playwright.sync_api import Browser, Locator, Page, expect, sync_playwright

import infworld
from infworld.app import server
from infworld.config import PROJECT_ROOT

DESKTOP = {"width": 1400, "height": 900}
PHONE = {"width": 390, "height": 844}
PATIENCE = 180_000  # milliseconds: a film takes its time
COLOURS = 256  # of a picture of the page: a third of the bytes, and hardly to be seen


@contextmanager
def page_server() -> Iterator[str]:
    """The page with the tiny model, in this process: its address."""
    with TemporaryDirectory() as films, socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
        free.close()
        address = {"server_name": "127.0.0.1", "server_port": port}
        blocks = server.serve(
            infworld.load("tiny", "cpu"), Path(films), prevent_thread_lock=True, quiet=True, **address
        )
        try:
            yield blocks.local_url
        finally:
            blocks.close()


@contextmanager
def visit(browser: Browser, address: str, welcome: bool = False, **options) -> Iterator[Page]:
    """A visitor's page, without the first hint unless that is wanted."""
    context = browser.new_context(**{"viewport": DESKTOP, **options})
    context.set_default_timeout(PATIENCE)
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#play .begin")).to_be_visible(timeout=PATIENCE)
    hint = page.get_by_text("Got it")
    if not welcome and hint.is_visible():
        hint.click()
    yield page
    context.close()


def take_example(page: Page, index: int) -> None:
    page.locator("#examples button[data-index]").nth(index).click()
    expect(page.locator("#play .still")).to_be_visible(timeout=PATIENCE)


def film(page: Page, index: int) -> None:
    """Makes the film of an example, to its end."""
    take_example(page, index)
    page.click("#film-tab-button")
    page.click("#generate")
    expect(page.locator("#status")).to_contain_text("Done", timeout=PATIENCE)


def play(page: Page) -> None:
    """Walks and turns until there is something to see on the map."""
    page.click("#play .begin")
    for key, seconds in (("KeyW", 3), ("ArrowRight", 2), ("KeyW", 3)):
        page.keyboard.down(key)
        page.wait_for_timeout(1000 * seconds)
        page.keyboard.up(key)


def until_chunk(page: Page, number: int) -> None:
    """Waits until the film is in the middle of a chunk, and plays."""
    expect(page.locator("#status")).to_contain_text(re.compile(rf"Chunk {number} of \d+, step [3-8]"), timeout=PATIENCE)
    page.wait_for_function("document.querySelector('#film video')?.currentTime > 0.5")


def save(part: Page | Locator, path: Path, **options) -> None:
    """A picture of a page or a part of one, with few colours."""
    time.sleep(0.6)  # for transitions to end
    part.screenshot(path=path, **options)
    with Image.open(path) as picture:
        small = picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE)
    small.save(path, optimize=True)
    print(f"{path.name}: {small.width} x {small.height}, {path.stat().st_size / 1000:.0f} kB")


def take_all(browser: Browser, address: str, out: Path) -> None:
    with visit(browser, address, welcome=True) as page:
        take_example(page, 0)
        save(page, out / "desktop.png")
    with visit(browser, address) as page:
        take_example(page, 1)
        play(page)
        save(page, out / "playing.png")
        page.click("#play .leave")
        expect(page.locator("#play .go-on")).to_be_visible(timeout=PATIENCE)
    with visit(browser, address) as page:
        take_example(page, 2)
        page.click("#film-tab-button")
        page.click("#generate")
        until_chunk(page, 2)
        save(page, out / "generating.png")
        page.click("#stop")
        expect(page.locator("#status")).to_contain_text("Stopped", timeout=PATIENCE)
    with visit(browser, address, color_scheme="dark") as page:
        film(page, 1)
        save(page, out / "dark.png", full_page=True)
    with visit(browser, address) as page:
        film(page, 0)
        expect(page.locator("#memory .pair").first).to_be_visible(timeout=PATIENCE)
        save(page.locator("#memory-panel"), out / "memory-check.png")
    with visit(browser, address, viewport=PHONE, is_mobile=True, has_touch=True, device_scale_factor=2) as page:
        take_example(page, 0)
        play(page)
        save(page, out / "phone.png")


def main() -> None:
    parser = argparse.ArgumentParser(description="Take the pictures of the page that the documents show.")
    parser.add_argument("--out", type=Path, default=PROJECT_ROOT / "docs" / "screenshots", help="folder")
    args = parser.parse_args()
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    chromium = next((found for found in map(shutil.which, names) if found), None)
    if chromium is None:
        parser.error("no Chromium on PATH")
    args.out.mkdir(parents=True, exist_ok=True)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    with page_server() as address, sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        take_all(browser, address, args.out)
        browser.close()


if __name__ == "__main__":
    main()
