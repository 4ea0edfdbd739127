"""The libraries that compile and run engines: TensorRT for RTX, and TensorRT.

Both share one Python API and differ in their module. Neither is a dependency: the extra `rtx`, or
NVIDIA's own installation.
"""

import importlib
from typing import Any

from toile.core.errors import FailedPreconditionError, InvalidArgumentError

TENSORRT, TENSORRT_RTX = "tensorrt", "tensorrt-rtx"
_DATA_CENTRE = ("9.0", "10.0", "10.3")
"""Hopper and Blackwell for data centres, which TensorRT for RTX does not know."""
_MODULES = {TENSORRT: ("tensorrt",), TENSORRT_RTX: ("tensorrt_rtx", "tensorrt_rtx_bindings")}
_EXTRA = {TENSORRT: "tensorrt, from NVIDIA", TENSORRT_RTX: "the extra `rtx`"}


def builder_for(compute_capability: str) -> str:
    """Return the library for a GPU: the one that needs no GPU to build, where it can."""
    return TENSORRT if compute_capability in _DATA_CENTRE else TENSORRT_RTX


def load_library(name: str) -> Any:
    """Import a library.

    Raises:
        InvalidArgumentError: There is none of that name.
        FailedPreconditionError: It is not installed (`NO_ENGINE_BUILDER`).
    """
    if name not in _MODULES:
        raise InvalidArgumentError(
            f"there is no builder {name!r}; there are {', '.join(_MODULES)}", field="builder"
        )
    for module_name in _MODULES[name]:
        try:
            library = importlib.import_module(module_name)
        except ImportError:
            continue
        # A folder called tensorrt/ on the path would be imported as an empty namespace.
        if hasattr(library, "Builder"):
            return library
    raise FailedPreconditionError(
        f"{name} is not installed; it comes with {_EXTRA[name]}", reason="NO_ENGINE_BUILDER"
    )


def keep_messages(library: Any) -> Any:
    """Return a logger of the library's that keeps errors in `problems`; others print them."""

    class Messages(library.ILogger):  # type: ignore[misc]
        def __init__(self) -> None:
            library.ILogger.__init__(self)
            self.problems: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= library.ILogger.Severity.ERROR:
                self.problems.append(message)

    return Messages()


def capability_here() -> str:
    """Return the compute capability of this machine's GPU, such as `8.9`.

    Raises:
        FailedPreconditionError: There is no GPU (`NO_GPU`).
    """
    import torch  # heavy, and only asked where engines are run

    if not torch.cuda.is_available():
        raise FailedPreconditionError(
            "there is no GPU here: engines run on one, and TensorRT builds on the one that an "
            "engine is for; tensorrt-rtx builds without",
            reason="NO_GPU",
        )
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"
