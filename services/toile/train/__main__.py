"""The train service's process: `python -m toile.train`."""

from functools import cache, partial

from toile.core.artifacts import open_store
from toile.core.catalog.engine import open_catalog
from toile.core.inference import Inference
from toile.core.jobs import JobKind
from toile.core.jobs.launcher import open_launcher
from toile.core.jobs.servicer import JOB_SERVICE_NAME, add_job_service
from toile.core.jobs.supervisor import JobSupervisor
from toile.core.rpc.server import Service, run
from toile.core.settings import Settings
from toile.train.deletion import Deletion
from toile.train.handler import TrainHandler
from toile.train.importing import Importer
from toile.train.leftovers import Leftovers
from toile.train.registry import ModelRegistry
from toile.train.servicer import TRAIN_SERVICE_NAME, TrainServicer
from toile.v1 import train_pb2_grpc

TRAINING_MODULE = "toile.training"


def build_service(settings: Settings) -> Service:
    """Put the service together."""
    catalog, store = open_catalog(settings), open_store(settings)
    servicer = TrainServicer(
        TrainHandler(settings, catalog, store),
        ModelRegistry(catalog, store),
        Deletion(catalog, store),
        Importer(settings, catalog, store),
        # The channel belongs to the event loop, which does not run yet.
        cache(partial(Inference.connect, settings)),
        limits=settings.limits,
        prices=settings.prices,
    )
    supervisor = JobSupervisor(settings, catalog, JobKind.TRAINING, TRAINING_MODULE)
    return Service(
        name="train",
        add=[
            (train_pb2_grpc.add_TrainServiceServicer_to_server, servicer),
            add_job_service(settings, catalog),
        ],
        full_names=[TRAIN_SERVICE_NAME, JOB_SERVICE_NAME],
        checks={
            "catalog": catalog.check,
            "artifacts": store.check,
            "ray": open_launcher(settings).check,
        },
        background=[supervisor.run, Leftovers(catalog, store).run],
    )


if __name__ == "__main__":
    run(build_service)
