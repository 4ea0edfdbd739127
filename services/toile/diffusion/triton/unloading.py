"""Adapters that a Triton server is told to drop, by name."""

import numpy as np

from toile.core.errors import ComputeUnavailableError
from toile.diffusion.triton.client import DTYPES, Array, TritonClient, TritonError
from toile.diffusion.triton.resident import ADAPTERS, UNLOAD

UNLOAD_SECONDS = 10.0
"""For each model to answer, behind the batch that it evaluates."""


def unload_adapter(address: str, adapter: str) -> None:
    """Have a server drop an adapter, by its key, wherever it holds it.

    A drawing under way that uses it costs the server a reading of it again.

    Args:
        address: host:port of its HTTP.
        adapter: The key.

    Raises:
        ComputeUnavailableError: The server does not answer.
    """
    try:
        with TritonClient(address) as client:
            for name in client.ready_models(seconds=UNLOAD_SECONDS):
                inputs = client.inputs(name, seconds=UNLOAD_SECONDS)
                if all(one["name"] != ADAPTERS for one in inputs):
                    continue  # no front: an engine that one calls
                unread = {one["name"]: _unread(one["datatype"], one["shape"]) for one in inputs}
                client.infer(name, unread, parameters={UNLOAD: adapter}, seconds=UNLOAD_SECONDS)
    except TritonError as error:
        raise ComputeUnavailableError(f"Triton failed: {error}") from error


def _unread(kind: str, shape: list[int]) -> Array:
    """Return a tensor that must be there and is not looked at."""
    return np.zeros([max(1, size) for size in shape], DTYPES[kind])
