"""For whom an image is, how visible its seams are; indices to list images and running drawings."""

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.add_column(
        "images",
        sa.Column(
            "content_rating", sa.String(length=16), nullable=False, server_default="UNSPECIFIED"
        ),
    )
    op.add_column("images", sa.Column("seam_score", sa.Float(), nullable=True))
    op.create_index(
        "ix_images_project_time", "images", ["project", "create_time", "name"], unique=False
    )
    op.create_index(
        "ix_generations_state_time", "generations", ["state", "create_time"], unique=False
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_index("ix_generations_state_time", table_name="generations")
    op.drop_index("ix_images_project_time", table_name="images")
    with op.batch_alter_table("images") as images:
        images.drop_column("seam_score")
        images.drop_column("content_rating")
