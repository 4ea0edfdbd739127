"""By which names an adapter can be asked for."""

import pytest

from servers.generating import Painter, add_adapter, generate, refused
from servers.platform import MODEL_VERSION, Platform
from toile.core.catalog.models import ModelAliasRow, ModelRow, ModelVersionRow
from toile.core.clock import now
from toile.core.errors import NotFoundError

MODEL = MODEL_VERSION.removesuffix("/versions/1")
SECOND = f"{MODEL}/versions/2"


@pytest.fixture
def two_versions(platform: Platform) -> Platform:
    """A model with a second version, and the alias `production` on the first."""
    add_adapter(platform)
    with platform.catalog.transaction() as session:
        first = session.get_one(ModelVersionRow, MODEL_VERSION)
        columns = {column.key: getattr(first, column.key) for column in first.__table__.columns}
        session.add(ModelVersionRow(**{**columns, "name": SECOND, "number": 2, "artifact": "two"}))
        session.add(
            ModelAliasRow(
                name=f"{MODEL}@production", model=MODEL, version=MODEL_VERSION, update_time=now()
            )
        )
    return platform


async def drawn_with(platform: Platform, name: str) -> str:
    """Draw with an adapter; return the version that was taken."""
    events = await generate(platform, adapters=[{"model": name}])
    (adapter,) = events[-1].generation.request.adapters
    return adapter.model


async def test_an_alias_names_the_version_that_it_points_to(
    two_versions: Platform, painter: Painter
) -> None:
    assert await drawn_with(two_versions, MODEL) == SECOND
    assert await drawn_with(two_versions, f"{MODEL}@production") == MODEL_VERSION
    assert painter.requests[-1].adapters[0].artifact == f"{MODEL_VERSION}/job"
    with two_versions.catalog.transaction() as session:
        session.get_one(ModelAliasRow, f"{MODEL}@production").version = SECOND
    assert await drawn_with(two_versions, f"{MODEL}@production") == SECOND


async def test_a_deprecated_version_is_taken_by_its_own_name_alone(
    two_versions: Platform, painter: Painter
) -> None:
    with two_versions.catalog.transaction() as session:
        session.get_one(ModelVersionRow, SECOND).deprecate_time = now()
    assert await drawn_with(two_versions, MODEL) == MODEL_VERSION
    assert await drawn_with(two_versions, SECOND) == SECOND


async def test_an_unknown_alias_and_one_of_another_project(two_versions: Platform) -> None:
    with two_versions.catalog.transaction() as session:
        session.add(ModelRow(name="projects/other/models/x", project="other"))
        session.flush()
        session.add(
            ModelAliasRow(
                name="projects/other/models/x@production",
                model="projects/other/models/x",
                version=MODEL_VERSION,
                update_time=now(),
            )
        )
    for name in (f"{MODEL}@staging", "projects/other/models/x@production"):
        error = await refused(two_versions, adapters=[{"model": name}])
        assert isinstance(error, NotFoundError)
        assert error.reason == "ADAPTER_NOT_FOUND"
