"""The catalog's tables.

Names are whole resource names (`projects/p/datasets/d`) and primary keys. Times are UTC.
JSON columns hold what is read back whole and never searched.
"""

from datetime import UTC, datetime
from typing import Any

from sqlalchemy import (
    JSON,
    BigInteger,
    DateTime,
    Dialect,
    Float,
    ForeignKey,
    Index,
    Integer,
    MetaData,
    String,
    Text,
    TypeDecorator,
    false,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from toile.core.clock import now


class UtcDateTime(TypeDecorator[datetime]):
    """A timezone-aware datetime, also on SQLite, which forgets zones."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_result_value(
        self,
        value: datetime | None,
        dialect: Dialect,  # noqa: ARG002 - SQLAlchemy passes it
    ) -> datetime | None:
        """Give the zone back."""
        if value is None or value.tzinfo is not None:
            return value
        return value.replace(tzinfo=UTC)


class Table(DeclarativeBase):
    """Base of all tables."""

    # Constraints have names, so that a later migration can name them on SQLite too.
    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s",
            "pk": "pk_%(table_name)s",
        }
    )
    type_annotation_map = {  # noqa: RUF012 - SQLAlchemy's own protocol
        datetime: UtcDateTime,
        dict[str, Any]: JSON,
        list[Any]: JSON,
    }


class RequestRow(Table):
    """A request id that was honoured, and what it made."""

    __tablename__ = "requests"
    scope: Mapped[str] = mapped_column(String(256), primary_key=True)  # RPC and project
    request_id: Mapped[str] = mapped_column(String(128), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64))  # of the request without its id
    resource: Mapped[str] = mapped_column(String(256))
    create_time: Mapped[datetime] = mapped_column(default=now)


class BaseRow(Table):
    """A base model bundle."""

    __tablename__ = "bases"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    artifact: Mapped[str] = mapped_column(String(512))  # prefix in the artifact store
    digest: Mapped[str] = mapped_column(String(64))
    native_size: Mapped[int] = mapped_column(Integer)
    license: Mapped[str] = mapped_column(Text, default="")
    create_time: Mapped[datetime] = mapped_column(default=now)


class _Rights:
    """Columns that say what may be done with photographs."""

    content_rating: Mapped[str] = mapped_column(  # UNSPECIFIED, GENERAL, RESTRICTED
        String(16), default="UNSPECIFIED", server_default="UNSPECIFIED"
    )
    people_consent: Mapped[str] = mapped_column(  # UNSPECIFIED, NO_PEOPLE, CONSENTED, NOT_CONSENTED
        String(16), default="UNSPECIFIED", server_default="UNSPECIFIED"
    )


class DatasetRow(_Rights, Table):
    """A dataset."""

    __tablename__ = "datasets"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    trigger_word: Mapped[str] = mapped_column(String(64))
    license: Mapped[str] = mapped_column(Text, default="")
    create_time: Mapped[datetime] = mapped_column(default=now)


class PhotographRow(Table):
    """A file imported into a dataset. Its bytes are the artifact `photographs/{digest}`."""

    __tablename__ = "photographs"
    dataset: Mapped[str] = mapped_column(ForeignKey("datasets.name"), primary_key=True)
    digest: Mapped[str] = mapped_column(String(64), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer)  # order of import within the dataset
    file_name: Mapped[str] = mapped_column(Text)
    media_type: Mapped[str] = mapped_column(String(64))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    caption: Mapped[str] = mapped_column(Text, default="")
    artifact: Mapped[str] = mapped_column(String(512))
    create_time: Mapped[datetime] = mapped_column(default=now)


class DatasetVersionRow(_Rights, Table):
    """An immutable version; a row exists only for a published one."""

    __tablename__ = "dataset_versions"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    dataset: Mapped[str] = mapped_column(ForeignKey("datasets.name"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    digest: Mapped[str] = mapped_column(String(64))
    artifact: Mapped[str] = mapped_column(String(512))
    trigger_word: Mapped[str] = mapped_column(String(64))
    resolution: Mapped[int] = mapped_column(Integer)
    aspect: Mapped[str] = mapped_column(String(16), default="square", server_default="square")
    image_count: Mapped[int] = mapped_column(Integer)
    rejected: Mapped[list[Any]]  # [{"file_name", "reason", "message"}]
    job: Mapped[str] = mapped_column(String(256))
    create_time: Mapped[datetime] = mapped_column(default=now)


class DatasetItemRow(Table):
    """One image of a version."""

    __tablename__ = "dataset_items"
    version: Mapped[str] = mapped_column(ForeignKey("dataset_versions.name"), primary_key=True)
    file_name: Mapped[str] = mapped_column(String(256), primary_key=True)
    caption: Mapped[str] = mapped_column(Text)
    caption_imported: Mapped[bool]
    source_file_name: Mapped[str] = mapped_column(Text)
    source_digest: Mapped[str] = mapped_column(String(64), index=True)


class JobRow(Table):
    """A long run. `spec` is what the job's process needs to know."""

    __tablename__ = "jobs"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    kind: Mapped[str] = mapped_column(String(32), index=True)  # core.jobs.JobKind
    state: Mapped[str] = mapped_column(String(16), index=True)  # core.jobs.JobState
    target: Mapped[str] = mapped_column(String(256))
    spec: Mapped[dict[str, Any]]
    progress: Mapped[dict[str, Any]]
    error_reason: Mapped[str] = mapped_column(String(64), default="")
    error_message: Mapped[str] = mapped_column(Text, default="")
    error_metadata: Mapped[dict[str, Any]] = mapped_column(default=dict, server_default="{}")
    attempt: Mapped[int] = mapped_column(Integer, default=0)
    attempts_before_resume: Mapped[int] = mapped_column(  # those do not count as lost
        Integer, default=0, server_default="0"
    )
    cancel_requested: Mapped[bool] = mapped_column(default=False)
    pause_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    leave_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    samples_requested: Mapped[bool] = mapped_column(default=False, server_default=false())
    cpu_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")
    gpu_seconds: Mapped[float] = mapped_column(Float, default=0.0, server_default="0")
    budget: Mapped[float | None] = mapped_column(Float)  # in the currency of the settings' prices
    heartbeat_time: Mapped[datetime | None]
    create_time: Mapped[datetime] = mapped_column(default=now)
    start_time: Mapped[datetime | None]
    end_time: Mapped[datetime | None]


class JobEventRow(Table):
    """One entry of a job's history."""

    __tablename__ = "job_events"
    job: Mapped[str] = mapped_column(ForeignKey("jobs.name"), primary_key=True)
    sequence: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    time: Mapped[datetime] = mapped_column(default=now)
    state: Mapped[str] = mapped_column(String(16))
    progress: Mapped[dict[str, Any] | None] = mapped_column(JSON(none_as_null=True))


class ModelRow(Table):
    """A named series of adapters; made with its first job, listed once a version exists."""

    __tablename__ = "models"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    retired_number: Mapped[int] = mapped_column(  # highest of a deleted version: never used again
        Integer, default=0, server_default="0"
    )
    create_time: Mapped[datetime] = mapped_column(default=now)


class ModelVersionRow(Table):
    """A published adapter with its lineage. An imported one has a digest instead of a dataset."""

    __tablename__ = "model_versions"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), index=True)
    number: Mapped[int] = mapped_column(Integer)
    adapter_type: Mapped[str] = mapped_column(String(32))
    artifact: Mapped[str] = mapped_column(String(512))
    digest: Mapped[str] = mapped_column(String(64))
    base: Mapped[str] = mapped_column(ForeignKey("bases.name"))
    dataset_version: Mapped[str | None] = mapped_column(ForeignKey("dataset_versions.name"))
    dataset_digest: Mapped[str] = mapped_column(String(64))
    imported_digest: Mapped[str] = mapped_column(  # of the file that it was imported from
        String(64), default="", server_default=""
    )
    trigger_word: Mapped[str] = mapped_column(String(64))
    config: Mapped[dict[str, Any]]
    final_loss: Mapped[float] = mapped_column(Float)
    reproduction_difference: Mapped[float] = mapped_column(Float)
    metrics: Mapped[dict[str, Any]] = mapped_column(  # fields of VersionMetrics
        default=dict, server_default="{}"
    )
    code_version: Mapped[str] = mapped_column(String(64))
    files: Mapped[list[Any]]  # [{"path", "size_bytes", "digest"}]
    job: Mapped[str] = mapped_column(String(256))
    create_time: Mapped[datetime] = mapped_column(default=now)
    deprecate_time: Mapped[datetime | None]
    deprecation_reason: Mapped[str] = mapped_column(Text, default="", server_default="")


class ModelAliasRow(Table):
    """A name that versions of a model take turns in."""

    __tablename__ = "model_aliases"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    model: Mapped[str] = mapped_column(ForeignKey("models.name"), index=True)
    version: Mapped[str] = mapped_column(ForeignKey("model_versions.name"), index=True)
    update_time: Mapped[datetime]


class GenerationRow(Table):
    """A request for images. `request` is the resolved GenerateRequest as JSON."""

    __tablename__ = "generations"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    request: Mapped[dict[str, Any]]
    base: Mapped[str] = mapped_column(ForeignKey("bases.name"))
    state: Mapped[str] = mapped_column(String(16))
    error_reason: Mapped[str] = mapped_column(String(64), default="")
    error_message: Mapped[str] = mapped_column(Text, default="")
    create_time: Mapped[datetime] = mapped_column(default=now)
    heartbeat_time: Mapped[datetime | None]  # of the process that draws it
    end_time: Mapped[datetime | None]


class GenerationAdapterRow(Table):
    """An adapter or a ControlNet that a generation or a refinement used, at its weight or scale."""

    __tablename__ = "producer_adapters"
    producer: Mapped[str] = mapped_column(String(256), primary_key=True)
    model_version: Mapped[str] = mapped_column(
        ForeignKey("model_versions.name"), primary_key=True, index=True
    )
    weight: Mapped[float] = mapped_column(Float)


class ImageRow(Table):
    """An image. Its bytes are one artifact, written before the row."""

    __tablename__ = "images"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    origin: Mapped[str] = mapped_column(String(16))  # GENERATED, REFINED, UPLOADED
    producer: Mapped[str] = mapped_column(String(256), default="", index=True)
    producer_index: Mapped[int] = mapped_column(Integer, default=0)
    parent_image: Mapped[str] = mapped_column(String(256), default="", index=True)
    artifact: Mapped[str] = mapped_column(String(512))
    digest: Mapped[str] = mapped_column(String(64), index=True)
    size_bytes: Mapped[int] = mapped_column(BigInteger)
    media_type: Mapped[str] = mapped_column(String(64))
    width: Mapped[int] = mapped_column(Integer)
    height: Mapped[int] = mapped_column(Integer)
    prompt: Mapped[str] = mapped_column(Text, default="")
    seed: Mapped[int | None] = mapped_column(BigInteger)
    content_rating: Mapped[str] = mapped_column(  # UNSPECIFIED, GENERAL, RESTRICTED
        String(16), default="UNSPECIFIED", server_default="UNSPECIFIED"
    )
    seam_score: Mapped[float | None] = mapped_column(Float)
    create_time: Mapped[datetime] = mapped_column(default=now)


class RankingRow(Table):
    """An ordered set of images; a row exists only for a complete one."""

    __tablename__ = "rankings"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    scorers: Mapped[list[Any]]  # [{"scorer", "weight"}]
    create_time: Mapped[datetime] = mapped_column(default=now)


class ScoreRow(Table):
    """One number of one scorer on one image of a ranking; scorer "total" is the weighted sum."""

    __tablename__ = "scores"
    ranking: Mapped[str] = mapped_column(ForeignKey("rankings.name"), primary_key=True)
    image: Mapped[str] = mapped_column(ForeignKey("images.name"), primary_key=True)
    scorer: Mapped[str] = mapped_column(String(64), primary_key=True)
    value: Mapped[float] = mapped_column(Float)
    rank: Mapped[int] = mapped_column(Integer)  # place of the image, repeated for each scorer


class RefinementRow(Table):
    """An edit of an image; a row exists only for a finished one."""

    __tablename__ = "refinements"
    name: Mapped[str] = mapped_column(String(256), primary_key=True)
    project: Mapped[str] = mapped_column(String(64), index=True)
    source_image: Mapped[str] = mapped_column(ForeignKey("images.name"))
    image: Mapped[str] = mapped_column(ForeignKey("images.name"))
    base: Mapped[str] = mapped_column(ForeignKey("bases.name"))
    instruction: Mapped[str] = mapped_column(Text)
    plan: Mapped[dict[str, Any]]
    create_time: Mapped[datetime] = mapped_column(default=now)


Index("ix_images_producer_order", ImageRow.producer, ImageRow.producer_index)
Index("ix_generations_state_time", GenerationRow.state, GenerationRow.create_time)
Index("ix_images_project_time", ImageRow.project, ImageRow.create_time, ImageRow.name)
