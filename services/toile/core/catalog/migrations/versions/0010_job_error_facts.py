"""Facts about what a job failed of."""

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "jobs", sa.Column("error_metadata", sa.JSON(), nullable=False, server_default="{}")
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("jobs", "error_metadata")
