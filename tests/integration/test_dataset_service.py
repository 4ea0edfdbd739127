"""The dataset service over gRPC, without compute: what it takes, refuses and keeps."""

import contextlib
import errno
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import grpc
import numpy as np
import pytest
from PIL import Image
from sqlalchemy import select

from integration.dataset_platform import PARENT, DatasetPlatform, messages, running
from toile.core.catalog.models import PhotographRow
from toile.core.errors import (
    AlreadyExistsError,
    DiskFullError,
    FailedPreconditionError,
    InvalidArgumentError,
    NotFoundError,
    RequestReusedError,
    StoreUnavailableError,
    TriggerWordError,
)
from toile.core.rpc.client import grpc_health_check
from toile.dataset.upload import Spool
from toile.v1 import common_pb2, dataset_pb2, dataset_pb2_grpc, job_pb2
from unit.imaging.files import encoded, huge_png, picture

pytestmark = pytest.mark.timeout(900)


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path
) -> Iterator[DatasetPlatform]:
    with running(tmp_path_factory.mktemp("home"), tiny_bundle) as platform:
        yield platform


def photograph(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 255, (90, 70, 3)).astype(np.uint8)
    return encoded(Image.fromarray(pixels), "JPEG")


def rows_of(platform: DatasetPlatform, dataset: str) -> list[PhotographRow]:
    with platform.catalog.reading() as session:
        statement = select(PhotographRow).where(PhotographRow.dataset == dataset)
        return list(session.scalars(statement.order_by(PhotographRow.sequence)))


def test_datasets_are_made_found_and_listed(platform: DatasetPlatform) -> None:
    request = dataset_pb2.CreateDatasetRequest(
        parent="projects/listing", dataset_id="b", trigger_word="<LACE>", license="CC0-1.0"
    )
    made = platform.clients.dataset.CreateDataset(request).dataset
    assert (made.name, made.trigger_word, made.license) == (
        "projects/listing/datasets/b",
        "<lace>",
        "CC0-1.0",
    )
    assert (made.image_count, made.latest_version) == (0, "")
    for dataset_id in ("a", "c"):
        request.dataset_id = dataset_id
        platform.clients.dataset.CreateDataset(request)
    get = dataset_pb2.GetDatasetRequest(name=made.name)
    assert platform.clients.dataset.GetDataset(get).dataset == made
    listing = dataset_pb2.ListDatasetsRequest(parent="projects/listing", page_size=2)
    first = platform.clients.dataset.ListDatasets(listing)
    listing.page_token = first.next_page_token
    second = platform.clients.dataset.ListDatasets(listing)
    names = [dataset.name[-1] for dataset in (*first.datasets, *second.datasets)]
    assert (names, second.next_page_token) == (["a", "b", "c"], "")


def test_what_is_said_of_photographs_can_change(platform: DatasetPlatform) -> None:
    request = dataset_pb2.CreateDatasetRequest(
        parent=PARENT,
        dataset_id="said",
        trigger_word="<lace>",
        content_rating=common_pb2.CONTENT_RATING_GENERAL,
        people_consent=dataset_pb2.PEOPLE_CONSENT_CONSENTED,
    )
    made = platform.clients.dataset.CreateDataset(request).dataset
    assert made.content_rating == common_pb2.CONTENT_RATING_GENERAL
    assert made.people_consent == dataset_pb2.PEOPLE_CONSENT_CONSENTED
    update = dataset_pb2.UpdateDatasetRequest(
        name=made.name, people_consent=dataset_pb2.PEOPLE_CONSENT_NOT_CONSENTED
    )
    changed = platform.clients.dataset.UpdateDataset(update).dataset
    assert changed.content_rating == common_pb2.CONTENT_RATING_GENERAL, "it was not mentioned"
    assert changed.people_consent == dataset_pb2.PEOPLE_CONSENT_NOT_CONSENTED
    get = dataset_pb2.GetDatasetRequest(name=made.name)
    assert platform.clients.dataset.GetDataset(get).dataset == changed
    update.content_rating = 7  # type: ignore[assignment]
    with pytest.raises(InvalidArgumentError) as caught:
        platform.clients.dataset.UpdateDataset(update)
    assert caught.value.metadata["field"] == "content_rating"
    update.name = f"{PARENT}/datasets/nothing"
    with pytest.raises(NotFoundError):
        platform.clients.dataset.UpdateDataset(update)


def test_the_same_creation_twice_is_one(platform: DatasetPlatform) -> None:
    request = dataset_pb2.CreateDatasetRequest(
        parent=PARENT, dataset_id="twice", trigger_word="sks", request_id="r-1"
    )
    first = platform.clients.dataset.CreateDataset(request)
    assert platform.clients.dataset.CreateDataset(request) == first
    request.license = "MIT"
    with pytest.raises(RequestReusedError):
        platform.clients.dataset.CreateDataset(request)
    request.request_id = "r-2"
    with pytest.raises(AlreadyExistsError):
        platform.clients.dataset.CreateDataset(request)


@pytest.mark.parametrize(
    ("field", "value"),
    [("parent", "nowhere"), ("dataset_id", "No Good"), ("license", "x" * 1001)],
)
def test_a_wrong_field_is_named(platform: DatasetPlatform, field: str, value: str) -> None:
    good = {"parent": PARENT, "dataset_id": "wrong", "trigger_word": "sks"}
    request = dataset_pb2.CreateDatasetRequest(**{**good, field: value})
    with pytest.raises(InvalidArgumentError) as caught:
        platform.clients.dataset.CreateDataset(request)
    assert caught.value.metadata["field"] == field


def test_a_trigger_word_the_tokenizer_cannot_keep(platform: DatasetPlatform) -> None:
    with pytest.raises(TriggerWordError) as caught:
        platform.create("untriggered", trigger_word="two words")
    assert caught.value.metadata["why"] == "WHITESPACE"
    request = dataset_pb2.GetDatasetRequest(name=f"{PARENT}/datasets/untriggered")
    with pytest.raises(NotFoundError):
        platform.clients.dataset.GetDataset(request)


def test_each_file_of_a_bad_folder_is_judged_by_itself(platform: DatasetPlatform) -> None:
    name = platform.create("mixed")
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [Image.new("RGB", (80, 80), colour) for colour in ("red", "lime")]
    deep = Image.fromarray(np.linspace(0, 65535, 80 * 80).reshape(80, 80).astype(np.uint16))
    jpeg = photograph(1)
    good = {
        "plain.jpg": jpeg,
        "png_called.jpg": encoded(picture()),
        "animated.gif": encoded(frames[0], "GIF", save_all=True, append_images=frames[1:]),
        "cmyk.jpg": encoded(picture().convert("CMYK"), "JPEG"),
        "rotated.jpg": encoded(picture(120, 80), "JPEG", exif=exif),
        "deep.png": encoded(deep),
    }
    bad = {
        "zero.jpg": (b"", "EMPTY_FILE"),
        "text_called.jpg": (b"Dear diary", "NOT_AN_IMAGE"),
        "truncated.jpg": (jpeg[: len(jpeg) // 2], "TRUNCATED_IMAGE"),
        "huge.png": (huge_png(10_000, 10_000), "TOO_MANY_PIXELS"),
        "icon.png": (encoded(picture(32, 32)), "TOO_SMALL"),
        "phone.heic": (b"\0\0\0\x18ftypheic" + bytes(64), "UNSUPPORTED_FORMAT"),
    }
    files = [*good.items(), *((key, data) for key, (data, _) in bad.items()), ("copy.jpg", jpeg)]

    answer = platform.import_files(name, files)

    assert (answer.imported_count, answer.duplicate_count) == (len(good), 1)
    assert {r.file_name: r.reason for r in answer.rejected} == {
        key: reason for key, (_, reason) in bad.items()
    }
    assert all(rejected.message for rejected in answer.rejected)
    assert answer.dataset.image_count == len(good)
    rows = rows_of(platform, name)
    assert [(row.file_name, row.sequence) for row in rows] == [
        (key, place) for place, key in enumerate(good, start=1)
    ]
    for row in rows:
        assert platform.store.get(row.artifact) == good[row.file_name]
    by_name = {row.file_name: row for row in rows}
    assert by_name["png_called.jpg"].media_type == "image/png"
    assert (by_name["rotated.jpg"].width, by_name["rotated.jpg"].height) == (80, 120)

    again = platform.import_files(name, files)

    assert (again.imported_count, again.duplicate_count) == (0, len(good) + 1)
    assert again.dataset.image_count == len(good)


def test_an_empty_folder(platform: DatasetPlatform) -> None:
    name = platform.create("empty")
    answer = platform.import_files(name, [])
    assert (answer.imported_count, answer.duplicate_count, list(answer.rejected)) == (0, 0, [])
    request = dataset_pb2.BuildDatasetVersionRequest(dataset=name)
    with pytest.raises(FailedPreconditionError) as caught:
        platform.clients.dataset.BuildDatasetVersion(request)
    assert caught.value.reason == "EMPTY_DATASET"
    jobs = platform.clients.jobs.ListJobs(job_pb2.ListJobsRequest(parent=PARENT)).jobs
    assert not [job for job in jobs if job.target.startswith(f"{name}/")]


def test_a_file_over_the_limit_does_not_stop_the_others(platform: DatasetPlatform) -> None:
    name = platform.create("heavy")
    heavy = bytes(platform.settings.limits.image_bytes + (3 << 20))
    answer = platform.import_files(name, [("heavy.bin", heavy), ("light.jpg", photograph(2))])
    assert answer.imported_count == 1
    assert [(r.file_name, r.reason) for r in answer.rejected] == [("heavy.bin", "TOO_MANY_BYTES")]


def test_file_names_are_text_and_never_paths(platform: DatasetPlatform) -> None:
    name = platform.create("names")
    files = [
        ("../../etc/passwd", photograph(3)),
        ("a\x00b\n\x1b[31mc\u202e.jpg", photograph(4)),
        ("", photograph(5)),
        ("x" * 999 + ".jpg", photograph(6)),
    ]
    platform.import_files(name, files)
    names = [row.file_name for row in rows_of(platform, name)]
    assert names[:3] == ["../../etc/passwd", "ab[31mc.jpg", "unnamed"]
    assert len(names[3]) == 255
    assert names[3].endswith("x.jpg")
    assert all(
        row.artifact == f"{PARENT}/photographs/{row.digest}" for row in rows_of(platform, name)
    )


def test_a_caption_that_is_too_long_is_refused_with_its_file(platform: DatasetPlatform) -> None:
    name = platform.create("captions")
    answer = platform.import_files(name, [("a.jpg", photograph(7))], caption="word " * 1000)
    assert [r.reason for r in answer.rejected] == ["CAPTION_TOO_LONG"]
    platform.import_files(name, [("a.jpg", photograph(7))], caption=" white\n lace ")
    assert [row.caption for row in rows_of(platform, name)] == ["white lace"]


@pytest.mark.parametrize("broken", ["nothing", "no header", "second header", "chunk", "payload"])
def test_messages_out_of_order(platform: DatasetPlatform, broken: str) -> None:
    dataset_id = f"order-{broken.replace(' ', '-')}"
    name = platform.create(dataset_id)
    header, start, chunk = list(messages(name, [("a.jpg", photograph(8))]))
    streams = {
        "nothing": [],
        "no header": [start, chunk],
        "second header": [header, start, chunk, header],
        "chunk": [header, chunk],
        "payload": [header, start, chunk, dataset_pb2.ImportImagesRequest()],
    }
    with pytest.raises(InvalidArgumentError) as caught:
        platform.clients.dataset.ImportImages(iter(streams[broken]))
    assert caught.value.reason == "BAD_MESSAGE_ORDER"
    assert rows_of(platform, name) == []


def test_importing_into_nothing(platform: DatasetPlatform) -> None:
    with pytest.raises(NotFoundError):
        platform.import_files(f"{PARENT}/datasets/nothing", [("a.jpg", photograph(9))])
    with pytest.raises(InvalidArgumentError):
        platform.import_files("nothing", [])


def test_a_client_that_goes_away_keeps_what_it_had_sent(platform: DatasetPlatform) -> None:
    name = platform.create("cut")
    files = [(f"{i}.jpg", photograph(10 + i)) for i in range(4)]
    first_in, cut = threading.Event(), threading.Event()

    def stream() -> Iterator[dataset_pb2.ImportImagesRequest]:
        whole = list(messages(name, files))
        yield from whole[:-1]  # the last file has begun, its bytes are still to come
        first_in.set()
        cut.wait(30)

    address = platform.address
    before = spooled()
    with grpc.insecure_channel(address) as channel:
        call = dataset_pb2_grpc.DatasetServiceStub(channel).ImportImages.future(stream())
        first_in.wait(30)
        until(lambda: len(rows_of(platform, name)) == 3)
        call.cancel()
    cut.set()
    until(lambda: spooled() <= before)
    assert [row.file_name for row in rows_of(platform, name)] == ["0.jpg", "1.jpg", "2.jpg"]
    answer = platform.import_files(name, files)
    assert (answer.imported_count, answer.duplicate_count) == (1, 3)


def test_the_store_away_in_the_middle_of_an_import(
    platform: DatasetPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = platform.create("away")
    files = [(f"{i}.jpg", photograph(20 + i)) for i in range(3)]
    put, calls = type(platform.store).put, iter(range(9))

    def failing(*arguments: object, **named: object) -> object:
        if next(calls) == 1:
            raise StoreUnavailableError("the artifact store does not answer")
        return put(*arguments, **named)  # type: ignore[arg-type]

    with monkeypatch.context() as patch:
        patch.setattr(type(platform.store), "put", failing)
        with pytest.raises(StoreUnavailableError):
            platform.import_files(name, files)
    assert [row.file_name for row in rows_of(platform, name)] == ["0.jpg"]
    answer = platform.import_files(name, files)
    assert (answer.imported_count, answer.duplicate_count) == (2, 1)


def test_builds_are_queued_once_and_numbered(platform: DatasetPlatform) -> None:
    name = platform.create("queued")
    platform.import_files(name, [("a.jpg", photograph(30))])
    request = dataset_pb2.BuildDatasetVersionRequest(dataset=name, request_id="build-1")
    first = platform.clients.dataset.BuildDatasetVersion(request).job
    assert first.target == f"{name}/versions/1"
    assert platform.clients.dataset.BuildDatasetVersion(request).job.name == first.name
    request.resolution = 256
    with pytest.raises(RequestReusedError):
        platform.clients.dataset.BuildDatasetVersion(request)
    request.request_id = "build-2"
    second = platform.clients.dataset.BuildDatasetVersion(request).job
    assert second.target == f"{name}/versions/2"
    for job in (first, second):
        platform.clients.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))
        assert platform.wait(job.name).state == job_pb2.JOB_STATE_CANCELLED
    request.request_id = "build-3"
    third = platform.clients.dataset.BuildDatasetVersion(request).job
    assert third.target == f"{name}/versions/1", "numbers of builds that came to nothing are free"
    platform.clients.jobs.CancelJob(job_pb2.CancelJobRequest(name=third.name))


@pytest.mark.parametrize(
    ("resolution", "aspect", "field"),
    [
        *((resolution, "", "resolution") for resolution in (-8, 7, 100, 56, 4096)),
        (136, "keep", "resolution"),
        (128, "wide", "aspect"),
    ],
)
def test_a_resolution_that_cannot_be_built(
    platform: DatasetPlatform, resolution: int, aspect: str, field: str
) -> None:
    name = f"{PARENT}/datasets/resolution"
    with contextlib.suppress(AlreadyExistsError):
        platform.create("resolution")
    request = dataset_pb2.BuildDatasetVersionRequest(
        dataset=name, resolution=resolution, aspect=aspect
    )
    with pytest.raises(InvalidArgumentError) as caught:
        platform.clients.dataset.BuildDatasetVersion(request)
    assert caught.value.metadata["field"] == field


def test_what_does_not_exist(platform: DatasetPlatform) -> None:
    stub = platform.clients.dataset
    nothing = f"{PARENT}/datasets/none"
    with pytest.raises(NotFoundError):
        stub.BuildDatasetVersion(dataset_pb2.BuildDatasetVersionRequest(dataset=nothing))
    with pytest.raises(NotFoundError):
        stub.ListDatasetVersions(dataset_pb2.ListDatasetVersionsRequest(parent=nothing))
    version = f"{nothing}/versions/1"
    with pytest.raises(NotFoundError):
        stub.GetDatasetVersion(dataset_pb2.GetDatasetVersionRequest(name=version))
    with pytest.raises(NotFoundError):
        stub.ListDatasetItems(dataset_pb2.ListDatasetItemsRequest(parent=version))


def test_a_full_disk_in_the_middle_of_an_import(
    platform: DatasetPlatform, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = platform.create("full")
    files = [(f"{i}.jpg", photograph(60 + i)) for i in range(3)]
    write = Spool.write
    writes = iter(range(9))

    def failing(spool: Spool, chunk: bytes) -> None:
        if next(writes) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(spool, chunk)

    with monkeypatch.context() as patch:
        patch.setattr(Spool, "write", failing)
        with pytest.raises(DiskFullError):
            platform.import_files(name, files)
    assert [row.file_name for row in rows_of(platform, name)] == ["0.jpg"]
    assert platform.import_files(name, files).imported_count == 2


def test_it_is_not_ready_without_compute(platform: DatasetPlatform) -> None:
    assert not grpc_health_check(platform.address)


def test_many_clients_at_once(platform: DatasetPlatform) -> None:
    name = platform.create("crowd")
    files = [(f"{i}.jpg", photograph(40 + i)) for i in range(6)]
    answers: list[dataset_pb2.ImportImagesResponse] = []

    def import_all() -> None:
        answers.append(platform.import_files(name, files))

    threads = [threading.Thread(target=import_all) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(answer.imported_count for answer in answers) == 6
    assert sum(answer.duplicate_count for answer in answers) == 18
    assert sorted(row.sequence for row in rows_of(platform, name)) == [1, 2, 3, 4, 5, 6]


def spooled() -> set[Path]:
    """Folders that uploads are spooled to."""
    return set(Path(tempfile.gettempdir()).glob("toile-import-*"))


def until(condition: Callable[[], bool], seconds: float = 30.0) -> None:
    """Wait for something to become true."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)
