"""What users saw and did, until it is in a file."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"


def upgrade() -> None:
    op.create_table(
        "log_events",
        sa.Column("number", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True),
        sa.Column("user_id", sa.String(128), nullable=False),
        sa.Column("note_id", sa.String(128), nullable=False),
        sa.Column("event", sa.String(128), nullable=False),
        sa.Column("timestamp", sa.DateTime, nullable=False),
        sa.Column("answer", sa.String(64)),
        sa.Column("release", sa.String(128)),
        sa.Column("batch", sa.String(16)),
    )
    op.create_index("log_event_batches", "log_events", ["batch"])
