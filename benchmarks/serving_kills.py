"""Kills the service at random moments while it is written to and read from, and counts what it has lost.

    .venv/bin/python benchmarks/serving_kills.py                          50 kills in 24,000 requests
    .venv/bin/python benchmarks/serving_kills.py --kills 3 --requests 600

Eight clients write notes (text, which the tiny model embeds), write them again, delete them, and ask for
recommendations. A third process kills the server with SIGKILL after a random time, and starts it again. A request that
was answered is acknowledged; one that was cut off may or may not have happened, and its client repeats it. After each
start, and at the end, every note is asked for. Counted are acknowledged notes that are not found (lost), deleted notes
that are found (back), notes that an answer has twice (twice), contents other than the last acknowledged or attempted
one (wrong), and answers of 5xx while the server was up. All have to be 0. The result is written to
benchmarks/results/serving_kills.md.
"""

import argparse
import platform
import random
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Sequence
from datetime import date
from pathlib import Path

import httpx
import numpy as np
import psutil
from serving_site import Site, free_port, make_site

RESULT = Path(__file__).parent / "results" / "serving_kills.md"
NUM_NOTES, DIM, NUM_CLIENTS, NOTES_PER_CLIENT = 2000, 64, 8, 60


class Client(threading.Thread):
    """Writes, deletes and reads notes of its own, and knows what each may be now."""

    def __init__(self, number: int, port: int, num_requests: int, counts: Counter[str], seed: int) -> None:
        super().__init__(daemon=True)
        self.number, self.num_requests, self.counts = number, num_requests, counts
        self.random = random.Random(f"{seed} {number}")
        self.may_be: dict[str, list[str | None]] = {}  # note id -> the titles that it may have; None: it is deleted
        self.version = 0
        self.http = httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30)

    def run(self) -> None:
        for _ in range(self.num_requests):
            note_id = f"c{self.number}-{self.random.randrange(NOTES_PER_CLIENT)}"
            kind = self.random.random()
            if kind < 0.3:
                self.write(note_id)
            elif kind < 0.4:
                self.delete(note_id)
            else:
                self.recall()

    def write(self, note_id: str) -> None:
        self.version += 1
        title = f"{note_id} version {self.version}"
        body = {"title": title, "content": " ".join(self.random.choices(["kite", "tea", "lake", "ship", "hill"], k=5))}
        self.repeat(note_id, title, "PUT", f"/notes/{note_id}?version={self.version}", body)

    def delete(self, note_id: str) -> None:
        self.version += 1
        self.repeat(note_id, None, "DELETE", f"/notes/{note_id}?version={self.version}")

    def repeat(self, note_id: str, content: str | None, method: str, path: str, body: object = None) -> None:
        """Send a write until it is acknowledged, as any client with an outbox does."""
        self.may_be.setdefault(note_id, [None]).append(content)
        while True:
            try:
                answer = self.http.request(method, path, json=body)
            except httpx.TransportError:
                self.counts["cut off"] += 1
                time.sleep(0.05)
                continue
            self.counts["answered"] += 1
            if answer.status_code in (200, 201):
                self.may_be[note_id] = [content]
                return
            if answer.status_code == 202:
                self.may_be[note_id] = [content]
                return
            if answer.status_code not in (429, 503):
                self.counts[f"status {answer.status_code}"] += 1
                return
            time.sleep(0.02)

    def recall(self) -> None:
        history = [f"n{self.random.randrange(NUM_NOTES):07d}" for _ in range(5)]
        history += self.random.sample([*self.may_be], min(1, len(self.may_be)))
        try:
            answer = self.http.post("/recall", json={"history": history, "k": 50})
        except httpx.TransportError:
            self.counts["cut off"] += 1
            time.sleep(0.05)
            return
        self.counts["answered"] += 1
        if answer.status_code != 200:
            self.counts[f"status {answer.status_code}"] += answer.status_code not in (429, 503)
            return
        ids = [hit["note_id"] for hit in answer.json()["hits"]]
        self.counts["twice"] += len(ids) != len(set(ids))


def check(clients: Sequence[Client], port: int, counts: Counter[str]) -> None:
    """Ask for every note that a client has written; the clients stand still."""
    with httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
        found = {hit["note_id"] for hit in http.post("/similar", json={"title": "kite", "k": 1000}).json()["hits"]}
        for client in clients:
            for note_id, may_be in client.may_be.items():
                answer = http.get(f"/notes/{note_id}")
                title = answer.json()["title"] if answer.status_code == 200 else None
                similar = http.get(f"/notes/{note_id}/similar", params={"k": 1}).status_code == 200
                counts["checked"] += 1
                counts["wrong"] += title not in may_be
                counts["lost"] += None not in may_be and not similar
                counts["back"] += may_be == [None] and (similar or note_id in found)


def drill(site: Site, num_kills: int, num_requests: int, seed: int, output: Path) -> tuple[Counter[str], list[float]]:
    """The counts, and the seconds from each start to readiness."""
    counts, chance = Counter[str](), random.Random(seed)
    port = free_port()
    clients = [
        Client(number, port, num_requests // (num_kills + 1) // NUM_CLIENTS + 1, counts, seed)
        for number in range(NUM_CLIENTS)
    ]
    starts = []
    for number in range(num_kills + 1):
        started = time.monotonic()
        with site.serving(port, output):
            starts.append(time.monotonic() - started)
            if number:
                for client in clients:
                    client.join()  # it repeats what was cut off
            check(clients, port, counts)
            clients = [successor(client, port) for client in clients]
            for client in clients:
                client.start()
            if number < num_kills:
                time.sleep(chance.uniform(0.05, 1.0) * 4)
            else:
                for client in clients:
                    client.join()
                check(clients, port, counts)
        print(f"\r{number}/{num_kills} kills, {counts['answered']} answers", end="", flush=True)
    print()
    return counts, starts


def successor(client: Client, port: int) -> Client:
    """The same client for the next round: a thread runs once."""
    new = Client(client.number, port, client.num_requests, client.counts, client.random.randrange(1 << 30))
    new.may_be, new.version = client.may_be, client.version
    return new


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--requests", type=int, default=24_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=RESULT)
    options = parser.parse_args()
    vectors = np.random.default_rng(options.seed).normal(size=(NUM_NOTES, DIM)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    with tempfile.TemporaryDirectory() as folder:
        site = make_site(Path(folder), vectors, "Flat")
        started = time.monotonic()
        counts, starts = drill(site, options.kills, options.requests, options.seed, Path(folder) / "serve.log")
        seconds = time.monotonic() - started
    faults = {name: counts[name] for name in ("lost", "back", "twice", "wrong")}
    faults |= {name: count for name, count in counts.items() if name.startswith("status") and count}
    machine = f"{platform.machine()}, {psutil.cpu_count()} cores, Python {platform.python_version()}"
    lines = [
        "# Kills of the service",
        "",
        f"{date.today()}, {machine}. Command: `python {' '.join(sys.argv)}`",
        "",
        f"{options.kills} SIGKILLs in {seconds:.0f} s: {counts['answered']:,} requests answered, {counts['cut off']:,} "
        f"cut off or refused while the server was down; notes checked after the starts: {counts['checked']:,}. Ready "
        f"after {np.median(starts):.1f} s (median), {max(starts):.1f} s (slowest).",
        "",
        "| lost | back after deletion | twice in an answer | other content | other errors |",
        "| ---: | ---: | ---: | ---: | ---: |",
        f"| {faults['lost']} | {faults['back']} | {faults['twice']} | {faults['wrong']} | "
        f"{sum(count for name, count in faults.items() if name.startswith('status'))} |",
    ]
    print("\n".join(lines))
    options.out.write_text("\n".join(lines) + "\n")
    sys.exit(any(faults.values()))


if __name__ == "__main__":
    main()
