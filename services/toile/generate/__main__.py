"""The generate service's process: `python -m toile.generate`."""

from functools import cache, partial

from toile.core.artifacts import open_store
from toile.core.catalog.engine import open_catalog
from toile.core.inference import Inference
from toile.core.inference_health import check_models
from toile.core.rpc.server import Service, run
from toile.core.settings import Settings
from toile.generate.deletion import Deletion
from toile.generate.facts import BaseFactsReader
from toile.generate.handler import GenerateHandler
from toile.generate.library import Library
from toile.generate.records import GenerationRecords
from toile.generate.servicer import GENERATE_SERVICE_NAME, GenerateServicer
from toile.v1 import generate_pb2_grpc


def build_service(settings: Settings) -> Service:
    """Put the service together."""
    catalog, store = open_catalog(settings), open_store(settings)
    # The channel belongs to the event loop, which does not run yet.
    models = cache(partial(Inference.connect, settings))
    records = GenerationRecords(settings, catalog, store, BaseFactsReader(store).read)
    handler = GenerateHandler(records, models)
    servicer = GenerateServicer(
        handler,
        Library(settings.limits, catalog, store),
        Deletion(catalog, store),
        most_image_bytes=settings.limits.image_bytes,
    )
    return Service(
        name="generate",
        add=[(generate_pb2_grpc.add_GenerateServiceServicer_to_server, servicer)],
        full_names=[GENERATE_SERVICE_NAME],
        checks={
            "catalog": catalog.check,
            "artifacts": store.check,
            "models": partial(check_models, settings),
        },
        background=[handler.keep_alive],
    )


if __name__ == "__main__":
    run(build_service)
