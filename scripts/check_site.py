"""Claim: every page of the site opens without errors, on a desktop and on a phone, in both themes, and search works.

Opens ``out/site``, which ``scripts/docs`` builds, in a headless Chromium: the one that CHROMIUM names, or an installed
one. Install Playwright with ``pip install -e '.[docs]'``. A page fails if it logs an error, requests a file that is not
there, shows a picture that does not load or that belongs to the other theme, or is wider than the screen.
"""

import argparse
import functools
import http.server
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

from playwright.sync_api import Browser, Page, sync_playwright

ROOT = Path(__file__).parent.parent
BROWSERS = ("chromium", "chromium-browser", "google-chrome", "chrome")
SCREENS = {"desktop": (1280, 900), "phone": (390, 844)}  # CSS pixels
THEMES = ("light", "dark")
SEARCHES = {"drop_block": "drop_block", "checkpoint": "memory", "classifier-free": "recipes"}  # words: a page they find

PICTURES = """() => Array.from(document.images).filter(image => image.offsetParent !== null).map(
    image => [image.getAttribute("src"), image.complete && image.naturalWidth > 0])"""
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


def faults_of(page: Page, address: str, theme: str) -> Iterator[str]:
    """Open a page, and return what is wrong with it."""
    logged: list[str] = []
    page.on("console", lambda message: logged.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: logged.append(str(error)))
    page.on("requestfailed", lambda request: logged.append(f"request failed: {request.url}"))
    page.goto(address, wait_until="load")
    yield from logged
    other = "dark" if theme == "light" else "light"
    for source, loaded in page.evaluate(PICTURES):
        if not loaded:
            yield f"picture does not load: {source}"
        if f"-{other}." in source:
            yield f"picture of the {other} theme: {source}"
    wide, screen = page.evaluate(WIDTHS)
    if wide > screen:
        yield f"{wide} pixels wide on a screen of {screen}"


def search_faults(browser: Browser, site: str) -> Iterator[str]:
    """Search for words, and return which of them do not lead to their page."""
    for words, target in SEARCHES.items():
        page = browser.new_page()
        page.goto(f"{site}/search.html?q={words}")
        try:
            page.wait_for_selector("#search-results li a", timeout=10_000)
        except Exception as error:  # Playwright's errors have no common class for this
            yield f"search for {words} finds nothing: {type(error).__name__}"
            continue
        page.wait_for_timeout(500)  # results come one by one
        found = [link.get_attribute("href") or "" for link in page.query_selector_all("#search-results li a")]
        if not any(target in link for link in found):
            yield f"search for {words} does not find {target}, but {found[:5]}"
        page.close()


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
    site, faults, count = serve(options.site), [], 0
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        for screen, (width, height) in SCREENS.items():
            for theme in THEMES:
                context = browser.new_context(viewport={"width": width, "height": height}, color_scheme=theme)
                for path in pages:
                    page = context.new_page()
                    for fault in faults_of(page, f"{site}/{path}", theme):
                        faults.append(f"{path}, {screen}, {theme}: {fault}")
                    if options.screenshots:
                        name = f"{screen}-{theme}-{'-'.join(path.with_suffix('.png').parts)}"
                        page.screenshot(path=options.screenshots / name, full_page=True)
                    page.close()
                    count += 1
                context.close()
        faults += search_faults(browser, site)
        browser.close()
    print("\n".join(faults) or f"{len(pages)} pages, opened {count} times: no faults")
    sys.exit(bool(faults))


if __name__ == "__main__":
    main()
