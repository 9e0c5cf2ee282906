"""The steps that bring the tables of an older log up to date, run by Alembic when a log is opened."""
