"""The dataset service's process: `python -m toile.dataset`."""

from toile.core.artifacts import open_store
from toile.core.catalog.engine import open_catalog
from toile.core.jobs import JobKind
from toile.core.jobs.launcher import open_launcher
from toile.core.jobs.servicer import JOB_SERVICE_NAME, add_job_service
from toile.core.jobs.supervisor import JobSupervisor
from toile.core.rpc.server import Service, run
from toile.core.settings import Settings
from toile.dataset.handler import DatasetHandler
from toile.dataset.servicer import DATASET_SERVICE_NAME, DatasetServicer
from toile.v1 import dataset_pb2_grpc

BUILD_MODULE = "toile.dataset.build"


def build_service(settings: Settings) -> Service:
    """Put the service together."""
    catalog, store = open_catalog(settings), open_store(settings)
    handler = DatasetHandler(settings, catalog, store)
    servicer = DatasetServicer(handler, most_image_bytes=settings.limits.image_bytes)
    supervisor = JobSupervisor(settings, catalog, JobKind.DATASET_BUILD, BUILD_MODULE)
    return Service(
        name="dataset",
        add=[
            (dataset_pb2_grpc.add_DatasetServiceServicer_to_server, servicer),
            add_job_service(settings, catalog),
        ],
        full_names=[DATASET_SERVICE_NAME, JOB_SERVICE_NAME],
        checks={
            "catalog": catalog.check,
            "artifacts": store.check,
            "base": handler.check_base,
            "ray": open_launcher(settings).check,
        },
        background=[supervisor.run],
    )


if __name__ == "__main__":
    run(build_service)
