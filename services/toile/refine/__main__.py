"""The refine service's process: `python -m toile.refine`."""

from functools import cache, partial

from toile.core.artifacts import open_store
from toile.core.catalog.engine import open_catalog
from toile.core.inference import Inference
from toile.core.inference_health import check_models
from toile.core.rpc.server import Service, run
from toile.core.settings import Settings
from toile.refine.handler import RefineHandler
from toile.refine.servicer import REFINE_SERVICE_NAME, RefineServicer
from toile.v1 import refine_pb2_grpc


def build_service(settings: Settings) -> Service:
    """Put the service together."""
    catalog, store = open_catalog(settings), open_store(settings)
    # The channel belongs to the event loop, which does not run yet.
    models = cache(partial(Inference.connect, settings))
    handler = RefineHandler(settings, catalog, store, models)
    return Service(
        name="refine",
        add=[(refine_pb2_grpc.add_RefineServiceServicer_to_server, RefineServicer(handler))],
        full_names=[REFINE_SERVICE_NAME],
        checks={
            "catalog": catalog.check,
            "artifacts": store.check,
            "models": partial(check_models, settings),
        },
    )


if __name__ == "__main__":
    run(build_service)
