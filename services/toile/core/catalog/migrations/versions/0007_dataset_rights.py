"""Whom a dataset is for, and whether the people in it agreed."""

import sqlalchemy as sa
from alembic import op

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

_TABLES = ("datasets", "dataset_versions")
_COLUMNS = ("content_rating", "people_consent")


def upgrade() -> None:
    """Go to this revision."""
    for table in _TABLES:
        for column in _COLUMNS:
            op.add_column(
                table,
                sa.Column(
                    column, sa.String(length=16), nullable=False, server_default="UNSPECIFIED"
                ),
            )


def downgrade() -> None:
    """Go back to the revision before."""
    for table in _TABLES:
        for column in _COLUMNS:
            op.drop_column(table, column)
