"""The dataset service over a fresh home, running in a thread of its own."""

import asyncio
import contextlib
import threading
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.bases import import_base
from toile.core.catalog.engine import Catalog, open_catalog
from toile.core.rpc import server
from toile.core.rpc.client import Clients
from toile.core.settings import Settings
from toile.dataset.__main__ import build_service
from toile.v1 import dataset_pb2, job_pb2

PARENT = "projects/test"


@dataclass
class DatasetPlatform:
    """What a test talks to."""

    address: str
    settings: Settings
    clients: Clients
    catalog: Catalog
    store: ArtifactStore

    def create(self, dataset_id: str, trigger_word: str = "<lace>") -> str:
        """Make a dataset and return its name."""
        request = dataset_pb2.CreateDatasetRequest(
            parent=PARENT, dataset_id=dataset_id, trigger_word=trigger_word
        )
        return self.clients.dataset.CreateDataset(request).dataset.name

    def import_files(
        self, dataset: str, files: Iterable[tuple[str, bytes]], caption: str = ""
    ) -> dataset_pb2.ImportImagesResponse:
        """Send whole files."""
        return self.clients.dataset.ImportImages(messages(dataset, files, caption))

    def build(self, dataset: str, resolution: int = 0, aspect: str = "") -> job_pb2.Job:
        """Build a version and wait for the job's end."""
        request = dataset_pb2.BuildDatasetVersionRequest(
            dataset=dataset, resolution=resolution, aspect=aspect
        )
        return self.wait(self.clients.dataset.BuildDatasetVersion(request).job.name)

    def wait(self, job: str) -> job_pb2.Job:
        """Wait for a job's end."""
        request = job_pb2.WatchJobRequest(name=job)
        events = list(self.clients.jobs.WatchJob(request, timeout=240))
        return events[-1].job


def messages(
    dataset: str, files: Iterable[tuple[str, bytes]], caption: str = ""
) -> Iterator[dataset_pb2.ImportImagesRequest]:
    """The messages of an upload."""
    yield dataset_pb2.ImportImagesRequest(header=dataset_pb2.ImportHeader(dataset=dataset))
    for name, data in files:
        start = dataset_pb2.FileStart(file_name=name, caption=caption)
        yield dataset_pb2.ImportImagesRequest(file=start)
        for at in range(0, len(data), 1 << 20):
            yield dataset_pb2.ImportImagesRequest(chunk=data[at : at + (1 << 20)])


@contextlib.contextmanager
def running(home: Path, bundle: Path, ray_jobs_url: str = "") -> Iterator[DatasetPlatform]:
    """Start the service with a base imported, and stop it at the end.

    Without Ray it never calls itself ready, but answers whatever needs no compute.
    """
    settings = Settings(home=home, ray_jobs_url=ray_jobs_url, grace_seconds=1.0, cpu_threads=1)
    catalog = open_catalog(settings)
    catalog.migrate()
    store = open_store(settings)
    import_base(settings, catalog, store, bundle)
    loop = asyncio.new_event_loop()
    thread = threading.Thread(target=loop.run_forever, name="dataset service")
    thread.start()

    async def start() -> server.RunningService:
        service = await server.start(build_service(settings), settings)
        if ray_jobs_url:
            await service.ready()
        return service

    try:
        service = asyncio.run_coroutine_threadsafe(start(), loop).result(60)
        address = f"127.0.0.1:{service.port}"
        with Clients(settings.model_copy(update={"dataset_address": address})) as clients:
            yield DatasetPlatform(address, settings, clients, catalog, store)
        asyncio.run_coroutine_threadsafe(service.stop(), loop).result(60)
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.run_until_complete(loop.shutdown_default_executor())
        loop.close()
        catalog.close()
