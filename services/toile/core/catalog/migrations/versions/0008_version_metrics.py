"""Metrics of model versions."""

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "model_versions",
        sa.Column("metrics", sa.JSON(), nullable=False, server_default="{}"),
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("model_versions", "metrics")
