"""What jobs take of compute, and what they may."""

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    for name in ("cpu_seconds", "gpu_seconds"):
        op.add_column("jobs", sa.Column(name, sa.Float(), nullable=False, server_default="0"))
    op.add_column("jobs", sa.Column("budget", sa.Float(), nullable=True))


def downgrade() -> None:
    """Go back to the revision before."""
    for name in ("budget", "gpu_seconds", "cpu_seconds"):
        op.drop_column("jobs", name)
