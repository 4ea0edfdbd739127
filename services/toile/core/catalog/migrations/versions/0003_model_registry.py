"""Aliases of model versions, deprecation, and versions that were imported, without a dataset."""

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None

_TIME = sa.DateTime(timezone=True)


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "models", sa.Column("retired_number", sa.Integer(), nullable=False, server_default="0")
    )
    _set_dataset_version(nullable=True)
    op.add_column(
        "model_versions",
        sa.Column("imported_digest", sa.String(length=64), nullable=False, server_default=""),
    )
    op.add_column("model_versions", sa.Column("deprecate_time", _TIME, nullable=True))
    op.add_column(
        "model_versions",
        sa.Column("deprecation_reason", sa.Text(), nullable=False, server_default=""),
    )
    op.create_table(
        "model_aliases",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("model", sa.String(length=256), nullable=False),
        sa.Column("version", sa.String(length=256), nullable=False),
        sa.Column("update_time", _TIME, nullable=False),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_model_aliases_model")),
        sa.ForeignKeyConstraint(
            ["version"], ["model_versions.name"], name=op.f("fk_model_aliases_version")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_model_aliases")),
    )
    op.create_index(op.f("ix_model_aliases_model"), "model_aliases", ["model"], unique=False)
    op.create_index(op.f("ix_model_aliases_version"), "model_aliases", ["version"], unique=False)


def downgrade() -> None:
    """Go back to the revision before; impossible while there are imported versions."""
    op.drop_table("model_aliases")
    op.drop_column("models", "retired_number")
    for column in ("deprecation_reason", "deprecate_time", "imported_digest"):
        op.drop_column("model_versions", column)
    _set_dataset_version(nullable=False)


def _set_dataset_version(*, nullable: bool) -> None:
    """Change whether a version needs a dataset.

    SQLite can only do it by a new table in the place of the old one, and drops no table that rows
    refer to; so those rows step aside.
    """
    aside = op.get_bind().dialect.name == "sqlite"
    if aside:
        op.execute("CREATE TEMPORARY TABLE aside AS SELECT * FROM producer_adapters")
        op.execute("DELETE FROM producer_adapters")
    with op.batch_alter_table("model_versions") as versions:
        versions.alter_column(
            "dataset_version", existing_type=sa.String(length=256), nullable=nullable
        )
    if aside:
        op.execute(
            "INSERT INTO producer_adapters (producer, model_version, weight) "
            "SELECT producer, model_version, weight FROM aside"
        )
        op.execute("DROP TABLE aside")
