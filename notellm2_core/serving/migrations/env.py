"""What Alembic runs: the steps, on the connection of `database.migrate`, inside its transaction."""

from alembic import context

from notellm2_core.serving.tables import VERSION_TABLE

context.configure(connection=context.config.attributes["connection"], version_table=VERSION_TABLE)
with context.begin_transaction():
    context.run_migrations()
