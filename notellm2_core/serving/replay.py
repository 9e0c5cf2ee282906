"""Offline replay: the held-out clicks of a week, asked of two releases as the service would answer them.

The user's history before each click goes through the `LiveIndex` of both: is the clicked note among the hits? Nobody
has to see the challenger for this, and no service has to run.

    python -m notellm2_core.serving.replay --config FILE --challenger ID [--champion ID] --out DIR

writes OUT/replay.md and OUT/replay.json: the figures, or why there are none.

The log is that of the week which the challenger was tested on. Its notes that the champion does not have are asked of
the champion's vectors that the week's comparison of both models has made (`rival_embeddings`).

C: clicks.
"""

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from notellm2_core.config.load import load_config
from notellm2_core.config.settings import ReplaySettings
from notellm2_core.embeddings.table import read_embeddings
from notellm2_core.lake.lake import Dataset, Lake
from notellm2_core.release.release import Release, open_release
from notellm2_core.runtime.errors import user_errors
from notellm2_core.serving.base import open_release_base
from notellm2_core.serving.exposures import Comparison, Exposures, compare_means, compare_shown, to_rows
from notellm2_core.serving.held_out import HeldOut, held_out_clicks
from notellm2_core.serving.live_index import LiveIndex

REPORT, FIGURES = "replay.md", "replay.json"


class NothingToReplay(ValueError):
    """There is no click that both releases could be asked for."""


@dataclass(frozen=True)
class Contest:
    """Two releases that find the same notes: each without those that the other does not have."""

    champion: LiveIndex
    challenger: LiveIndex
    candidates: frozenset[str]  # the notes that both can find
    known: frozenset[str]  # those of the champion's release; the others came after it


@dataclass(frozen=True)
class Replay:
    """The figures. Hit rate: the share of the clicks whose note is among the k hits; the others as in experiments."""

    k: int
    num_clicks: int
    num_users: int
    num_other_notes: int  # clicks on notes that not both releases have, which are left out
    num_without_history: int  # clicks before which the user had clicked none of these notes, likewise
    figures: Sequence[Comparison]


def replay(lake: Lake, champion_id: str, challenger_id: str, settings: ReplaySettings) -> Replay:
    """Ask both releases of the lake for the challenger's held-out clicks.

    Raises ValueError if a release cannot be used, or the lake no longer has the log that it was tested on, and
    NothingToReplay.
    """
    champion, challenger = (open_release(lake, release_id) for release_id in (champion_id, challenger_id))
    if champion.id == challenger.id:
        raise NothingToReplay(f"release {champion.id} is both the champion and the challenger")
    interactions = _upstream(lake, challenger, "verdict", "weekly_activity", "interactions")
    clicks = held_out_clicks(interactions.path, settings.replay_clicks, settings.replay_history)
    contest = open_contest(lake, champion, challenger)
    return compare_hits(contest, clicks, settings.replay_k)


def open_contest(lake: Lake, champion: Release, challenger: Release) -> Contest:
    """The live indexes of both releases, the champion's with the newer notes that its model has embedded."""
    ours, theirs = (open_release_base(lake, release) for release in (champion, challenger))
    fresh = _embedded_by(lake, challenger, champion, ours.weights_id)
    candidates = frozenset({*ours.index.rows, *fresh} & theirs.index.rows.keys())
    indexes = LiveIndex(ours.index, ours.table), LiveIndex(theirs.index, theirs.table)
    indexes[0].apply({i: vector for i, vector in fresh.items() if i in candidates and i not in ours.index.rows}, 1)
    for index in indexes:
        index.apply(dict.fromkeys(index.index.rows.keys() - candidates), 2)
    return Contest(*indexes, candidates, frozenset(ours.index.rows))


def _embedded_by(lake: Lake, challenger: Release, champion: Release, weights_id: str) -> Mapping[str, np.ndarray]:
    """The vectors of the challenger's pool by the champion's model; none where they were not compared."""
    try:
        folder = _upstream(lake, challenger, "verdict", "rival_embeddings").path / champion.id / "multimodal"
    except ValueError:
        return {}
    if not folder.exists():
        return {}
    table = read_embeddings(folder)
    if table.weights_id != weights_id:
        raise ValueError(f"{folder} holds vectors of another model than that of release {champion.id}")
    return dict(zip(table.note_ids, table.vectors, strict=True))


def _upstream(lake: Lake, release: Release, *names: str) -> Dataset:
    """The dataset that is reached from the release by the inputs of these names."""
    dataset: Dataset | None = release.dataset
    for name in names:
        assert dataset is not None
        if (dataset := lake.find(name, dataset.manifest.inputs.get(name, ""))) is None:
            raise ValueError(f"{lake.root} no longer holds the dataset {name} that release {release.id} comes from")
    assert dataset is not None
    return dataset


def compare_hits(contest: Contest, clicks: HeldOut, k: int) -> Replay:
    """Ask for the clicks. Raises NothingToReplay where none of them can be asked for."""
    is_candidate = np.array([note in contest.candidates for note in clicks.notes], dtype=bool)
    has_history = np.array([not contest.candidates.isdisjoint(h) for h in clicks.histories], dtype=bool)
    asked = clicks.where(is_candidate & has_history)
    if not asked.notes:
        raise NothingToReplay(
            f"of {len(clicks.notes)} held-out clicks, {(~is_candidate).sum()} are on notes that not both releases "
            "have, and the other users had clicked none of them before"
        )
    found = [hits_of(index, asked, k) for index in (contest.champion, contest.challenger)]
    ours, theirs = (
        np.array([note in notes for note, notes in zip(asked.notes, of_clicks, strict=True)], float)
        for of_clicks in found
    )
    hit_rate = compare_means(f"hit rate@{k}", asked.users, ours, theirs)
    return Replay(
        k=k,
        num_clicks=len(asked.notes),
        num_users=len(np.unique(asked.users)),
        num_other_notes=int((~is_candidate).sum()),
        num_without_history=int((is_candidate & ~has_history).sum()),
        figures=[hit_rate, *compare_shown(_exposures(asked, found), contest.known)],
    )


def hits_of(index: LiveIndex, clicks: HeldOut, k: int) -> list[list[str]]:
    """Of each click, the k hits for the history before it, the best first."""
    answers = (index.recall(dict.fromkeys(history, 1.0), k) for history in clicks.histories)
    return [[hit.note_id for hit in answer.hits] for answer in answers]


def _exposures(clicks: HeldOut, found: Sequence[Sequence[Sequence[str]]]) -> Exposures:
    """All hits of both releases as if they had been shown. found: champion and challenger, hits of each click."""
    sizes = [np.array([len(notes) for notes in of_clicks]) for of_clicks in found]
    answers = np.concatenate([np.repeat(np.arange(len(clicks.notes)), size) for size in sizes])
    notes = np.array([note for of_clicks in found for notes in of_clicks for note in notes], dtype=object)
    by_challenger = np.repeat([False, True], [size.sum() for size in sizes])
    return Exposures(clicks.users[answers], answers, notes, by_challenger, notes == np.array(clicks.notes)[answers])


def to_markdown(replay: Replay) -> str:
    """A table for people."""
    return "\n".join(
        [
            f"{replay.num_clicks:,} held-out clicks of {replay.num_users:,} users, with the {replay.k} notes that each "
            f"release finds for the history before them. Left out: {replay.num_other_notes:,} clicks on notes that not "
            f"both releases have, {replay.num_without_history:,} of users without a history.",
            "",
            *to_rows(replay.figures),
            "",
            "Intervals of 95 % over users. The log was shaped by what users were shown, which favours that release.",
        ]
    )


def to_json(replay: Replay) -> dict[str, Any]:
    """The figures by their names."""
    figures = {figure.name: {k: v for k, v in asdict(figure).items() if k != "name"} for figure in replay.figures}
    return {**{k: v for k, v in asdict(replay).items() if k != "figures"}, "figures": figures}


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m notellm2_core.serving.replay")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--champion", help="id of the release that was live; without one, there is nothing to compare")
    parser.add_argument("--challenger", required=True, help="id of the new release")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    with user_errors():
        config = load_config(options.config)
        settings = ReplaySettings.of(config.evaluation)
        try:
            if options.champion is None or not settings.replay_clicks:
                raise NothingToReplay(
                    "no release was live" if settings.replay_clicks else "evaluation.replay_clicks = 0"
                )
            found = replay(Lake(config.lake), options.champion, options.challenger, settings)
            text, figures = to_markdown(found), to_json(found)
        except NothingToReplay as e:
            text, figures = f"Nothing was replayed: {e}.", {"nothing": str(e)}
        options.out.mkdir(parents=True, exist_ok=True)
        (options.out / REPORT).write_text(text + "\n")
        (options.out / FIGURES).write_text(json.dumps(figures))


if __name__ == "__main__":
    main()
