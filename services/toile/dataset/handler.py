"""What the dataset service decides. Synchronous; the servicer calls it from threads."""

import threading
from collections.abc import Sequence
from pathlib import Path

from sqlalchemy import func, select
from sqlalchemy.orm import Session
from tokenizers import Tokenizer

from toile.core.artifacts import ArtifactStore
from toile.core.bases import resolve_base
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import (
    BaseRow,
    DatasetItemRow,
    DatasetRow,
    DatasetVersionRow,
    JobRow,
    PhotographRow,
)
from toile.core.catalog.paging import page
from toile.core.catalog.requests import recall, remember, request_digest
from toile.core.errors import (
    AlreadyExistsError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
)
from toile.core.jobs import FINAL_STATES, JobKind, JobStore
from toile.core.names import DatasetName, DatasetVersionName, ProjectName, check_id
from toile.core.settings import Settings
from toile.core.tokens import check_trigger_word, read_tokenizer
from toile.dataset.convert import DatasetView, Rejection, consent_name, rating_name
from toile.dataset.photographs import Outcome, Photographs
from toile.imaging.buckets import ASPECTS, KEEP, bucket_step
from toile.v1 import dataset_pb2

MIN_RESOLUTION_PIXELS = 64
_LICENSE_CHARACTERS = 1000


class DatasetHandler:
    """Datasets, their photographs and their versions."""

    def __init__(self, settings: Settings, catalog: Catalog, store: ArtifactStore) -> None:
        self._settings = settings
        self._catalog = catalog
        self._store = store
        self._jobs = JobStore(catalog)
        self._photographs = Photographs(catalog, store, settings.limits)
        self._tokenizers: dict[str, Tokenizer] = {}
        self._decoding = threading.BoundedSemaphore(2)  # each may unfold to hundreds of megabytes

    def create(self, request: dataset_pb2.CreateDatasetRequest) -> DatasetView:
        """Make an empty dataset.

        Raises:
            InvalidArgumentError: A field is wrong.
            TriggerWordError: The base's tokenizer cannot keep the trigger word.
            AlreadyExistsError: The name is taken, or the request id was used for something else.
        """
        parent = ProjectName.parse(request.parent, "parent")
        name = DatasetName(parent.project, check_id(request.dataset_id, "dataset_id"))
        if len(request.license) > _LICENSE_CHARACTERS:
            raise InvalidArgumentError(
                f"license is longer than {_LICENSE_CHARACTERS} characters", field="license"
            )
        trigger_word = check_trigger_word(request.trigger_word, self._tokenizer())
        scope, digest = f"CreateDataset {parent}", request_digest(request)
        with self._catalog.transaction() as session:
            known = recall(session, scope=scope, request_id=request.request_id, digest=digest)
            if known is not None:
                return _view(session, _dataset(session, known))
            if session.get(DatasetRow, str(name)) is not None:
                raise AlreadyExistsError(f"{name} already exists", metadata={"name": str(name)})
            row = DatasetRow(
                name=str(name),
                project=parent.project,
                trigger_word=trigger_word,
                license=request.license,
                content_rating=rating_name(request.content_rating),
                people_consent=consent_name(request.people_consent),
            )
            session.add(row)
            session.flush()
            remember(
                session,
                scope=scope,
                request_id=request.request_id,
                digest=digest,
                resource=row.name,
            )
            return _view(session, row)

    def get(self, name: DatasetName) -> DatasetView:
        """Return a dataset.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self._catalog.reading() as session:
            return _view(session, _dataset(session, str(name)))

    def update(self, request: dataset_pb2.UpdateDatasetRequest) -> DatasetView:
        """Say something else of a dataset's photographs.

        Raises:
            InvalidArgumentError: There is no such rating or consent.
            NotFoundError: There is no such dataset.
        """
        name = DatasetName.parse(request.name)
        with self._catalog.transaction() as session:
            row = _dataset(session, str(name), lock=True)
            if request.HasField("content_rating"):
                row.content_rating = rating_name(request.content_rating)
            if request.HasField("people_consent"):
                row.people_consent = consent_name(request.people_consent)
            return _view(session, row)

    def list(
        self, parent: ProjectName, page_size: int, page_token: str
    ) -> tuple[Sequence[DatasetView], str]:
        """Return a page of a project's datasets, by name, and the token of the next."""
        with self._catalog.reading() as session:
            rows, token = page(
                session,
                select(DatasetRow).where(DatasetRow.project == parent.project),
                (DatasetRow.name,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListDatasets {parent}",
            )
            return _views(session, rows), token

    def add_photograph(
        self, dataset: DatasetName, file_name: str, caption: str, path: Path
    ) -> Outcome | Rejection:
        """Take a file into a dataset."""
        with self._decoding:
            return self._photographs.add(dataset, file_name, caption, path)

    def build(self, request: dataset_pb2.BuildDatasetVersionRequest) -> JobRow:
        """Queue the job that builds the next version from the photographs there are now.

        Raises:
            InvalidArgumentError: The resolution or the aspect cannot be built.
            NotFoundError: There is no such dataset.
            FailedPreconditionError: It has no photographs (`EMPTY_DATASET`).
        """
        name = DatasetName.parse(request.dataset, "dataset")
        scope, digest = f"BuildDatasetVersion {name}", request_digest(request)
        with self._catalog.transaction() as session:
            known = recall(session, scope=scope, request_id=request.request_id, digest=digest)
            if known is not None:
                return session.get_one(JobRow, known)
            # Locked, so that two builds do not take the same number.
            _dataset(session, str(name), lock=True)
            base = self._base(session)
            resolution = request.resolution or base.native_size
            aspect = request.aspect or ASPECTS[0]
            self._check_resolution(resolution, aspect)
            last = session.scalar(
                select(func.max(PhotographRow.sequence)).where(PhotographRow.dataset == str(name))
            )
            if last is None:
                raise FailedPreconditionError(
                    f"{name} has no photographs; import some first",
                    reason="EMPTY_DATASET",
                    metadata={"dataset": str(name)},
                )
            job = self._jobs.create(
                session,
                project=name.project,
                kind=JobKind.DATASET_BUILD,
                target=str(_next_version(session, name)),
                spec={
                    "dataset": str(name),
                    "resolution": resolution,
                    "aspect": aspect,
                    "base": base.name,
                    "last_sequence": last,
                },
            )
            remember(
                session,
                scope=scope,
                request_id=request.request_id,
                digest=digest,
                resource=job.name,
            )
            return job

    def get_version(self, name: DatasetVersionName) -> DatasetVersionRow:
        """Return a version.

        Raises:
            NotFoundError: There is none of this name.
        """
        with self._catalog.reading() as session:
            return _version(session, name)

    def list_versions(
        self, parent: DatasetName, page_size: int, page_token: str
    ) -> tuple[Sequence[DatasetVersionRow], str]:
        """Return a page of a dataset's versions, newest first, and the token of the next.

        Raises:
            NotFoundError: There is no such dataset.
        """
        with self._catalog.reading() as session:
            _dataset(session, str(parent))
            return page(
                session,
                select(DatasetVersionRow).where(DatasetVersionRow.dataset == str(parent)),
                (DatasetVersionRow.number,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListDatasetVersions {parent}",
                descending=True,
            )

    def list_items(
        self, parent: DatasetVersionName, page_size: int, page_token: str
    ) -> tuple[Sequence[DatasetItemRow], str]:
        """Return a page of a version's items, in the order of its `metadata.jsonl`.

        Raises:
            NotFoundError: There is no such version.
        """
        with self._catalog.reading() as session:
            _version(session, parent)
            return page(
                session,
                select(DatasetItemRow).where(DatasetItemRow.version == str(parent)),
                (DatasetItemRow.file_name,),
                page_size=page_size,
                page_token=page_token,
                scope=f"ListDatasetItems {parent}",
            )

    def check_base(self) -> None:
        """Make sure that the default base is there: without it nothing can be judged or built.

        Raises:
            FailedPreconditionError: It was not imported.
        """
        with self._catalog.reading() as session:
            self._base(session)

    def _base(self, session: Session) -> BaseRow:
        try:
            return resolve_base(session, self._settings.default_base)
        except NotFoundError as error:
            raise FailedPreconditionError(
                f"{self._settings.default_base} was not imported", reason="BASE_NOT_IMPORTED"
            ) from error

    def _tokenizer(self) -> Tokenizer:
        with self._catalog.reading() as session:
            artifact = self._base(session).artifact
        if artifact not in self._tokenizers:
            self._tokenizers[artifact] = read_tokenizer(self._store, artifact)
        return self._tokenizers[artifact]

    def _check_resolution(self, resolution: int, aspect: str) -> None:
        if aspect not in ASPECTS:
            raise InvalidArgumentError(
                f"aspect must be one of {', '.join(ASPECTS)}, not {aspect!r}",
                field="aspect",
                reason="BAD_ASPECT",
            )
        largest = self._settings.limits.image_side_pixels
        step = bucket_step(resolution) if aspect == KEEP else 8
        if resolution % step or not MIN_RESOLUTION_PIXELS <= resolution <= largest:
            raise InvalidArgumentError(
                f"resolution must be a multiple of {step} from {MIN_RESOLUTION_PIXELS} to "
                f"{largest} pixels, not {resolution}",
                field="resolution",
                reason="BAD_RESOLUTION",
            )


def _dataset(session: Session, name: str, *, lock: bool = False) -> DatasetRow:
    row = session.get(DatasetRow, name, with_for_update=True if lock else None)
    if row is None:
        raise NotFoundError(f"{name} does not exist", metadata={"name": name})
    return row


def _version(session: Session, name: DatasetVersionName) -> DatasetVersionRow:
    row = session.get(DatasetVersionRow, str(name))
    if row is None:
        raise NotFoundError(f"{name} does not exist", metadata={"name": str(name)})
    return row


def _view(session: Session, row: DatasetRow) -> DatasetView:
    return _views(session, [row])[0]


def _views(session: Session, rows: Sequence[DatasetRow]) -> Sequence[DatasetView]:
    names = [row.name for row in rows]
    counts = session.execute(
        select(PhotographRow.dataset, func.count())
        .where(PhotographRow.dataset.in_(names))
        .group_by(PhotographRow.dataset)
    )
    newest = session.execute(
        select(DatasetVersionRow.dataset, func.max(DatasetVersionRow.number))
        .where(DatasetVersionRow.dataset.in_(names))
        .group_by(DatasetVersionRow.dataset)
    )
    count_by_name = dict(counts.tuples().all())
    newest_by_name = {name: f"{name}/versions/{number}" for name, number in newest}
    return [
        DatasetView(row, count_by_name.get(row.name, 0), newest_by_name.get(row.name, ""))
        for row in rows
    ]


def _next_version(session: Session, dataset: DatasetName) -> DatasetVersionName:
    """The first number that no version has and no running build is about to have."""
    published = session.scalar(
        select(func.max(DatasetVersionRow.number)).where(DatasetVersionRow.dataset == str(dataset))
    )
    targets = session.scalars(
        select(JobRow.target).where(
            JobRow.kind == JobKind.DATASET_BUILD.value,
            JobRow.project == dataset.project,
            JobRow.state.not_in([state.value for state in FINAL_STATES]),
        )
    )
    parsed = [DatasetVersionName.parse(target) for target in targets]
    coming = [int(target.version) for target in parsed if target.dataset_name == dataset]
    number = max([published or 0, *coming]) + 1
    return DatasetVersionName(dataset.project, dataset.dataset, str(number))
