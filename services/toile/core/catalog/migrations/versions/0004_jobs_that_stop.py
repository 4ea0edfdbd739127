"""Jobs that are paused and resumed, and attempts that leave to be followed."""

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "jobs",
        sa.Column("attempts_before_resume", sa.Integer(), nullable=False, server_default="0"),
    )
    for flag in ("pause_requested", "leave_requested"):
        op.add_column(
            "jobs", sa.Column(flag, sa.Boolean(), nullable=False, server_default=sa.false())
        )


def downgrade() -> None:
    """Go back to the revision before, which knows no paused jobs: they are cancelled."""
    op.execute(
        "UPDATE jobs SET state = 'CANCELLED', end_time = CURRENT_TIMESTAMP WHERE state = 'PAUSED'"
    )
    op.execute("UPDATE job_events SET state = 'QUEUED' WHERE state = 'PAUSED'")
    op.drop_column("jobs", "leave_requested")
    op.drop_column("jobs", "pause_requested")
    op.drop_column("jobs", "attempts_before_resume")
