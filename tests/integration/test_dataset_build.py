"""Dataset builds on a real Ray head, through the service."""

import io
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from integration.dataset_platform import DatasetPlatform, running
from integration.ray_head import RayHead
from toile.core.artifacts import fetch
from toile.core.bases import import_base
from toile.core.catalog.models import DatasetVersionRow
from toile.core.jobs import JobKind, JobStore
from toile.v1 import dataset_pb2, job_pb2

pytestmark = pytest.mark.timeout(600)  # Ray's start counts

PHOTOGRAPHS = Path(__file__).parents[3] / "shared" / "data" / "clothing"


@pytest.fixture(scope="module")
def platform(
    tmp_path_factory: pytest.TempPathFactory, tiny_bundle: Path, ray_head: RayHead
) -> Iterator[DatasetPlatform]:
    home = tmp_path_factory.mktemp("home")
    with running(home, tiny_bundle, ray_head.jobs_url) as platform:
        yield platform


def cloth(seed: int, size: tuple[int, int] = (300, 400)) -> bytes:
    """A JPEG of something that looks like nothing else."""
    coarse = np.random.default_rng(seed).integers(0, 255, (6, 6, 3)).astype(np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC).save(buffer, "JPEG")
    return buffer.getvalue()


def version_of(platform: DatasetPlatform, job: job_pb2.Job) -> dataset_pb2.DatasetVersion:
    request = dataset_pb2.GetDatasetVersionRequest(name=job.target)
    return platform.clients.dataset.GetDatasetVersion(request).version


def folder_of(platform: DatasetPlatform, job: job_pb2.Job) -> Path:
    with platform.catalog.reading() as session:
        artifact = session.get_one(DatasetVersionRow, job.target).artifact
    return fetch(platform.store, artifact, platform.settings.home_path / "cache")


def test_a_folder_of_photographs_becomes_a_version(platform: DatasetPlatform) -> None:
    name = platform.create("folder")
    platform.import_files(name, [(f"{i}.jpg", cloth(i)) for i in range(5)])
    platform.import_files(name, [("captioned.jpg", cloth(9))], caption="blue silk dress")
    smaller = io.BytesIO()
    Image.open(io.BytesIO(cloth(2))).resize((240, 320)).save(smaller, "PNG")
    platform.import_files(name, [("again.png", smaller.getvalue())])

    said = dataset_pb2.UpdateDatasetRequest(
        name=name, people_consent=dataset_pb2.PEOPLE_CONSENT_CONSENTED
    )
    platform.clients.dataset.UpdateDataset(said)

    job = platform.build(name, resolution=96)

    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    version = version_of(platform, job)
    assert version.people_consent == dataset_pb2.PEOPLE_CONSENT_CONSENTED
    assert (version.image_count, version.resolution, len(version.rejected)) == (7, 96, 0)
    folder = folder_of(platform, job)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row["file_name"] for row in rows] == [f"images/{i:04d}.png" for i in range(1, 8)]
    assert all(row["text"].startswith("<lace> ") for row in rows)
    assert rows[5]["text"] == "<lace> blue silk dress"
    assert [row["near_duplicate_of"] for row in rows] == [""] * 6 + ["images/0003.png"]
    for row in rows:
        for column in ("file_name", "edges", "mask"):
            with Image.open(folder / row[column]) as image:
                assert image.size == (96, 96)
    request = dataset_pb2.ListDatasetItemsRequest(parent=version.name, page_size=4)
    page = platform.clients.dataset.ListDatasetItems(request)
    request.page_token = page.next_page_token
    items = [*page.items, *platform.clients.dataset.ListDatasetItems(request).items]
    assert [item.caption for item in items] == [row["text"] for row in rows]
    assert [item.caption_imported for item in items] == [False] * 5 + [True, False]
    get = dataset_pb2.GetDatasetRequest(name=name)
    assert platform.clients.dataset.GetDataset(get).dataset.latest_version == version.name

    second = platform.build(name, resolution=96)

    assert second.target == f"{name}/versions/2"
    assert version_of(platform, second).digest == version.digest, "equal data, equal digest"


def test_maps_go_with_their_images(platform: DatasetPlatform) -> None:
    name = platform.create("maps")
    pose = io.BytesIO()
    Image.new("RGB", (300, 400), (0, 255, 0)).save(pose, "PNG")
    stray = io.BytesIO()
    Image.new("RGB", (300, 400), (255, 0, 0)).save(stray, "PNG")
    platform.import_files(
        name,
        [
            ("conditioning/worn/a.png", pose.getvalue()),
            ("worn/a.jpg", cloth(40)),
            ("b.jpg", cloth(41)),
            ("conditioning/none.png", stray.getvalue()),
        ],
    )
    job = platform.build(name, resolution=96)
    version = version_of(platform, job)
    assert version.image_count == 2
    rejected = [(r.file_name, r.reason) for r in version.rejected]
    assert rejected == [("conditioning/none.png", "NO_SUCH_IMAGE")]
    folder = folder_of(platform, job)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [row.get("conditioning") for row in rows] == ["conditioning/0001.png", None]
    with Image.open(folder / rows[0]["conditioning"]) as shown:
        assert shown.size == (96, 96)
        assert shown.getpixel((48, 48)) == (0, 255, 0)


def test_a_photograph_that_was_lost_is_left_out_with_its_reason(platform: DatasetPlatform) -> None:
    """And those that are kept keep their shape, where that is asked for."""
    name = platform.create("lost")
    landscape = cloth(21, (400, 250))
    platform.import_files(name, [("kept.jpg", cloth(20)), ("wide.jpg", landscape)])
    before = {info.key for info in platform.store.list("projects/test/photographs/")}
    platform.import_files(name, [("damaged.jpg", cloth(22))])
    after = {info.key for info in platform.store.list("projects/test/photographs/")}
    (lost,) = after - before
    platform.store.delete(lost)

    job = platform.build(name, aspect="keep")

    version = version_of(platform, job)
    assert (version.image_count, version.aspect) == (2, "keep")
    folder = folder_of(platform, job)
    rows = [json.loads(line) for line in (folder / "metadata.jsonl").read_text().splitlines()]
    assert [(row["width"], row["height"]) for row in rows] == [(96, 160), (160, 96)]
    assert [row["original_size"] for row in rows] == [[300, 400], [400, 250]]
    for row in rows:
        for column in ("file_name", "edges", "mask"):
            with Image.open(folder / row[column]) as image:
                assert image.size == (row["width"], row["height"])
    assert [(r.file_name, r.reason) for r in version.rejected] == [("damaged.jpg", "DATA_LOSS")]


def test_a_build_without_one_usable_photograph_fails_and_publishes_nothing(
    platform: DatasetPlatform,
) -> None:
    name = platform.create("unusable")
    before = {info.key for info in platform.store.list("projects/test/photographs/")}
    platform.import_files(name, [("a.jpg", cloth(30))])
    for info in list(platform.store.list("projects/test/photographs/")):
        if info.key not in before:
            platform.store.delete(info.key)

    job = platform.build(name)

    assert job.state == job_pb2.JOB_STATE_FAILED
    assert job.error.reason == "NO_USABLE_IMAGES"
    versions = dataset_pb2.ListDatasetVersionsRequest(parent=name)
    assert not platform.clients.dataset.ListDatasetVersions(versions).versions
    assert not list(platform.store.list(f"{name}/"))


def test_a_base_that_cannot_see_is_named_as_the_reason(
    platform: DatasetPlatform, tiny_bundle: Path, tmp_path: Path
) -> None:
    blind = tmp_path / "blind"
    shutil.copytree(tiny_bundle, blind, ignore=shutil.ignore_patterns("segmenter"))
    import_base(platform.settings, platform.catalog, platform.store, blind, "bases/blind")
    name = platform.create("unseen")
    platform.import_files(name, [("a.jpg", cloth(35))])
    with platform.catalog.transaction() as session:
        job = JobStore(platform.catalog).create(
            session,
            project="test",
            kind=JobKind.DATASET_BUILD,
            target=f"{name}/versions/1",
            spec={"dataset": name, "resolution": 64, "base": "bases/blind", "last_sequence": 1},
        )

    ended = platform.wait(job.name)

    assert (ended.state, ended.error.reason) == (job_pb2.JOB_STATE_FAILED, "BASE_LACKS_VISION")
    assert "segmenter" in ended.error.message


def test_a_cancelled_build_publishes_nothing(platform: DatasetPlatform) -> None:
    name = platform.create("cancelled")
    platform.import_files(name, [(f"{i}.jpg", cloth(40 + i)) for i in range(20)])
    request = dataset_pb2.BuildDatasetVersionRequest(dataset=name)
    job = platform.clients.dataset.BuildDatasetVersion(request).job
    for response in platform.clients.jobs.WatchJob(job_pb2.WatchJobRequest(name=job.name)):
        if response.event.state == job_pb2.JOB_STATE_RUNNING:
            break
    platform.clients.jobs.CancelJob(job_pb2.CancelJobRequest(name=job.name))

    ended = platform.wait(job.name)

    assert ended.state == job_pb2.JOB_STATE_CANCELLED
    versions = dataset_pb2.ListDatasetVersionsRequest(parent=name)
    assert not platform.clients.dataset.ListDatasetVersions(versions).versions
    assert not list(platform.store.list(f"{name}/"))


def test_real_photographs_of_garments(platform: DatasetPlatform) -> None:
    if not PHOTOGRAPHS.is_dir():
        pytest.skip(f"no photographs of garments at {PHOTOGRAPHS}")
    name = platform.create("dresses", trigger_word="<dress>")
    paths = sorted((PHOTOGRAPHS / "dress").glob("*.jpg"))[:6]
    imported = platform.import_files(name, [(path.name, path.read_bytes()) for path in paths])
    assert (imported.imported_count, list(imported.rejected)) == (6, [])

    job = platform.build(name)

    assert job.state == job_pb2.JOB_STATE_SUCCEEDED, job.error
    assert version_of(platform, job).image_count == 6
    assert not list((platform.settings.home_path / "scratch").iterdir()), "scratch is removed"
