"""Rows of datasets to `toile.v1` messages."""

from collections.abc import Sequence
from dataclasses import dataclass

from toile.core.catalog.models import DatasetItemRow, DatasetRow, DatasetVersionRow
from toile.core.errors import InvalidArgumentError
from toile.core.jobs.convert import timestamp
from toile.v1 import common_pb2, dataset_pb2


@dataclass(frozen=True)
class DatasetView:
    """A dataset with what is counted rather than stored."""

    row: DatasetRow
    image_count: int
    latest_version: str


@dataclass(frozen=True)
class Rejection:
    """A file that cannot be used, and why."""

    file_name: str
    reason: str
    message: str


def rating_name(number: int) -> str:
    """A rating as rows hold it.

    Raises:
        InvalidArgumentError: There is no such rating.
    """
    _check(number, common_pb2.ContentRating.values(), "content_rating")
    name = common_pb2.ContentRating.Name(common_pb2.ContentRating.ValueType(number))
    return name.removeprefix("CONTENT_RATING_")


def consent_name(number: int) -> str:
    """A consent as rows hold it.

    Raises:
        InvalidArgumentError: There is no such consent.
    """
    _check(number, dataset_pb2.PeopleConsent.values(), "people_consent")
    name = dataset_pb2.PeopleConsent.Name(dataset_pb2.PeopleConsent.ValueType(number))
    return name.removeprefix("PEOPLE_CONSENT_")


def _check(number: int, known: Sequence[int], field: str) -> None:
    if number not in known:
        raise InvalidArgumentError(f"{field} {number} is unknown", field=field)


def dataset_message(view: DatasetView) -> dataset_pb2.Dataset:
    """A dataset."""
    return dataset_pb2.Dataset(
        name=view.row.name,
        trigger_word=view.row.trigger_word,
        license=view.row.license,
        image_count=view.image_count,
        latest_version=view.latest_version,
        create_time=timestamp(view.row.create_time),
        content_rating=common_pb2.ContentRating.Value(f"CONTENT_RATING_{view.row.content_rating}"),
        people_consent=dataset_pb2.PeopleConsent.Value(f"PEOPLE_CONSENT_{view.row.people_consent}"),
    )


def version_message(row: DatasetVersionRow) -> dataset_pb2.DatasetVersion:
    """A version."""
    return dataset_pb2.DatasetVersion(
        name=row.name,
        digest=row.digest,
        trigger_word=row.trigger_word,
        image_count=row.image_count,
        resolution=row.resolution,
        aspect=row.aspect,
        rejected=[rejection_message(Rejection(**rejected)) for rejected in row.rejected],
        job=row.job,
        create_time=timestamp(row.create_time),
        content_rating=common_pb2.ContentRating.Value(f"CONTENT_RATING_{row.content_rating}"),
        people_consent=dataset_pb2.PeopleConsent.Value(f"PEOPLE_CONSENT_{row.people_consent}"),
    )


def item_message(row: DatasetItemRow) -> dataset_pb2.DatasetItem:
    """An item of a version."""
    return dataset_pb2.DatasetItem(
        file_name=row.file_name,
        caption=row.caption,
        source_file_name=row.source_file_name,
        source_digest=row.source_digest,
        caption_imported=row.caption_imported,
    )


def rejection_message(rejection: Rejection) -> dataset_pb2.RejectedFile:
    """A rejected file."""
    return dataset_pb2.RejectedFile(
        file_name=rejection.file_name, reason=rejection.reason, message=rejection.message
    )
