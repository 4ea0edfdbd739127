"""Every table of the first version."""

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None


def upgrade() -> None:
    """Go to this revision."""
    op.create_table(
        "bases",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("artifact", sa.String(length=512), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("native_size", sa.Integer(), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_bases")),
    )
    op.create_table(
        "datasets",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("trigger_word", sa.String(length=64), nullable=False),
        sa.Column("license", sa.Text(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_datasets")),
    )
    op.create_index(op.f("ix_datasets_project"), "datasets", ["project"], unique=False)
    op.create_table(
        "images",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("origin", sa.String(length=16), nullable=False),
        sa.Column("producer", sa.String(length=256), nullable=False),
        sa.Column("producer_index", sa.Integer(), nullable=False),
        sa.Column("parent_image", sa.String(length=256), nullable=False),
        sa.Column("artifact", sa.String(length=512), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("size_bytes", sa.BigInteger(), nullable=False),
        sa.Column("media_type", sa.String(length=64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("prompt", sa.Text(), nullable=False),
        sa.Column("seed", sa.BigInteger(), nullable=True),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_images")),
    )
    op.create_index(op.f("ix_images_digest"), "images", ["digest"], unique=False)
    op.create_index(op.f("ix_images_parent_image"), "images", ["parent_image"], unique=False)
    op.create_index(op.f("ix_images_producer"), "images", ["producer"], unique=False)
    op.create_index(
        "ix_images_producer_order", "images", ["producer", "producer_index"], unique=False
    )
    op.create_index(op.f("ix_images_project"), "images", ["project"], unique=False)
    op.create_table(
        "jobs",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("kind", sa.String(length=32), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("target", sa.String(length=256), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("progress", sa.JSON(), nullable=False),
        sa.Column("error_reason", sa.String(length=64), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("heartbeat_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("start_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=True),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_jobs")),
    )
    op.create_index(op.f("ix_jobs_kind"), "jobs", ["kind"], unique=False)
    op.create_index(op.f("ix_jobs_project"), "jobs", ["project"], unique=False)
    op.create_index(op.f("ix_jobs_state"), "jobs", ["state"], unique=False)
    op.create_table(
        "models",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_models")),
    )
    op.create_index(op.f("ix_models_project"), "models", ["project"], unique=False)
    op.create_table(
        "rankings",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("scorers", sa.JSON(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_rankings")),
    )
    op.create_index(op.f("ix_rankings_project"), "rankings", ["project"], unique=False)
    op.create_table(
        "requests",
        sa.Column("scope", sa.String(length=256), nullable=False),
        sa.Column("request_id", sa.String(length=128), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("resource", sa.String(length=256), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("scope", "request_id", name=op.f("pk_requests")),
    )
    op.create_table(
        "dataset_versions",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("dataset", sa.String(length=256), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("artifact", sa.String(length=512), nullable=False),
        sa.Column("trigger_word", sa.String(length=64), nullable=False),
        sa.Column("resolution", sa.Integer(), nullable=False),
        sa.Column("image_count", sa.Integer(), nullable=False),
        sa.Column("rejected", sa.JSON(), nullable=False),
        sa.Column("job", sa.String(length=256), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset"], ["datasets.name"], name=op.f("fk_dataset_versions_dataset")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_dataset_versions")),
    )
    op.create_index(
        op.f("ix_dataset_versions_dataset"), "dataset_versions", ["dataset"], unique=False
    )
    op.create_table(
        "generations",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("request", sa.JSON(), nullable=False),
        sa.Column("base", sa.String(length=256), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("error_reason", sa.String(length=64), nullable=False),
        sa.Column("error_message", sa.Text(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("heartbeat_time", sa.DateTime(timezone=True), nullable=True),
        sa.Column("end_time", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["base"], ["bases.name"], name=op.f("fk_generations_base")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_generations")),
    )
    op.create_index(op.f("ix_generations_project"), "generations", ["project"], unique=False)
    op.create_table(
        "job_events",
        sa.Column("job", sa.String(length=256), nullable=False),
        sa.Column("sequence", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("time", sa.DateTime(timezone=True), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("progress", sa.JSON(none_as_null=True), nullable=True),
        sa.ForeignKeyConstraint(["job"], ["jobs.name"], name=op.f("fk_job_events_job")),
        sa.PrimaryKeyConstraint("job", "sequence", name=op.f("pk_job_events")),
    )
    op.create_table(
        "photographs",
        sa.Column("dataset", sa.String(length=256), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("sequence", sa.Integer(), nullable=False),
        sa.Column("file_name", sa.Text(), nullable=False),
        sa.Column("media_type", sa.String(length=64), nullable=False),
        sa.Column("width", sa.Integer(), nullable=False),
        sa.Column("height", sa.Integer(), nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("artifact", sa.String(length=512), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(
            ["dataset"], ["datasets.name"], name=op.f("fk_photographs_dataset")
        ),
        sa.PrimaryKeyConstraint("dataset", "digest", name=op.f("pk_photographs")),
    )
    op.create_table(
        "refinements",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("project", sa.String(length=64), nullable=False),
        sa.Column("source_image", sa.String(length=256), nullable=False),
        sa.Column("image", sa.String(length=256), nullable=False),
        sa.Column("base", sa.String(length=256), nullable=False),
        sa.Column("instruction", sa.Text(), nullable=False),
        sa.Column("plan", sa.JSON(), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["base"], ["bases.name"], name=op.f("fk_refinements_base")),
        sa.ForeignKeyConstraint(["image"], ["images.name"], name=op.f("fk_refinements_image")),
        sa.ForeignKeyConstraint(
            ["source_image"], ["images.name"], name=op.f("fk_refinements_source_image")
        ),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_refinements")),
    )
    op.create_index(op.f("ix_refinements_project"), "refinements", ["project"], unique=False)
    op.create_table(
        "scores",
        sa.Column("ranking", sa.String(length=256), nullable=False),
        sa.Column("image", sa.String(length=256), nullable=False),
        sa.Column("scorer", sa.String(length=64), nullable=False),
        sa.Column("value", sa.Float(), nullable=False),
        sa.Column("rank", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["image"], ["images.name"], name=op.f("fk_scores_image")),
        sa.ForeignKeyConstraint(["ranking"], ["rankings.name"], name=op.f("fk_scores_ranking")),
        sa.PrimaryKeyConstraint("ranking", "image", "scorer", name=op.f("pk_scores")),
    )
    op.create_table(
        "dataset_items",
        sa.Column("version", sa.String(length=256), nullable=False),
        sa.Column("file_name", sa.String(length=256), nullable=False),
        sa.Column("caption", sa.Text(), nullable=False),
        sa.Column("caption_imported", sa.Boolean(), nullable=False),
        sa.Column("source_file_name", sa.Text(), nullable=False),
        sa.Column("source_digest", sa.String(length=64), nullable=False),
        sa.ForeignKeyConstraint(
            ["version"], ["dataset_versions.name"], name=op.f("fk_dataset_items_version")
        ),
        sa.PrimaryKeyConstraint("version", "file_name", name=op.f("pk_dataset_items")),
    )
    op.create_index(
        op.f("ix_dataset_items_source_digest"), "dataset_items", ["source_digest"], unique=False
    )
    op.create_table(
        "model_versions",
        sa.Column("name", sa.String(length=256), nullable=False),
        sa.Column("model", sa.String(length=256), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("adapter_type", sa.String(length=32), nullable=False),
        sa.Column("artifact", sa.String(length=512), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("base", sa.String(length=256), nullable=False),
        sa.Column("dataset_version", sa.String(length=256), nullable=False),
        sa.Column("dataset_digest", sa.String(length=64), nullable=False),
        sa.Column("trigger_word", sa.String(length=64), nullable=False),
        sa.Column("config", sa.JSON(), nullable=False),
        sa.Column("final_loss", sa.Float(), nullable=False),
        sa.Column("reproduction_difference", sa.Float(), nullable=False),
        sa.Column("code_version", sa.String(length=64), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("job", sa.String(length=256), nullable=False),
        sa.Column("create_time", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["base"], ["bases.name"], name=op.f("fk_model_versions_base")),
        sa.ForeignKeyConstraint(
            ["dataset_version"],
            ["dataset_versions.name"],
            name=op.f("fk_model_versions_dataset_version"),
        ),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_model_versions_model")),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_model_versions")),
    )
    op.create_index(op.f("ix_model_versions_model"), "model_versions", ["model"], unique=False)
    op.create_table(
        "producer_adapters",
        sa.Column("producer", sa.String(length=256), nullable=False),
        sa.Column("model_version", sa.String(length=256), nullable=False),
        sa.Column("weight", sa.Float(), nullable=False),
        sa.ForeignKeyConstraint(
            ["model_version"],
            ["model_versions.name"],
            name=op.f("fk_producer_adapters_model_version"),
        ),
        sa.PrimaryKeyConstraint("producer", "model_version", name=op.f("pk_producer_adapters")),
    )
    op.create_index(
        op.f("ix_producer_adapters_model_version"),
        "producer_adapters",
        ["model_version"],
        unique=False,
    )


def downgrade() -> None:
    """Go back to the revision before."""
    op.drop_table("producer_adapters")
    op.drop_table("model_versions")
    op.drop_table("dataset_items")
    op.drop_table("scores")
    op.drop_table("refinements")
    op.drop_table("photographs")
    op.drop_table("job_events")
    op.drop_table("generations")
    op.drop_table("dataset_versions")
    op.drop_table("requests")
    op.drop_table("rankings")
    op.drop_table("models")
    op.drop_table("jobs")
    op.drop_table("images")
    op.drop_table("datasets")
    op.drop_table("bases")
