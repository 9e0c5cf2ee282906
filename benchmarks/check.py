"""`notellm2 check` on a large log: seconds, processor time and memory, from Parquet and from CSV.

    .venv/bin/python benchmarks/check.py [--millions 10] [--notes 100000]

The log covers 28 days: users by a lognormal distribution, notes by Zipf's law; among the rows are repeated ones, event
names of no list, unknown notes and unreadable times. Parquet holds whole-number ids and timestamps, the CSV (gzip) text
ids and ISO 8601 times. Each note has a text and an image file. The command runs in its own process, from start to exit.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
from PIL import Image

RESULTS = Path(__file__).parent / "results"
START, DAYS = 1_735_689_600, 28  # 2025-01-01
EVENTS = ["view", "click", "share", "mute"]
CONFIG = """
name: check
model: {llm: {name: none}, vision: {name: none}}
source: {ignored_events: [share]}
"""


def generate(num_events: int, num_notes: int, work: Path) -> dict[str, Path]:
    """The same source twice, by the format of its events."""
    rng = np.random.default_rng(0)
    user_of = np.repeat(np.arange(num_events // 20), np.rint(rng.lognormal(2.4, 1.1, num_events // 20)).astype(int))
    users = rng.permutation(np.resize(user_of, num_events))
    notes = (rng.zipf(1.2, num_events) - 1) % (num_notes + num_notes // 100)  # a hundredth is unknown
    times = START + np.sort(rng.integers(0, DAYS * 86_400, num_events))
    events = pa.DictionaryArray.from_arrays(
        rng.choice(4, num_events, p=[0.8, 0.18, 0.01, 0.01]).astype(np.int8), EVENTS
    )
    log = pa.table(
        {"user_id": users, "note_id": notes, "timestamp": pa.array(times, pa.timestamp("s")), "event": events}
    )
    repeated = log.take(pa.array(rng.integers(0, num_events, num_events // 200)))
    log = pa.concat_tables([log.slice(len(repeated)), repeated]).combine_chunks()

    sources = {name: work / name for name in ("parquet", "csv.gz")}
    for source in sources.values():
        (source / "images").mkdir(parents=True)
        texts = [f"Note {i} about something" for i in range(num_notes)]
        paths = [f"images/{i}.jpg" for i in range(num_notes)]
        columns = {"note_id": range(num_notes), "title": texts, "topics": ["a|b"] * num_notes, "content": texts}
        pq.write_table(pa.table({**columns, "image_path": paths}), source / "notes.parquet")
        Image.new("RGB", (64, 64), "red").save(source / "image.jpg")
        data = (source / "image.jpg").read_bytes()
        for path in paths[: -num_notes // 100]:
            (source / path).write_bytes(data)
    pq.write_table(log, sources["parquet"] / "events.parquet")
    words = {name: pc.binary_join_element_wise(name[:4], pc.cast(log[name], pa.string()), "-")
             for name in ("user_id", "note_id")}  # fmt: skip
    text = pa.table({**words, "timestamp": pc.strftime(log["timestamp"], "%Y-%m-%dT%H:%M:%SZ"), "event": log["event"]})
    with pa.CompressedOutputStream(str(sources["csv.gz"] / "events.csv.gz"), "gzip") as stream:
        pacsv.write_csv(text.set_column(1, "note_id", pc.cast(log["note_id"], pa.string())), stream)
    return sources


def measure(source: Path, config: Path) -> dict[str, Any]:
    command = [sys.executable, "-m", "notellm2_core.cli", "check", str(source), "--config", str(config), "--json"]
    started = time.monotonic()
    with subprocess.Popen(command, stdout=subprocess.PIPE, env=os.environ) as process:
        assert process.stdout is not None
        report = json.loads(process.stdout.read())
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
    return {
        "source": source.name, "seconds": time.monotonic() - started, "cpu_seconds": usage.ru_utime + usage.ru_stime,
        "peak_gb": usage.ru_maxrss * 1024 / 1e9, "exit_code": process.returncode, "rows": report["log"]["rows"],
        "notes": report["notes"]["notes"], "images": report["images"]["found"],
        "dropped": report["interactions"]["dropped"],
    }  # fmt: skip


def to_markdown(rows: list[dict[str, Any]]) -> str:
    total = psutil.virtual_memory().total >> 30
    lines = [
        "# `notellm2 check` on a large log",
        "",
        f"{date.today()}, {platform.machine()}, {psutil.cpu_count()} cores, {total} GB, Python "
        f"{platform.python_version()}. Command: `python {' '.join(sys.argv)}`. Processor time is that of all threads; "
        f"the load average was {os.getloadavg()[0]:.1f}, so the seconds hold other work, too, "
        "where it exceeds the cores.",
        "",
        "| events | rows | notes, each with an image | seconds | processor seconds | peak memory, GB |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in rows:
        lines.append(
            f"| {r['source']} | {r['rows']:,} | {r['notes']:,} | {r['seconds']:.1f} | {r['cpu_seconds']:.1f} | "
            f"{r['peak_gb']:.1f} |"
        )
    dropped = ", ".join(f"{num:,} {reason}" for reason, num in rows[0]["dropped"].items())
    images = ", ".join(f"{num:,} {status}" for status, num in rows[0]["images"].items())
    return "\n".join([*lines, "", f"Counted exactly: dropped {dropped}; images {images}."]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--millions", type=float, default=10, help="events of the log")
    parser.add_argument("--notes", type=int, default=100_000)
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        sources = generate(int(options.millions * 1_000_000), options.notes, Path(work))
        config = Path(work) / "check.yaml"
        config.write_text(CONFIG)
        rows = [measure(source, config) for source in sources.values()]
    (options.out / "check.json").write_text(json.dumps(rows, indent=1))
    (options.out / "check.md").write_text(text := to_markdown(rows))
    print(text)


if __name__ == "__main__":
    main()
