"""The first tables: entries, images, models, vectors."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    op.create_table(
        "log_entries",
        sa.Column("seq", sa.BigInteger().with_variant(sa.Integer(), "sqlite"), primary_key=True, autoincrement=False),
        sa.Column("note_id", sa.String(128), nullable=False),
        sa.Column("version", sa.BigInteger, nullable=False),
        sa.Column("deleted", sa.Boolean, nullable=False),
        sa.Column("title", sa.Text, nullable=False),
        sa.Column("topics", sa.JSON, nullable=False),
        sa.Column("content", sa.Text, nullable=False),
        sa.Column("image_id", sa.String(64)),
        sa.Column("time", sa.DateTime, nullable=False),
        sa.Column("next_seq", sa.BigInteger),
    )
    is_newest = sa.text("next_seq IS NULL")
    op.create_index(
        "log_newest", "log_entries", ["note_id"], unique=True, sqlite_where=is_newest, postgresql_where=is_newest
    )
    op.create_index("log_image_uses", "log_entries", ["image_id"])
    op.create_table(
        "log_images",
        sa.Column("image_id", sa.String(64), primary_key=True),
        sa.Column("data", sa.LargeBinary, nullable=False),
    )
    op.create_table(
        "log_models",
        sa.Column("weights_id", sa.Text, primary_key=True),
        sa.Column("length", sa.Integer, nullable=False),
    )
    op.create_table(
        "log_vectors",
        sa.Column("weights_id", sa.Text, primary_key=True),
        sa.Column("seq", sa.BigInteger, primary_key=True, autoincrement=False),
        sa.Column("vector", sa.LargeBinary, nullable=False),
        sqlite_with_rowid=False,
    )
