"""Take the images of the pages from what `make recall` made: the asset graph, assets' pages, the sheet of neighbours.

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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from PIL import Image

from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
# The address of the asset graph with these groups open.
GROUPS = ",".join(
    f"global@global:{group}" for group in ("logs", "pairs", "model", "retrieval", "evaluation", "release")
)
GRAPH_SIZE = (2400, 3200)  # px; in a smaller window Dagster leaves out the assets at its border
QUIET = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
)  # fmt: skip


def browse(url: str, *options: str) -> str:
    """Open the page at `url` for 25 virtual seconds of its scripts. Returns stdout. Raises ValueError if no browser."""
    browser = next((found for name in BROWSERS if (found := shutil.which(name))), None)
    if browser is None:
        raise ValueError(f"none of {', '.join(BROWSERS)} is on PATH; install a Chromium browser.")
    with tempfile.TemporaryDirectory() as profile:
        command = [browser, *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=25000", *options, url]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def screenshot(url: str, out: Path, width: int = 1600, height: int = 900) -> None:
    browse(url, f"--window-size={width},{height}", f"--screenshot={out}")
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)  # half the size or less


@contextmanager
def dagster_webserver(**env: str) -> Iterator[str]:
    """The address of a Dagster UI on this repository's definitions, for as long as the block runs."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    command = [Path(sys.executable).parent / "dagster-webserver", "-m", "pipelines.definitions", "-p", str(port)]
    server = subprocess.Popen(command, cwd=ROOT, env={**os.environ, **env})
    try:
        wait_for(f"http://127.0.0.1:{port}/server_info")
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.wait()


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
    report = Catalog(config_in_force()).dataset("eval_recall")
    shutil.copy(report.path / "neighbours.jpg", IMAGES / "neighbours.jpg")
    with dagster_webserver() as dagster:
        screenshot(f"{dagster}/asset-groups?expanded={GROUPS}", IMAGES / "asset_graph.png", *GRAPH_SIZE)
        screenshot(f"{dagster}/assets/eval_recall?view=overview", IMAGES / "eval_recall.png", 1600, 1400)
        screenshot(f"{dagster}/assets/release?view=overview", IMAGES / "release.png", 1600, 1400)


if __name__ == "__main__":
    main()
