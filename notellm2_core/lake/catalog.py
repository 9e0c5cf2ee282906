"""The catalog: the address of every dataset of a configuration in its lake.

A dataset's fingerprint covers its settings, its inputs' fingerprints and the version of the code that makes it
(`lake/lineage.py`). So the address of `eval_recall` is determined before anything runs, a published dataset is never
computed again, and embeddings of one model can never meet the index of another.
"""

import json
import os
from collections.abc import Container
from datetime import date, timedelta
from functools import cached_property
from pathlib import Path
from typing import Any

from notellm2_core.config.baselines import encoders
from notellm2_core.config.settings import Config
from notellm2_core.config.source import EventReadingSettings, NoteReadingSettings
from notellm2_core.lake.lake import WORK_FOLDER, Dataset, Lake, LakeError
from notellm2_core.lake.ledger import Ledger, State
from notellm2_core.lake.lineage import RENAMED, STAGES, WORLD_VERSION, stage_settings
from notellm2_core.lake.posted import of_configuration
from notellm2_core.lake.window import Days, ResolvedWindow, first_day_of_week, last_complete_week_end, resolved_window
from notellm2_core.runtime.files import listing, sha256_of, write_atomically
from notellm2_core.runtime.fingerprint import fingerprint
from notellm2_core.runtime.image_formats import optional_formats
from notellm2_core.runtime.packaged_weights import weights_version
from notellm2_core.schema import DAYS_FILE, POSTED_NOTES
from notellm2_core.tables.log import missing_days, partition_days
from notellm2_core.tables.source import used_by

CHAMPION, ANCHOR = "champion", "anchor"  # roles of releases that a new one is compared with
IMAGE_LIFT, NOTES_PROFILE = "image_lift", "notes"  # figures of a verdict that later ones are compared with
_OWN_NEGATIVES = "training.hard_negatives.file"


class MissingDataset(LakeError):
    """A dataset that is not yet published for this configuration."""

    def __init__(self, name: str, command: str) -> None:
        super().__init__(f"{name} has not been made yet for this configuration and window; run: {command}")
        self.name = name


class Catalog:
    """The addresses of one configuration's datasets in its lake."""

    def __init__(
        self, config: Config, week: date | None = None, run_id: str | None = None, partition: str | None = None
    ) -> None:
        """`week`: any day of the last week of the window; None: that of `partition`.

        `partition`: the run's partition of the log, by its name, which the window ends with; None: the window has the
        configured end, or else ends with the last complete week. `run_id`: all catalogs of a run see the source as its
        first catalog did, even where files have arrived since. Raises ValueError where `week` is not in `partition`.
        """
        self.config = config
        self.lake = Lake(config.lake.resolve())
        self.week = week
        self.partition = None if partition is None else Days(*partition_days(partition, config.source.partition))
        if week is not None and self.partition is not None and week not in self.partition:
            raise ValueError(f"week = {week} is not in {partition}, the partition of this run: leave one of them out")
        self._pin = self.work / "runs" / f"{run_id}.json" if run_id else None
        self.ledger = Ledger(self.lake.root, config.name)
        self._fingerprints: dict[str, str] = {}

    def warnings(self) -> list[str]:
        """Warnings about the lake, for the start of a run: it holds datasets under earlier names."""
        earlier = [name for name in RENAMED if (self.lake.root / name).is_dir()]
        if not earlier:
            return []
        names = ", ".join(f"{name} ({RENAMED[name]} now)" for name in earlier)
        return [f"{self.lake.root} holds datasets under earlier names, which are made again and not read: {names}"]

    @cached_property
    def source(self) -> Path:
        """The source folder: the user's, or the demo world's place in the lake. Raises ValueError if neither is set."""
        source = self.config.source
        if source.path is not None:
            return Path(source.path).absolute()
        if source.demo is None:
            raise ValueError(f"the configuration {self.config.name} has no source: set source.path, or SOURCE=...")
        return self.lake.path("demo_world", fingerprint([WORLD_VERSION, source.demo.model_dump()]))

    @cached_property
    def source_fingerprints(self) -> dict[str, str]:
        """Fingerprints of the files of `raw_events` and `notes`: their names, sizes and times, so any change counts."""
        fingerprints: dict[str, str] = self._seen["source"]
        return fingerprints

    @cached_property
    def state(self) -> State:
        """The decisions about releases, as this run first saw them."""
        return self.ledger.state(self._seen["decisions"])

    @property
    def posted(self) -> Dataset | None:
        """The notes that were written to a service, as this run first saw them; None: there are none.

        Raises LakeError if they are no longer in the lake.
        """
        fingerprint = self._seen.get("posted")  # a run of an earlier version has none
        return None if fingerprint is None else self.lake.open(POSTED_NOTES, fingerprint)

    @cached_property
    def rivals(self) -> dict[str, str]:
        """The releases that the model of this configuration is compared with: role (champion, anchor) -> id.

        It is not compared with itself where it is the champion already. There is no anchor while the champion is the
        oldest, nor if somebody has removed its folder.
        """
        state = self.state.without(self.fingerprint("checkpoint"))
        champion, anchor = state.champion, state.anchor(self.config.promotion.anchor_weeks)
        has_anchor = anchor not in (None, champion) and self.lake.path("release", str(anchor)).exists()
        roles = {CHAMPION: champion, ANCHOR: anchor if has_anchor else None}
        return {role: release for role, release in roles.items() if release is not None}

    def require_champion(self) -> None:
        """Raises ValueError where the folder of the live release is gone: no model could be compared with it."""
        champion = self.state.champion
        if champion is not None and not self.lake.path("release", champion).exists():
            raise ValueError(
                f"the release that is live, {champion}, is no longer at {self.lake.path('release', champion)}: restore "
                "it from a backup, or make another one live (notellm2 release rollback, or promote)"
            )

    @property
    def start(self) -> str | None:
        """The release whose model the training starts from; None: the pretrained one.

        It is of an earlier week, so that a week that is run again starts from the same model.
        """
        if self.config.training.start_from == "pretrained":
            return None
        return self.state.before(str(self.window.last_week))

    def past(self, figure: str) -> list[Any]:
        """A figure of the last models that were promoted and are not banned, to compare a new one with."""
        state = self.state.without(self.fingerprint("checkpoint"))
        promoted = [d for d in state.reigns if d.action == "promoted" and not state.is_banned(d.release, d.model)]
        figures = {d.model: d.figures.get(figure) for d in promoted[-self.config.promotion.anchor_weeks :]}
        return [value for value in figures.values() if value is not None]

    @cached_property
    def _seen(self) -> dict[str, Any]:
        """What changes while a run lasts: the source, the number of decisions in the ledger, and what was posted."""
        if self._pin is not None and self._pin.exists():
            pinned: dict[str, Any] = json.loads(self._pin.read_text())
            return pinned
        posted = of_configuration(self.lake, self.config.name)
        seen = {
            "source": self._list_source(),
            "decisions": self.ledger.state().number,
            "posted": None if posted is None else posted.manifest.fingerprint,
        }
        if self._pin is not None:
            write_atomically(self._pin, json.dumps(seen))
        return seen

    def _list_source(self) -> dict[str, str]:
        if self.config.source.path is None:
            return dict.fromkeys(("raw_events", "notes"), self.source.name)
        if not self.source.is_dir():
            raise ValueError(f"source.path {self.source} is not a folder; set source.path, or SOURCE=..., to your data")
        files: dict[str, list[Any]] = {"raw_events": [], "notes": []}
        readings = NoteReadingSettings.of(self.config.source), EventReadingSettings.of(self.config.source)
        for file in sorted(listing(self.source)):
            for name, is_used in zip(("notes", "raw_events"), used_by(*readings, file[0]), strict=True):
                if is_used:
                    files[name].append(file)
        return {name: fingerprint([str(self.source.resolve()), listed]) for name, listed in files.items()}

    @cached_property
    def window(self) -> ResolvedWindow:
        """Training and test days.

        Raises MissingDataset where the end depends on events that are not ingested yet, and ValueError where the
        partition is not the one that the configured window ends in, or where its events have not arrived.
        """
        window = self.config.window
        if self.week is not None:
            end = first_day_of_week(self.week) + timedelta(days=7)
        elif window.end is not None:
            if self.partition is not None and window.end - timedelta(days=1) not in self.partition:
                raise ValueError(
                    f"window.end = {window.end} is not in {self.partition.start}, the partition of this run: remove it "
                    "from the configuration, so that every run has the window of its partition"
                )
            end = window.end
        else:
            end = self.end_of_log() if self.partition is None else self._end_of(self.partition)
        return resolved_window(window, end)

    @property
    def needs_log(self) -> bool:
        """Whether the window depends on the days of the log."""
        return self.week is None and self.config.window.end is None

    def end_of_log(self) -> date:
        """The end of the last complete week of the log. Raises MissingDataset where it is not ingested yet."""
        ingested = self.dataset("raw_events").manifest.metrics
        return last_complete_week_end(date.fromisoformat(ingested["covered_until"]))

    def absent_days(self, week: Days) -> list[str]:
        """The days of `week` whose events have not arrived. Raises MissingDataset where the log is not ingested yet."""
        raw = self.dataset("raw_events")
        missing = set(missing_days(json.loads((raw.path / DAYS_FILE).read_text()), (week.start, week.end)))
        covered = date.fromisoformat(raw.manifest.metrics["covered_until"])
        return sorted(missing | {str(day) for day in week.days() if day > covered})

    def _end_of(self, partition: Days) -> date:
        """The end of a partition, or of the last complete week in it. Raises ValueError if the log has none of them."""
        log, unit = self.dataset("raw_events").manifest.metrics, self.config.source.partition
        end = min(partition.end, self.end_of_log())
        if str(end) <= log["first_day"] or end <= partition.start or (unit == "week" and end < partition.end):
            raise ValueError(
                f"the log has no complete {unit} {partition.start}: it reaches from {log['first_day']} to "
                f"{log['covered_until']}"
            )
        return end

    def settings(self, name: str) -> dict[str, Any]:
        """The settings that `name` itself depends on."""
        settings = stage_settings(name, self.config)
        versions = {key: weights_version(weights) for key, weights in self._weights(name, settings)}
        if any(version is not None for version in versions.values()):
            settings["weights"] = {key: version for key, version in versions.items() if version is not None}
        if _OWN_NEGATIVES in settings:
            settings[_OWN_NEGATIVES] = _content(Path(settings[_OWN_NEGATIVES]))
        if name == "vision_features" and (formats := optional_formats()):
            settings["image_formats"] = formats
        if name in ("raw_events", "notes"):
            settings["source"] = self.source_fingerprints[name]
        if name == "notes" and (posted := self.posted) is not None:
            settings["posted"] = posted.manifest.fingerprint
        if name == "checkpoint" and self.config.training.start_from == "champion":
            settings["start"] = self.start
        if name == "rival_embeddings":
            settings["rivals"] = self.rivals
        if name == "verdict":
            settings["past"] = {figure: self.past(figure) for figure in (IMAGE_LIFT, NOTES_PROFILE)}
        if name == "interactions":
            settings["window"] = [
                str(d) for days in (self.window.train, self.window.test) for d in (days.start, days.end)
            ]
        return settings

    def _inputs(self, name: str) -> tuple[str, ...]:
        """The inputs that `name` is made from with these settings. The others do not count: they trigger no retrain."""
        return tuple(n for n in STAGES[name].inputs if STAGES[name].counts(n, self.config))

    def _weights(self, name: str, settings: Container[str]) -> list[tuple[str, str | None]]:
        """The pretrained weights that `name` is made with: pairs of a setting and the weights that it names."""
        model = self.config.model
        names = {"model.llm": model.llm.name, "model.vision": model.vision.pretrained or model.vision.name}
        if (folder := self.config.training.hard_negatives.model) is not None:
            names["training.hard_negatives.model"] = str(folder)
        if name == "baseline_embeddings":
            return [(f"evaluation.baselines.{name}", name) for name in encoders(self.config.evaluation.baselines)]
        return [(key, weights) for key, weights in names.items() if key in settings or f"{key}.name" in settings]

    def fingerprint(self, name: str) -> str:
        """The fingerprint of the dataset `name`, from its settings, its inputs' fingerprints and its code's version.

        Raises MissingDataset where the window depends on events that are not ingested yet.
        """
        if name not in self._fingerprints:
            inputs = {n: self.fingerprint(n) for n in self._inputs(name)}
            self._fingerprints[name] = fingerprint([name, STAGES[name].version, inputs, self.settings(name)])
        return self._fingerprints[name]

    def find(self, name: str) -> Dataset | None:
        """The dataset `name` of this configuration; None if it is not published. Raises LakeError if it is invalid."""
        return self.lake.find(name, self.fingerprint(name))

    def dataset(self, name: str) -> Dataset:
        """The dataset `name` of this configuration. Raises MissingDataset with the command that makes it."""
        dataset = self.find(name)
        if dataset is None:
            raise MissingDataset(name, self.command())
        return dataset

    def inputs(self, name: str) -> dict[str, Dataset]:
        """The datasets that `name` is made from, by name. Raises MissingDataset if one is not published."""
        return {n: self.dataset(n) for n in self._inputs(name)}

    def command(self) -> str:
        """The shell command that makes everything that is missing."""
        path = os.environ.get("NOTELLM2_CONFIG")
        source = os.environ.get("SOURCE")
        week = self.week or (self.partition and self.partition.end - timedelta(days=1))
        variables = {"CONFIG": path, "SOURCE": source, "WEEK": week}
        return " ".join(["make recall", *(f"{name}={value}" for name, value in variables.items() if value)])

    @property
    def work(self) -> Path:
        """The folder of unfinished work that runs resume, such as training checkpoints. It holds no dataset."""
        return self.lake.root / WORK_FOLDER


def _content(file: Path) -> str:
    """The SHA-256 of the hard negatives' file. Raises ValueError if it cannot be read."""
    try:
        return sha256_of(file)
    except OSError as e:
        raise ValueError(f"{_OWN_NEGATIVES} = {file} cannot be read: {e.strerror}") from e
