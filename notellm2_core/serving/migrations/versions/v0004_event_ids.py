"""The ids of events that were taken, so that one that is sent again counts once."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"


def upgrade() -> None:
    op.create_table(
        "log_event_ids",
        sa.Column("event_id", sa.String(64), primary_key=True),
        sa.Column("time", sa.DateTime, nullable=False),
    )
    op.create_index("log_event_id_times", "log_event_ids", ["time"])
