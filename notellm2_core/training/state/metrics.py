"""Reports the metrics of a training run: in the terminal, RUN_DIR/metrics.jsonl, Dagster's log and MLflow's curves.

The file is the record; the others are views of it and never stop or delay the run. A log gets a line every ten seconds,
and all validations; a terminal, the file and MLflow get everything.
"""

import json
import math
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from notellm2_core.runtime.files import write_atomically
from notellm2_core.runtime.progress import LINE_SECONDS, ProgressBar

Metrics = Mapping[str, float]
RECALL_K = 10
RECALL = f"validation_recall_at_{RECALL_K}"
_MLFLOW_CLOSE_SECONDS = 15


class Progress:
    """Collects the metrics of the steps and reports their means. On ranks other than 0 it does nothing."""

    def __init__(
        self,
        path: Path,
        first_step: int,
        num_steps: int,
        enabled: bool = True,
        log: Callable[[str], None] | None = None,
        curves: "MlflowCurves | None" = None,
        throughput: Callable[[float, float, float], Metrics] | None = None,
    ) -> None:
        """`path`: metrics.jsonl; lines that a killed run wrote after `first_step` are removed. `log`: Dagster Pipes.

        `throughput`: (tokens, sum of the squared note lengths, seconds) -> metrics, as `Throughput.metrics`.
        """
        self.enabled = enabled
        self._path = path
        self._log, self._curves, self._throughput = log, curves, throughput
        self._first_step, self._num_steps = first_step, num_steps
        self._lines: list[dict[str, Any]] = []
        self._window: list[Metrics] = []
        self._start = self._window_start = time.monotonic()
        self._bar = ProgressBar(total=num_steps, initial=first_step, desc="training", unit="steps", disable=not enabled)
        self._last_line = self._start  # when a line went to Dagster's log
        if enabled:
            self._lines = [line for line in read_metrics(path) if line["step"] <= first_step]
        self._num_written = self._num_bytes = 0  # of these lines in the file
        if enabled:
            self._rewrite()
        self._seconds_before = max((line["seconds"] for line in self._lines), default=0.0)

    @property
    def seconds(self) -> float:
        """Training time so far, including the earlier, killed runs up to their last report."""
        return self._seconds_before + time.monotonic() - self._start

    def add(
        self, num_notes: int, num_tokens: int, num_squares: int, metrics: Metrics, seconds_waited: float = 0.0
    ) -> None:
        """Add one step: its metrics, over all ranks, and the seconds that this rank waited for its batches."""
        counts = {"notes": num_notes, "tokens": num_tokens, "squares": num_squares, "wait": seconds_waited}
        self._window.append({**counts, **metrics})
        self._bar.update()

    def report_steps(self, step: int) -> None:
        """Report the means over the steps since the last report, their throughput, and the share of time in waiting."""
        if not self._window:
            return
        elapsed = time.monotonic() - self._window_start
        sums = {key: sum(m[key] for m in self._window) for key in self._window[0]}
        notes, tokens, squares, wait_seconds = (sums.pop(key) for key in ("notes", "tokens", "squares", "wait"))
        means = {key: total / len(self._window) for key, total in sums.items()}
        means |= {"steps_per_s": len(self._window) / elapsed, "notes_per_s": notes / elapsed}
        means["data_wait"] = wait_seconds / elapsed
        self.restart_clock()
        throughput = self._throughput(tokens, squares, elapsed) if self._throughput is not None else {}
        self.report(step, {**means, **throughput})

    def restart_clock(self) -> None:
        """Start a new window: time between the steps (validation, saves) does not count in the throughput."""
        self._window, self._window_start = [], time.monotonic()

    def report(self, step: int, metrics: Metrics, always: bool = False) -> None:
        """Report `metrics` after `step` steps. `always`: also in a log that has just had a line."""
        if not self.enabled:
            return
        line = {"step": step, **metrics, "seconds": round(self.seconds, 2)}
        text = f"step {step}/{self._num_steps}"
        if num_done := step - self._first_step:
            line["eta_s"] = round((time.monotonic() - self._start) / num_done * (self._num_steps - step), 1)
            text += f", {line['eta_s']:.0f} s to go"
        self._lines.append(line)
        self._write()
        values = ", ".join(f"{key} {value:.4g}" for key, value in metrics.items())
        text = f"{text}: {values}"
        if always or step == self._num_steps:
            self.say(text)
        else:
            self._bar.show(text, values)
            if time.monotonic() - self._last_line >= LINE_SECONDS:
                self._log_line(text)
        if self._curves is not None:
            self._curves.send(step, metrics)

    def say(self, text: str) -> None:
        """Write a line to the terminal and every log."""
        if self.enabled:
            self._bar.write_line(text)
            self._log_line(text)

    def _log_line(self, text: str) -> None:
        self._last_line = time.monotonic()
        if self._log is not None:
            self._log(text)

    def _rewrite(self) -> None:
        """Reduce the file to these lines. If the disk is full, the next report removes the others."""
        text = "".join(json.dumps(line) + "\n" for line in self._lines)
        try:
            write_atomically(self._path, text)
        except OSError as e:
            _warn(f"{self._path} could not be written ({e}); trying again with the next report")
            if not self._path.exists() or not self._path.read_text(errors="replace").startswith(text):
                return  # the next report writes all of it
        self._num_written, self._num_bytes = len(self._lines), len(text.encode())

    def _write(self) -> None:
        """Append the lines that the file lacks. A full disk does not stop the run."""
        try:
            with self._path.open("a") as file:
                if file.tell() > self._num_bytes:  # the beginning of a line, from when the disk was full
                    file.truncate(self._num_bytes)
                file.write("".join(json.dumps(line) + "\n" for line in self._lines[self._num_written :]))
            self._num_written, self._num_bytes = len(self._lines), self._path.stat().st_size
        except OSError as e:
            _warn(f"{self._path} could not be written ({e}); trying again with the next report")

    def series(self, key: str, first: int = 0, last: int | None = None) -> list[float]:
        """The values of one metric after the steps `first` to `last` (None: so far), in order."""
        lines = [line for line in self._lines if first <= line["step"] and (last is None or line["step"] <= last)]
        return [line[key] for line in lines if key in line]

    @property
    def last_step(self) -> int:
        """The last step that was reported; 0 before the first."""
        return max((line["step"] for line in self._lines), default=0)

    def close(self) -> None:
        self._bar.close()
        if self._curves is not None:
            self._curves.close()


class MlflowCurves:
    """Sends metrics to an MLflow run from a thread of its own, so that a slow or dead server delays nothing."""

    def __init__(self, uri: str, run_id: str, timeout_seconds: float) -> None:
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", str(math.ceil(timeout_seconds)))
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
        self._uri, self._run_id = uri, run_id
        self._queue: queue.SimpleQueue[tuple[int, int, dict[str, float]] | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, daemon=True, name="mlflow-curves")
        self._thread.start()

    def send(self, step: int, metrics: Metrics) -> None:
        self._queue.put((step, int(time.time() * 1000), dict(metrics)))

    def close(self) -> None:
        """Wait up to 15 seconds for what is still unsent."""
        self._queue.put(None)
        self._thread.join(_MLFLOW_CLOSE_SECONDS)
        if self._thread.is_alive():
            _warn(f"the MLflow server at {self._uri} is slow: its last curves may be missing (metrics.jsonl has them)")

    def _work(self) -> None:
        unsent: list[tuple[int, int, dict[str, float]]] = []
        warned = False
        client: Any = None
        done = False
        while not done:
            item = self._queue.get()
            done = item is None
            if item is not None:
                unsent.append(item)
            try:
                import mlflow

                client = client or mlflow.MlflowClient(self._uri)
                metrics = [
                    mlflow.entities.Metric(key, value, at, step) for step, at, m in unsent for key, value in m.items()
                ]
                for i in range(0, len(metrics), 1000):  # the limit of one request
                    client.log_batch(self._run_id, metrics[i : i + 1000])
                unsent = []
            except Exception as e:  # no error of the server stops the run; the next line tries again
                if not warned:
                    _warn(f"no curves in MLflow at {self._uri} ({' '.join(str(e).split())[:200]}); training continues")
                warned = True


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl; [] without the file.

    Invalid lines, such as one that a kill cut short, are skipped with a warning: no run fails because of its curves.
    """
    if not path.exists():
        return []
    lines = []
    for text in path.read_bytes().split(b"\n")[:-1]:  # the last: empty, or cut short by a kill
        try:
            line = json.loads(text)
        except ValueError:
            line = None
        if isinstance(line, dict) and {"step", "seconds"} <= line.keys():
            lines.append(line)
        else:
            _warn(f"{path} has a line that is no step's metrics; it is skipped")
    return lines


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
