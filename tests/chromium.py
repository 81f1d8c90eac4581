"""Pages in a headless browser, for the tests of every page that the library writes."""

import shutil
import subprocess
from html.parser import HTMLParser

import pytest

CHROMIUM = shutil.which("chromium")


def in_chromium(test):
    """Mark a test that needs the browser; skipped, saying so, where there is none."""
    missing = pytest.mark.skipif(
        CHROMIUM is None, reason="needs Debian's chromium: apt-get install it"
    )
    return pytest.mark.browser(missing(test))


def rendered(path, folder):
    """Open a page in a fresh headless Chromium without a network; return its DOM and console."""
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-sync"
    flags += " --disable-background-networking --disable-component-update"
    flags += (
        " --disable-dev-shm-usage --virtual-time-budget=8000 --enable-logging=stderr --dump-dom"
    )
    done = subprocess.run(
        [
            CHROMIUM,
            *flags.split(),
            "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder}",
            f"file://{path}",
        ],
        capture_output=True,
        text=True,
        timeout=180,
    )
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    return done.stdout, [line for line in console if path.name in line]


class Plots(HTMLParser):
    """Count what was drawn in each plot of a rendered page."""

    def __init__(self, dom):
        super().__init__()
        self.drawn = {}
        self.current = None
        self.feed(dom)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        name, kind = attributes.get("id") or "", attributes.get("class") or ""
        if tag == "div" and name.startswith("plot-"):
            self.current = self.drawn[name] = {"svg": 0, "line": 0, "bar": 0}
        elif self.current is not None and "main-svg" in kind:
            self.current["svg"] += 1
        elif self.current is not None and "js-line" in kind:
            self.current["line"] += 1
        elif self.current is not None and kind == "point":
            self.current["bar"] += 1
