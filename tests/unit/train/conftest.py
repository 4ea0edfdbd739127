"""A train handler over a catalog with a base and a dataset."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.catalog.models import BaseRow, DatasetItemRow, DatasetRow, DatasetVersionRow
from toile.core.settings import Settings
from toile.train.handler import TrainHandler

CAPTIONS = ["<lace> white dress", "<lace> white dress", "", "<lace> black skirt", "<lace> red hat"]


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", grace_seconds=0.1)


@pytest.fixture
def catalog(settings: Settings) -> Iterator[Catalog]:
    catalog = open_catalog(settings)
    catalog.migrate()
    with catalog.transaction() as session:
        session.add(
            BaseRow(name="bases/tiny", artifact="bases/tiny/0", digest="b", native_size=128)
        )
        for dataset in ("lace", "unbuilt"):
            name = f"projects/p/datasets/{dataset}"
            session.add(DatasetRow(name=name, project="p", trigger_word="<lace>"))
        session.flush()
        for number in (1, 2):
            session.add(version_row(number))
        session.flush()
        for index, caption in enumerate(CAPTIONS):
            session.add(
                DatasetItemRow(
                    version="projects/p/datasets/lace/versions/2",
                    file_name=f"{index:06d}.png",
                    caption=caption,
                    caption_imported=True,
                    source_file_name="a.jpg",
                    source_digest="0" * 64,
                )
            )
    yield catalog
    catalog.close()


def version_row(number: int) -> DatasetVersionRow:
    name = f"projects/p/datasets/lace/versions/{number}"
    return DatasetVersionRow(
        name=name,
        dataset="projects/p/datasets/lace",
        number=number,
        digest=str(number) * 64,
        artifact=f"{name}/made",
        trigger_word="<lace>",
        resolution=128,
        image_count=5,
        rejected=[],
        job="projects/p/jobs/made",
    )


@pytest.fixture
def store(settings: Settings) -> ArtifactStore:
    return open_store(settings)


@pytest.fixture
def handler(settings: Settings, catalog: Catalog, store: ArtifactStore) -> TrainHandler:
    return TrainHandler(settings, catalog, store)
