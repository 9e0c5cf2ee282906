"""A folder in which the weekly loop runs on a world whose truth is known, with stand-ins for the model.

The graph, Spark, the gates, the ledger and the releases are the real ones. What a week's logs have wrong, and how good
its model is, is known beforehand; so is the gate that has to refuse it (`notellm2_core.simulation.poisons`).
"""

import json
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import yaml
from tokenizers import Tokenizer, models, pre_tokenizers

from assets.resources.commands import stand_ins
from assets.resources.partitions import week_partition
from assets.resources.steps import why_failed
from notellm2_core.config.load import load_config
from notellm2_core.lake.ledger import Decision, Ledger
from notellm2_core.simulation.stand_ins import STAND_INS, write_skill
from notellm2_core.simulation.world import SOURCE, World, first_day
from pipelines.definitions import definitions

NOISE = 1.0  # of an ordinary model
FIRST_WEEK = 4  # the first that is run: it has a window, and weeks to be compared with
_FEW_ROWS = {"spark.sql.adaptive.enabled": "false"}  # an adaptive plan has a job more for each shuffle
_CONFIG = {
    "name": "simulation",
    "source": {"first_day": str(first_day(0)), "last_day": None},
    "window": {"train_days": 21},
    "text": {"short_tokens": 12, "long_tokens": 60},
    "model": {"llm": {"name": "tiny"}, "vision": {"library": "tiny", "name": "tiny", "pretrained": None},
              "connector": {"num_queries": 4, "num_layers": 2, "hidden_size": 32, "num_heads": 4,
                            "intermediate_size": 64}, "projection_dim": 32},
    "training": {"num_steps": 1, "batch_pairs": 8},
    "evaluation": {"ks": [10, 50, 100], "baselines": ["random", "popularity", "bm25"], "num_sheet_queries": 1,
                   "saliency_pairs": 0, "replay_clicks": 200},
    "spark": {"driver_memory": "1g", "shuffle_partitions": 2, "extra": _FEW_ROWS},
}  # fmt: skip


@dataclass(frozen=True)
class Outcome:
    """What became of a week."""

    refused_by: str  # the gate, check or asset; "" for none
    why: str
    trained: bool
    seconds: float


@dataclass(frozen=True)
class Site:
    """A folder with a source, a lake and a configuration."""

    folder: Path

    @classmethod
    def create(cls, folder: Path, world: World, changes: Mapping[str, Any] | None = None) -> "Site":
        """A new site before its first delivery. `changes`: sections of the configuration, or parts of them."""
        (folder / SOURCE).mkdir(parents=True)
        world.write_truth(folder)
        write_skill(folder, NOISE)
        tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0}, unk_token="[UNK]"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer.save(str(folder / "tokenizer.json"))
        site = cls(folder)
        settings = json.loads(json.dumps(_CONFIG))
        settings["lake"] = str(folder / "lake")
        settings["source"] |= {"path": str(folder / SOURCE)}
        settings["tracking"] = {"uri": f"sqlite:///{folder.parent / 'mlflow.db'}"}  # not in what is set aside
        settings["text"] |= {"length_tokenizer": str(folder)}
        for section, values in (changes or {}).items():
            settings[section] = settings.get(section, {}) | values
        site.config.write_text(yaml.safe_dump(settings))
        return site

    @property
    def config(self) -> Path:
        return self.folder / "config.yaml"

    @contextmanager
    def set_aside(self) -> Iterator[None]:
        """Inside, the site may be changed; after it, it is as before."""
        kept = self.folder.with_name(f"{self.folder.name} kept")
        shutil.copytree(self.folder, kept)
        try:
            yield
        finally:
            shutil.rmtree(self.folder)
            kept.rename(self.folder)

    def run(self, week: int, instance: dg.DagsterInstance) -> Outcome:
        """Run `weekly_retrain` for a week, as its schedule does."""
        started = time.monotonic()
        config = load_config(self.config)
        job = definitions(config.source).resolve_job_def("weekly_retrain")
        with stand_ins(STAND_INS):
            result = job.execute_in_process(
                instance=instance,
                partition_key=week_partition(first_day(week), config.source),
                run_config={"resources": {"pipeline": {"config": {"config_path": str(self.config)}}},
                            "loggers": {"console": {"config": {"log_level": "ERROR"}}}},
                raise_on_error=False,
            )  # fmt: skip
        made = {event.asset_key.to_user_string() for event in result.get_asset_materialization_events()
                if event.asset_key}  # fmt: skip
        why = why_failed(result.all_events) or ""
        decisions = Ledger(config.lake, config.name).state().decisions
        decision = decisions[-1] if decisions and "release" in made else None
        refused_by = _refusing(why, decision, config.lake)
        why = why or (decision.why if decision else "")
        return Outcome(refused_by, why, "checkpoint" in made, time.monotonic() - started)


def _refusing(why: str, decision: Decision | None, lake: Path) -> str:
    """The check or the asset that stopped a run, or the gates that refused its release."""
    if why:
        asset, _, rest = why.partition(": ")
        return rest.removeprefix("the check ").split(" ")[0] if rest.startswith("the check ") else asset
    if decision is None or decision.action == "promoted":
        return ""
    verdict = json.loads((lake / "release" / decision.release / "verdict.json").read_text())
    return ", ".join(gate["name"] for gate in verdict["gates"] if gate["outcome"] == decision.action)
