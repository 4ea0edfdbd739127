"""Alembic's entry: runs the migrations on the connection that it is given."""

from alembic import context

from toile.core.catalog.models import Table

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Table.metadata
)
with context.begin_transaction():
    context.run_migrations()
