"""Take the pictures of the README from what `make recall` made: the asset graph, and the sheet of neighbours.

    make recall && .venv/bin/python docs/screenshots.py

Needs a Chromium browser (`chromium`, `chromium-browser` or `google-chrome` on PATH).
"""

import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

from notellm2_core.config import config_from_environment
from notellm2_core.recipe import Recipe

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def screenshot(url: str, out: Path, width: int = 1600, height: int = 900) -> None:
    """A PNG of the page at `url`, after 25 virtual seconds of its scripts. Raises ValueError without a browser."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise ValueError(f"none of {', '.join(BROWSERS)} is on PATH; install a Chromium browser.")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", f"--window-size={width},{height}",
                   "--virtual-time-budget=25000", f"--screenshot={out}", url]  # fmt: skip
        subprocess.run(command, check=True, capture_output=True, timeout=180)


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])


def wait_for(url: str, seconds: float = 90) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise ValueError(f"{url} did not answer within {seconds} s.")


def main() -> None:
    os.environ.setdefault("DAGSTER_HOME", str(ROOT))
    IMAGES.mkdir(parents=True, exist_ok=True)
    report = Recipe(config_from_environment()).dataset("eval_recall")
    shutil.copy(report.path / "neighbours.jpg", IMAGES / "neighbours.jpg")
    port = free_port()
    webserver = Path(sys.executable).parent / "dagster-webserver"
    server = subprocess.Popen([webserver, "-m", "pipelines.definitions", "-h", "127.0.0.1", "-p", str(port)], cwd=ROOT)
    try:
        wait_for(f"http://127.0.0.1:{port}/server_info")
        screenshot(f"http://127.0.0.1:{port}/asset-groups", IMAGES / "asset_graph.png")
        screenshot(f"http://127.0.0.1:{port}/assets/eval_recall?view=overview", IMAGES / "eval_recall.png", 1600, 1400)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
