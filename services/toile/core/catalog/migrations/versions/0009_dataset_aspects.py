"""Dataset versions whose images keep their shape."""

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "dataset_versions",
        sa.Column("aspect", sa.String(16), nullable=False, server_default="square"),
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_column("dataset_versions", "aspect")
