"""A page of a report in Debian's Chromium, driven by Playwright; what it complains of is kept."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

SIZES = {"phone": (360, 800), "desk": (1400, 900)}
READY = "document.documentElement.dataset.ready === 'true'"


def find_chromium() -> str | None:
    """The browser's program: $CHROMIUM, or that of the system."""
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)


@dataclass
class Opened:
    """page: ready for use; complaints: what its console said; requests: addresses other than its own."""

    page: Page
    complaints: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


@contextmanager
def chromium(program: str) -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        yield browser
        browser.close()


def open_report(browser: Browser, path: Path, size: str = "desk", scheme: Any = "light") -> Opened:
    """Open a file in a window of its own; scheme: the visitor's colors, 'light' or 'dark'."""
    width, height = SIZES[size]
    context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=scheme)
    context.grant_permissions(["clipboard-read", "clipboard-write"])
    opened = Opened(context.new_page())
    opened.page.on("console", lambda message: opened.complaints.append(f"{message.type}: {message.text}"))
    opened.page.on("pageerror", lambda error: opened.complaints.append(str(error)))
    opened.page.on("request", lambda request: opened.requests.append(request.url))
    opened.page.goto(path.as_uri())
    opened.page.wait_for_function(READY)
    opened.requests = [url for url in opened.requests if not url.startswith("data:") and url != path.as_uri()]
    return opened
