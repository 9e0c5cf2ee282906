"""Take the images of the pages from what `make recall` made: the asset graph, assets' pages, neighbours, the service.

    make recall && .venv/bin/python -m docs.screenshots
    notellm2 simulate year --weeks 6 --out FOLDER && .venv/bin/python -m docs.screenshots --year FOLDER

The second command takes those of several weeks: the page of the release, and a gate beside its past. If the lake has
another release than the live one, the service's page also shows both side by side.
Needs a Chromium browser (`chromium`, `chromium-browser` or `google-chrome` on PATH).
"""

import argparse
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from PIL import Image

from docs.browser import QUIET, Browser, browser_path
from notellm2_core.config.load import config_in_force
from notellm2_core.lake.catalog import Catalog
from notellm2_core.lake.lake import Lake
from notellm2_core.lake.ledger import Ledger

ROOT = Path(__file__).parents[1]
IMAGES = ROOT / "docs" / "images"
# The address of the asset graph with these groups open.
GROUPS = ",".join(
    f"global@global:{group}" for group in ("logs", "pairs", "model", "retrieval", "evaluation", "release")
)
# On the service's page: nothing is asked any more.
SETTLED = "['results', 'user'].every((id) => document.getElementById(id)?.ariaBusy === 'false')"
GRAPH_SIZE = (2400, 3200)  # px; in a smaller window Dagster leaves out the assets at its border


def browse(url: str, *options: str) -> str:
    """Open the page at `url` for 25 virtual seconds of its scripts. Returns stdout. Raises ValueError if no browser."""
    with tempfile.TemporaryDirectory() as profile:
        command = [browser_path(), *QUIET, f"--user-data-dir={profile}", "--virtual-time-budget=25000", *options, url]
        return subprocess.run(command, check=True, capture_output=True, text=True, timeout=180).stdout


def screenshot(url: str, out: Path, width: int = 1600, height: int = 900) -> None:
    browse(url, f"--window-size={width},{height}", f"--screenshot={out}")
    Image.open(out).convert("RGB").quantize(256).save(out, optimize=True)  # half the size or less


@contextmanager
def dagster_webserver(module: str = "pipelines.definitions", **env: str) -> Iterator[str]:
    """The address of a Dagster UI on this repository's definitions, for as long as the block runs."""
    with server(["dagster-webserver", "-m", module, "-p"], "server_info", **env) as address:
        yield address


@contextmanager
def server(command: Sequence[str], path: str, **env: str) -> Iterator[str]:
    """The address of a server that this command and a port start, once it answers at `path`."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = Path(sys.executable).parent / command[0]
    process = subprocess.Popen([program, *command[1:], str(port)], cwd=ROOT, env={**os.environ, **env})
    try:
        wait_for(f"http://127.0.0.1:{port}/{path}")
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait()


def wait_for(url: str, seconds: float = 180) -> None:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        with suppress(OSError), urllib.request.urlopen(url, timeout=2):
            return
        time.sleep(0.5)
    raise ValueError(f"{url} did not answer within {seconds} s.")


def service_page(address: str, out: Path) -> None:
    """The page of the service: a history and its feed; one query in several ways, and under two releases; narrow.

    The image of two releases is not taken where only one is in memory.
    """
    with urllib.request.urlopen(f"{address}/releases") as answer:
        releases = json.load(answer)["releases"]
    query, *history = releases[0]["examples"][1:4]
    ways = {"id": query, "inputs": ["multimodal", "text", "image"]}
    shots: dict[str, tuple[dict[str, Any], tuple[int, int], bool]] = {
        "serving.webp": ({"id": query, "history": history}, (1280, 1000), False),
        "serving_inputs.webp": (ways, (1280, 900), True),
        "serving_narrow.webp": ({"id": query, "history": history}, (360, 800), False),
    }
    if len(releases) > 1:
        both = {"id": query, "history": history, "release": [release["release"] for release in releases]}
        shots["serving_releases.webp"] = (both, (1280, 1000), False)
    with Browser() as browser:
        for name, (question, (width, height), is_dark) in shots.items():
            browser.look(width, height, is_dark)
            browser.open(f"{address}/?{urllib.parse.urlencode(question, doseq=True)}")
            browser.wait(SETTLED)
            if "history" in question and width > 1000:
                browser.run("document.querySelectorAll('#columns .add')[1].click()")
                browser.wait(SETTLED)
            browser.wait("[...document.querySelectorAll('.image')].every((image) => image.firstChild)")
            browser.wait("[...document.images].every((image) => image.complete)")
            browser.screenshot(out / name)


def second_release() -> str | None:
    """A release of the lake that is not live; None: there is no other."""
    config = config_in_force()
    champion = Ledger(config.lake, config.name).state().champion
    others = [dataset.path.name for dataset in Lake(config.lake).datasets("release")]
    return next((other for other in others if other != champion), None)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m docs.screenshots")
    parser.add_argument("--year", type=Path, metavar="FOLDER", help="of `notellm2 simulate year --out FOLDER`")
    year = parser.parse_args().year
    IMAGES.mkdir(parents=True, exist_ok=True)
    if year is None:
        take_pages()
    else:
        take_weeks(year.resolve())


def take_pages() -> None:
    """What `make recall` made."""
    os.environ.setdefault("DAGSTER_HOME", str(ROOT))
    report = Catalog(config_in_force()).dataset("eval_recall")
    shutil.copy(report.path / "neighbours.jpg", IMAGES / "neighbours.jpg")
    with dagster_webserver() as dagster:
        screenshot(f"{dagster}/asset-groups?expanded={GROUPS}", IMAGES / "asset_graph.png", *GRAPH_SIZE)
        screenshot(f"{dagster}/assets/eval_recall?view=overview", IMAGES / "eval_recall.png", 1600, 1400)
    take_service_page()


def take_weeks(year: Path) -> None:
    """The release after the weeks of a simulated year, and a gate beside its past."""
    env = {"DAGSTER_HOME": str(year / "home"), "NOTELLM2_CONFIG": str(year / "site" / "config.yaml")}
    pages = {
        "release_weeks.webp": ("release?view=overview", "decisions"),
        "gates.webp": ("verdict?view=checks", "Plots"),
    }
    with dagster_webserver("pipelines.simulation.definitions", **env) as dagster, Browser(120) as browser:
        browser.look(1600, 1400)
        for name, (page, last) in pages.items():
            browser.open(f"{dagster}/assets/{page}")
            browser.wait(f"document.body.innerText.includes({json.dumps(last)})")
            time.sleep(5)  # Dagster draws its plots
            browser.screenshot(IMAGES / name)


def take_service_page() -> None:
    """What the service shows of the release that is live, and of another one beside it."""
    other = second_release()
    beside = [] if other is None else ["--experiment", "ab", "--challenger", other, "--share", "0"]
    with server(["notellm2", "serve", *beside, "--port"], "readyz") as address:
        service_page(address, IMAGES)


if __name__ == "__main__":
    main()
