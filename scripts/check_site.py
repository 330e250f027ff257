"""Claim: every page of the site opens without errors, on a desktop and on a phone, in both themes, and search works.

Opens ``out/site``, which ``scripts/docs`` builds, in a headless Chromium: the one that CHROMIUM names, or an installed
one. Install Playwright with ``pip install -e '.[docs]'``. A page fails if it logs an error, requests a file that is not
there, shows a picture that does not load or that belongs to the other theme, or is wider than the screen.
"""

import argparse
import functools
import http.server
import itertools
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

from playwright.sync_api import Browser, Page, TimeoutError, ViewportSize, sync_playwright

Theme = Literal["light", "dark"]
ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCREENS: dict[str, ViewportSize] = {
    "desktop": {"width": 1280, "height": 900},  # CSS pixels
    "phone": {"width": 390, "height": 844},
}
THEMES: tuple[Theme, ...] = ("light", "dark")
OTHER = {"light": "dark", "dark": "light"}
SEARCHES = {"drop_block": "drop_block", "checkpoint": "memory", "classifier": "recipes"}  # words: a page they find

PICTURES = """() => Array.from(document.images).filter(image => image.offsetParent !== null).map(
    image => [image.getAttribute("src"), image.complete && image.naturalWidth > 0])"""
SHOWN = "theme => document.documentElement.dataset.theme === theme"
WIDTHS = "() => [document.documentElement.scrollWidth, document.documentElement.clientWidth]"


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    """Serves files without a log."""

    def log_message(self, *args: object) -> None:
        """Log nothing."""


def serve(folder: Path) -> str:
    """Serve a folder on this machine while the process lives, and return its address."""
    handler = functools.partial(QuietHandler, directory=str(folder))
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f"http://127.0.0.1:{server.server_address[1]}"


def faults_of(page: Page, address: str) -> Iterator[str]:
    """Open a page, and return what is wrong with it on each screen and in each theme."""
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("requestfailed", lambda request: logged.append(f"request failed: {request.url}"))
    page.goto(address, wait_until="load")
    for (screen, size), theme in itertools.product(SCREENS.items(), THEMES):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=theme)
        page.wait_for_function(SHOWN, arg=theme)
        for source, loaded in page.evaluate(PICTURES):
            if not loaded:
                yield f"{screen}, {theme}: picture does not load: {source}"
            if f"-{OTHER[theme]}." in source:
                yield f"{screen}, {theme}: picture of the {OTHER[theme]} theme: {source}"
        wide, width = page.evaluate(WIDTHS)
        if wide > width:
            yield f"{screen}, {theme}: {wide} pixels wide on a screen of {width}"
    yield from logged


def search_faults(browser: Browser, site: str) -> Iterator[str]:
    """Search for words, and return which of them do not lead to their page."""
    for words, target in SEARCHES.items():
        page = browser.new_page()
        page.goto(f"{site}/search.html?q={words}")
        try:
            page.wait_for_selector("#search-results li a", timeout=10_000)
        except TimeoutError:
            yield f"search for {words} finds nothing"
            page.close()
            continue
        page.wait_for_timeout(500)  # results come one by one
        found = [link.get_attribute("href") or "" for link in page.query_selector_all("#search-results li a")]
        if not any(target in link for link in found):
            yield f"search for {words} does not find {target}, but {found[:5]}"
        page.close()


def take_screenshots(page: Page, folder: Path, name: str) -> None:
    """Save an opened page as a picture for each screen and theme."""
    for (screen, size), theme in itertools.product(SCREENS.items(), THEMES):
        page.set_viewport_size(size)
        page.emulate_media(color_scheme=theme)
        page.screenshot(path=folder / f"{name}-{screen}-{theme}.png", full_page=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--site", type=Path, default=ROOT / "out" / "site")
    parser.add_argument("--screenshots", type=Path, help="folder for a picture of every page")
    options = parser.parse_args()
    pages = sorted(path.relative_to(options.site) for path in options.site.rglob("*.html"))
    pages = [page for page in pages if page.parts[0] not in ("_static", "_modules")]
    if not pages:
        sys.exit(f"no pages in {options.site}; run scripts/docs")
    program = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if program is None:
        sys.exit("no Chromium found; install one, or set CHROMIUM to its path")
    site, faults = serve(options.site), []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for path in pages:
            page = browser.new_page()
            faults += [f"{path}, {fault}" for fault in faults_of(page, f"{site}/{path}")]
            if options.screenshots:
                take_screenshots(page, options.screenshots, "-".join(path.with_suffix("").parts))
            page.close()
        faults += search_faults(browser, site)
        browser.close()
    print("\n".join(faults) or f"{len(pages)} pages: no faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
