"""What was written to the service, for the next weekly run: the notes of the log as a dataset of the lake.

    LAKE/posted_notes/MARK/   POSTED_FILE: the newest entry of every note of the log, up to its mark

A mark is set in the log. So the release that is made of these notes tells a service up to where it holds the log.
"""

from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import bindparam, select

from notellm2_core.config.settings import Config
from notellm2_core.lake.lake import Dataset, Lake
from notellm2_core.lake.ledger import Ledger
from notellm2_core.lake.posted import of_configuration
from notellm2_core.lake.window import first_day_of_week
from notellm2_core.schema import POSTED, POSTED_FILE, POSTED_NOTES
from notellm2_core.serving.log import NoteLog
from notellm2_core.serving.log_url import log_url, may_exist
from notellm2_core.serving.rows import IS_NEWEST
from notellm2_core.serving.tables import ENTRIES, IMAGES

_BLOCK = 256  # notes, with their pictures, that are in memory
_NEWEST = (
    select(*(ENTRIES.c[name] for name in ("seq", "note_id", "deleted", "title", "topics", "content")), IMAGES.c.data)
    .outerjoin(IMAGES, IMAGES.c.image_id == ENTRIES.c.image_id)
    .where(IS_NEWEST, ENTRIES.c.seq > bindparam("after"), ENTRIES.c.seq <= bindparam("upto"))
    .order_by(ENTRIES.c.seq)
    .limit(_BLOCK)
)


def publish_posted_notes(config: Config, today: date) -> Dataset | None:
    """The notes that were written to the services of a configuration; None: there are none, or no log.

    They are read once in a calendar week, so that a run that is repeated has the same notes: the later ones are in the
    log, and with that in every service. Raises ValueError and LogUnavailable where the log cannot be opened or read.
    """
    lake = Lake(config.lake.resolve())
    url = log_url(config, Ledger(lake.root, config.name))
    if not may_exist(url):
        return None
    with closing(NoteLog.open(url)) as log:
        last = of_configuration(lake, config.name)
        if last is not None and log.marked([last.manifest.fingerprint]) and _week(last) == first_day_of_week(today):
            return last
        if not (upto := log.last_seq()):
            return None
        mark = log.mark(upto)
        with lake.publish(POSTED_NOTES, mark, {}, {"config": config.name}) as draft:
            num_notes = num_deleted = 0
            with pq.ParquetWriter(draft.path / POSTED_FILE, POSTED) as file:
                for table in _entries(log, upto):
                    file.write_table(table)
                    num_notes += len(table)
                    num_deleted += sum(table["deleted"].to_pylist())
            draft.metrics |= {"cut_seq": upto, "notes": num_notes - num_deleted, "deleted": num_deleted}
        return lake.open(POSTED_NOTES, mark)


def _week(dataset: Dataset) -> date:
    return first_day_of_week(datetime.fromisoformat(dataset.manifest.created).date())


def _entries(log: NoteLog, upto: int) -> Iterator[pa.Table]:
    """Tables of POSTED. A note that is written again meanwhile is not in them: its new entry is above `upto`."""
    after = 0
    while True:
        with log.reading() as connection:
            rows = connection.execute(_NEWEST, {"after": after, "upto": upto}).mappings().all()
        if not rows:
            return
        after = rows[-1]["seq"]
        columns = {name: [row[name] for row in rows] for name in POSTED.names if name != "image"}
        yield pa.table(columns | {"image": [row["data"] for row in rows]}, schema=POSTED)
