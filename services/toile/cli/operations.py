"""What the commands and the loop ask of the services, by gRPC and nothing else."""

import hashlib
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from google.protobuf.json_format import MessageToDict
from google.protobuf.message import Message

from toile.cli.errors import JobFailedError
from toile.cli.folder import Photograph
from toile.core.errors import (
    CancelledError,
    DataLossError,
    DeadlineError,
    NotFoundError,
    UnavailableError,
)
from toile.core.names import DatasetName, ModelName
from toile.core.rpc.client import Clients
from toile.core.rpc.streams import reading
from toile.core.rpc.uploads import chunks
from toile.v1 import (
    common_pb2,
    dataset_pb2,
    generate_pb2,
    job_pb2,
    rank_pb2,
    refine_pb2,
    train_pb2,
)

# Streams that follow people's work: a training may take days.
LONG_SECONDS = 7 * 24 * 3600.0
_AWAY_SECONDS = 60.0
_AGAIN_SECONDS = 1.0
_PAGE_SIZE = 500
_ENDED = (
    job_pb2.JOB_STATE_SUCCEEDED,
    job_pb2.JOB_STATE_FAILED,
    job_pb2.JOB_STATE_CANCELLED,
)

OnEvent = Callable[[job_pb2.JobEvent], None]


def as_data(message: Message) -> dict[str, Any]:
    """Return a message as what JSON holds, with the API's own field names."""
    return MessageToDict(
        message, preserving_proto_field_name=True, always_print_fields_with_no_presence=True
    )


def ensure_dataset(
    clients: Clients, name: str, *, trigger_word: str, license_text: str, request_id: str = ""
) -> dataset_pb2.Dataset:
    """Return a dataset, made if it is not there.

    Raises:
        TriggerWordError: The base's tokenizer cannot keep the trigger word.
    """
    try:
        return clients.dataset.GetDataset(dataset_pb2.GetDatasetRequest(name=name)).dataset
    except NotFoundError:
        parts = DatasetName.parse(name, "dataset")
        request = dataset_pb2.CreateDatasetRequest(
            parent=str(parts.parent),
            dataset_id=parts.dataset,
            trigger_word=trigger_word,
            license=license_text,
            request_id=request_id,
        )
        return clients.dataset.CreateDataset(request).dataset


def import_photographs(
    clients: Clients,
    dataset: str,
    photographs: Sequence[Photograph],
    on_file: Callable[[Photograph], None] = lambda _: None,
) -> dataset_pb2.ImportImagesResponse:
    """Send photographs to a dataset, one after the other."""

    def messages() -> Iterator[dataset_pb2.ImportImagesRequest]:
        yield dataset_pb2.ImportImagesRequest(header=dataset_pb2.ImportHeader(dataset=dataset))
        for photograph in photographs:
            on_file(photograph)
            start = dataset_pb2.FileStart(file_name=photograph.name, caption=photograph.caption)
            yield dataset_pb2.ImportImagesRequest(file=start)
            for piece in chunks(photograph.path):
                yield dataset_pb2.ImportImagesRequest(chunk=piece)

    return clients.dataset.ImportImages(messages(), timeout=LONG_SECONDS)


def follow_job(clients: Clients, name: str, on_event: OnEvent = lambda _: None) -> job_pb2.Job:
    """Follow a job until it has ended well; a broken connection is taken up again.

    Raises:
        JobFailedError: It failed; the reason is the job's own.
        CancelledError: It was cancelled.
        UnavailableError: The service stayed away for a minute.
    """
    sequence, away_since = 0, time.monotonic()
    while True:
        request = job_pb2.WatchJobRequest(name=name, after_sequence=sequence)
        watch = partial(clients.jobs.WatchJob, request, timeout=LONG_SECONDS)
        try:
            with reading(watch) as answers:
                for answer in answers:
                    away_since = time.monotonic()
                    if answer.HasField("event"):
                        sequence = max(sequence, answer.event.sequence)
                        on_event(answer.event)
                    if answer.HasField("job"):
                        return checked(answer.job)
        except (UnavailableError, DeadlineError):
            if time.monotonic() - away_since > _AWAY_SECONDS:
                raise
        job = clients.jobs.GetJob(job_pb2.GetJobRequest(name=name)).job
        if job.state in _ENDED:
            return checked(job)
        time.sleep(_AGAIN_SECONDS)


def job_logs(
    clients: Clients, name: str, *, follow: bool, tail_lines: int
) -> Iterator[job_pb2.GetJobLogsResponse]:
    """Yield what a job printed, piece by piece."""
    request = job_pb2.GetJobLogsRequest(name=name, follow=follow, tail_lines=tail_lines)
    with reading(partial(clients.jobs.GetJobLogs, request, timeout=LONG_SECONDS)) as answers:
        yield from answers


def cancel_and_wait(
    clients: Clients, find: Callable[[], job_pb2.Job], wait_seconds: float = 30.0
) -> None:
    """Cancel a job and wait until it has ended, as far as the services answer."""
    deadline = time.monotonic() + wait_seconds
    try:
        name = find().name
        job = clients.jobs.CancelJob(job_pb2.CancelJobRequest(name=name)).job
        while job.state not in _ENDED and time.monotonic() < deadline:
            time.sleep(0.2)
            job = clients.jobs.GetJob(job_pb2.GetJobRequest(name=name)).job
    except UnavailableError:
        return


def checked(job: job_pb2.Job) -> job_pb2.Job:
    """Return a job that ended well.

    Raises:
        JobFailedError: It failed; the reason is the job's own.
        CancelledError: It was cancelled.
    """
    if job.state == job_pb2.JOB_STATE_FAILED:
        raise JobFailedError(
            f"the job failed: {job.error.message}",
            reason=job.error.reason or None,
            metadata={"job": job.name},
        )
    if job.state == job_pb2.JOB_STATE_CANCELLED:
        raise CancelledError("the job was cancelled", metadata={"job": job.name})
    return job


def generate(
    clients: Clients,
    request: generate_pb2.GenerateRequest,
    on_event: Callable[[generate_pb2.GenerateResponse], None] = lambda _: None,
) -> generate_pb2.Generation:
    """Make images; leaving early cancels what is left.

    Raises:
        UnavailableError: The stream ended before the generation did.
    """
    start = partial(clients.generate.Generate, request, timeout=LONG_SECONDS)
    with reading(start) as events:
        return _followed(events, on_event)


def redesign_with_prompt(
    clients: Clients,
    request: generate_pb2.GenerateRequest,
    on_event: Callable[[generate_pb2.GenerateResponse], None] = lambda _: None,
) -> generate_pb2.Generation:
    """Make images from the one that a request redesigns; leaving early cancels what is left.

    Raises:
        UnavailableError: The stream ended before the generation did.
    """
    asked = generate_pb2.RedesignWithPromptRequest(drawing=request, redesign=request.redesign)
    asked.drawing.ClearField("redesign")
    start = partial(clients.generate.RedesignWithPrompt, asked, timeout=LONG_SECONDS)
    with reading(start) as answers:
        return _followed((answer.event for answer in answers), on_event)


def _followed(
    events: Iterable[generate_pb2.GenerateResponse],
    on_event: Callable[[generate_pb2.GenerateResponse], None],
) -> generate_pb2.Generation:
    """Tell of each event, and return the generation that ends them."""
    for event in events:
        on_event(event)
        if event.HasField("generation"):
            return event.generation
    raise UnavailableError("the generation ended without its images")


def generate_batch(
    clients: Clients,
    request: generate_pb2.GenerateBatchRequest,
    on_event: Callable[[generate_pb2.GenerateBatchResponse], None],
) -> None:
    """Draw the rows of a file; leaving early cancels what is left."""
    start = partial(clients.generate.GenerateBatch, request, timeout=LONG_SECONDS)
    with reading(start) as answers:
        for answer in answers:
            on_event(answer)


def rank(
    clients: Clients,
    request: rank_pb2.RankImagesRequest,
    on_scored: Callable[[rank_pb2.RankedImage], None] = lambda _: None,
) -> rank_pb2.Ranking:
    """Rank images.

    Raises:
        UnavailableError: The stream ended before the ranking did.
    """
    start = partial(clients.rank.RankImages, request, timeout=LONG_SECONDS)
    with reading(start) as answers:
        for answer in answers:
            if answer.HasField("ranking"):
                return answer.ranking
            on_scored(answer.scored)
    raise UnavailableError("the ranking ended without its result")


def refine(
    clients: Clients,
    request: refine_pb2.RefineImageRequest,
    on_event: Callable[[refine_pb2.RefineImageResponse], None] = lambda _: None,
) -> refine_pb2.Refinement:
    """Edit an image; leaving early cancels the edit.

    Raises:
        UnavailableError: The stream ended before the refinement did.
    """
    start = partial(clients.refine.RefineImage, request, timeout=LONG_SECONDS)
    with reading(start) as answers:
        for answer in answers:
            on_event(answer)
            if answer.HasField("refinement"):
                return answer.refinement
    raise UnavailableError("the refinement ended without its image")


def upload_image(clients: Clients, project: str, path: Path, prompt: str = "") -> common_pb2.Image:
    """Store an image of one's own."""

    def messages() -> Iterator[generate_pb2.UploadImageRequest]:
        header = generate_pb2.UploadImageHeader(parent=project, prompt=prompt)
        yield generate_pb2.UploadImageRequest(header=header)
        for piece in chunks(path):
            yield generate_pb2.UploadImageRequest(chunk=piece)

    return clients.generate.UploadImage(messages()).image


def download_image(clients: Clients, image: common_pb2.Image, path: Path) -> None:
    """Write an image's bytes to a file, which appears only when it is whole.

    Raises:
        DataLossError: What came is not what was stored.
    """
    request = generate_pb2.DownloadImageRequest(name=image.name)
    with reading(partial(clients.generate.DownloadImage, request)) as answers:
        write_whole(path, (answer.chunk for answer in answers), image.digest)


def import_model_version(
    clients: Clients, header: train_pb2.ImportModelVersionHeader, path: Path
) -> train_pb2.ModelVersion:
    """Make a LoRA file a version of a model."""

    def messages() -> Iterator[train_pb2.ImportModelVersionRequest]:
        yield train_pb2.ImportModelVersionRequest(header=header)
        for piece in chunks(path):
            yield train_pb2.ImportModelVersionRequest(chunk=piece)

    return clients.train.ImportModelVersion(messages()).version


def download_model_file(
    clients: Clients, version: str, file: train_pb2.ModelFile, path: Path
) -> None:
    """Write a file of a model version, which appears only when it is whole.

    Raises:
        DataLossError: What came is not what was published.
    """
    request = train_pb2.DownloadModelFileRequest(name=version, path=file.path)
    with reading(partial(clients.train.DownloadModelFile, request)) as answers:
        write_whole(path, (answer.chunk for answer in answers), file.digest)


def write_whole(path: Path, pieces: Iterable[bytes], digest: str) -> None:
    """Write pieces to a file, check their SHA-256, and only then give the file its name.

    Raises:
        DataLossError: The digest is another one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part")
    found = hashlib.sha256()
    try:
        with part.open("wb") as file:
            for piece in pieces:
                found.update(piece)
                file.write(piece)
        if found.hexdigest() != digest:
            raise DataLossError(f"{path.name} came damaged; nothing was written")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def pages(method: Callable[..., Any], request: Message, field: str) -> Iterator[Any]:
    """Yield the entries of all pages of a listing."""
    request.page_size = _PAGE_SIZE  # type: ignore[attr-defined]
    while True:
        answer = method(request)
        yield from getattr(answer, field)
        if not answer.next_page_token:
            return
        request.page_token = answer.next_page_token  # type: ignore[attr-defined]


def dataset_items(clients: Clients, version: str) -> list[dataset_pb2.DatasetItem]:
    """Return all items of a dataset version."""
    request = dataset_pb2.ListDatasetItemsRequest(parent=version)
    return list(pages(clients.dataset.ListDatasetItems, request, "items"))


def model_version(clients: Clients, name: str) -> train_pb2.ModelVersion:
    """Return a version of a model by its name or an alias, the newest when the name is the model's.

    Raises:
        NotFoundError: There is none, or the model has none but deprecated ones.
    """
    if ModelName.matches(name):
        model = clients.train.GetModel(train_pb2.GetModelRequest(name=name)).model
        if not model.latest_version:
            raise NotFoundError(f"all versions of {name} are deprecated; name one of them")
        name = model.latest_version
    return clients.train.GetModelVersion(train_pb2.GetModelVersionRequest(name=name)).version


def job_history(clients: Clients, name: str) -> list[job_pb2.JobEvent]:
    """Return the events of a job that has ended."""
    request = job_pb2.WatchJobRequest(name=name)
    return [a.event for a in clients.jobs.WatchJob(request) if a.HasField("event")]
