"""A headless Chromium for what people look at."""

import contextlib
import shutil
from collections.abc import Iterator

from playwright.sync_api import Page, sync_playwright

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextlib.contextmanager
def browser() -> Iterator:
    path = next(filter(None, map(shutil.which, NAMES)), None)
    assert path, "Chromium is not installed: apt-get install chromium, or Google Chrome"
    with sync_playwright() as playwright:
        opened = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield opened
        opened.close()


def open_page(opened, address: str, width: int) -> tuple[Page, list[str]]:
    """A page of that width, and a list that fills with what goes wrong in it."""
    page, errors = opened.new_page(viewport={"width": width, "height": 900}), []
    page.on("console", lambda message: message.type == "error" and errors.append(message.text))
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    return page, errors
