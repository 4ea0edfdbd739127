"""Adapters that a Triton server is told to drop, by name."""

import numpy as np
import tritonclient.grpc as triton
from tritonclient.utils import InferenceServerException, triton_to_np_dtype

from toile.core.errors import ComputeUnavailableError
from toile.diffusion.triton.resident import ADAPTERS, UNLOAD

UNLOAD_SECONDS = 10.0
"""For each model to answer, behind the batch that it evaluates."""


def unload_adapter(address: str, adapter: str) -> None:
    """Have a server drop an adapter, by its key, wherever it holds it.

    A drawing under way that uses it costs the server a reading of it again.

    Args:
        address: host:port of its gRPC.
        adapter: The key.

    Raises:
        ComputeUnavailableError: The server does not answer.
    """
    client = triton.InferenceServerClient(address)
    try:
        index = client.get_model_repository_index(client_timeout=UNLOAD_SECONDS)
        for name in sorted({model.name for model in index.models if model.state == "READY"}):
            inputs = client.get_model_metadata(name, client_timeout=UNLOAD_SECONDS).inputs
            if all(one.name != ADAPTERS for one in inputs):
                continue  # no front: an engine that one calls
            client.infer(
                name,
                [_unread(one.name, one.datatype, one.shape) for one in inputs],
                parameters={UNLOAD: adapter},
                client_timeout=UNLOAD_SECONDS,
            )
    except InferenceServerException as error:
        raise ComputeUnavailableError(f"Triton failed: {error.message()}") from error
    finally:
        client.close()


def _unread(name: str, kind: str, shape: list[int]) -> triton.InferInput:
    """Return a tensor that must be there and is not looked at."""
    made = triton.InferInput(name, [max(1, size) for size in shape], kind)
    made.set_data_from_numpy(np.zeros(made.shape(), triton_to_np_dtype(kind)))
    return made
