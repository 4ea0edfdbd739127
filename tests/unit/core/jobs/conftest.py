"""A catalog with a queued job."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.jobs import JobKind, JobStore
from toile.core.settings import Settings
from unit.core.jobs.fake_compute import FakeCompute
from unit.core.jobs.fake_kubernetes import FakeKubernetes, fake_kubernetes
from unit.core.jobs.fake_ray import FakeRay, fake_ray


@pytest.fixture
def ray() -> Iterator[FakeRay]:
    with fake_ray() as ray:
        yield ray


@pytest.fixture
def kubernetes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKubernetes]:
    pytest.importorskip("kubernetes", reason="the kubernetes extra is not installed")
    # It is read from the environment once, when the client is imported.
    location = "kubernetes.config.kube_config.KUBE_CONFIG_DEFAULT_LOCATION"
    monkeypatch.setattr(location, str(tmp_path / "kubeconfig"))
    with fake_kubernetes(tmp_path) as kubernetes:
        yield kubernetes


@pytest.fixture(params=["ray", "kubernetes"])
def compute(request: pytest.FixtureRequest) -> FakeCompute:
    """Each thing that jobs can be submitted to."""
    compute: FakeCompute = request.getfixturevalue(request.param)
    return compute


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(home=tmp_path / "home", job_max_attempts=2)


@pytest.fixture
def catalog(settings: Settings) -> Iterator[Catalog]:
    catalog = open_catalog(settings)
    catalog.migrate()
    yield catalog
    catalog.close()


@pytest.fixture
def jobs(catalog: Catalog) -> JobStore:
    return JobStore(catalog)


@pytest.fixture
def job(catalog: Catalog, jobs: JobStore) -> str:
    """Name of a queued job."""
    with catalog.transaction() as session:
        return jobs.create(
            session,
            project="p",
            kind=JobKind.TRAINING,
            target="projects/p/models/m/versions/1",
            spec={"answer": 42},
        ).name
