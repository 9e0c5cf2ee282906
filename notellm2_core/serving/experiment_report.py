"""What an experiment says: two releases by the events of their users.

A note that an answer showed is one exposure, and clicked or not, however often its events were sent.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from notellm2_core.config.source import EventSettings
from notellm2_core.runtime.files import parquet_files
from notellm2_core.serving.events import SCHEMA
from notellm2_core.serving.experiment import Kind, answer_prefix
from notellm2_core.serving.exposures import Comparison, Exposures, Interval, shown_share, to_rows

_MOST_IMBALANCE = 0.05  # of the exposures of interleaved lists: how far the challenger's share may be from a half


def read_exposures(folder: Path, kind: Kind, champion: str, challenger: str, events: EventSettings) -> Exposures:
    """The exposures in the files of `serving.events` that these two releases found, in answers of this experiment.

    Raises ValueError where there are none of a release.
    """
    files = parquet_files(folder) if folder.is_dir() else []
    tables = [pq.read_table(file, columns=SCHEMA.names) for file in files if file.name.startswith("served-")]
    if not tables:
        raise ValueError(f"{folder} holds no events of a service (served-*.parquet)")
    table = pa.concat_tables(tables).filter(
        pc.field("release").isin([champion, challenger])
        & pc.starts_with(pc.field("answer"), answer_prefix(kind, champion, challenger))
        & pc.field("event").isin([*events.view_events, *events.click_events])
    )
    clicks = pc.is_in(table["event"], pa.array(events.click_events, pa.string()))
    table = table.append_column("clicked", clicks)
    keys = ["user_id", "answer", "note_id", "release"]
    found = table.group_by(keys).aggregate([("clicked", "max")])
    by_challenger = pc.equal(found["release"], challenger).to_numpy()
    for release, has in {champion: (~by_challenger).any(), challenger: by_challenger.any()}.items():
        if not has:
            raise ValueError(
                f"{folder} holds no exposure of release {release} in an experiment of the kind {kind} with "
                f"{challenger} as the challenger of {champion}"
            )
    return Exposures(
        users=_numbers(found["user_id"]),
        answers=_numbers(found["answer"]),
        notes=found["note_id"].to_numpy(),
        by_challenger=by_challenger,
        clicked=found["clicked_max"].to_numpy(),
    )


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    """Each value's number among the distinct ones."""
    return np.unique(column.to_numpy(), return_inverse=True)[1]


def to_markdown(comparisons: Sequence[Comparison], won: tuple[Interval, int] | None, exposures: Exposures) -> str:
    """A table for people. won: of interleaving."""
    num = int(exposures.by_challenger.sum())
    lines = [
        f"{exposures.num_users:,} users; {len(exposures.users) - num:,} exposures of the champion, {num:,} of the "
        "challenger.",
        "",
        *to_rows(comparisons),
        "",
        "Coverage grows with the number of exposures: compare it only where both have about as many.",
    ]
    if won is not None:
        lines += [
            "",
            f"Interleaved: the challenger won {won[0]} of {won[1]:,} answers with a click (0.5: no difference).",
        ]
        share = shown_share(exposures)
        if not share.low <= 0.5 <= share.high and abs(share.value - 0.5) > _MOST_IMBALANCE:
            lines += [
                "",
                f"The challenger had {share} of the exposures, not half of them. Users may have looked more at the "
                "better hits. But where hits were left out of answers, and those of both releases were not taken in "
                "turns again, the release that lost fewer wins more answers by that alone.",
            ]
    return "\n".join(lines)
