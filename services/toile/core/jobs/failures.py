"""What a job's failure is called.

The class names of Ray, torch and safetensors are compared as text: none is imported here.
"""

import errno
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field

from toile.core.context import new_id
from toile.core.errors import ToileError

OUT_OF_MEMORY = "OUT_OF_MEMORY"
COMPUTE_LOST = "COMPUTE_LOST"

# Ray's, where what a process waited for is gone: an actor, a node, the cluster itself.
_LOST_CLASSES = frozenset(
    {
        "RayActorError",
        "ObjectLostError",
        "NodeDiedError",
        "LocalRayletDiedError",
        "WorkerCrashedError",
        "RaySystemError",
        "RpcError",
    }
)
_MEMORY_CLASSES = frozenset({"OutOfMemoryError", "OutOfMemory", "MemoryError"})
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Failure:
    """What a job failed of.

    Attributes:
        reason: Stable, machine-readable.
        message: One line for a person.
        metadata: Facts, as the error has them.
    """

    reason: str
    message: str
    metadata: Mapping[str, str] = field(default_factory=dict)


def describe(error: BaseException) -> Failure:
    """Say what a job failed of; an unforeseen error's trace is logged."""
    known = _known(error)
    if known is not None:
        return known
    incident = new_id()
    _log.error("job failed, incident %s", incident, exc_info=error)
    return Failure(
        "INTERNAL", f"internal error, incident {incident}; the job's log has the details"
    )


def is_foreseen(error: BaseException) -> bool:
    """Whether it has a name of its own, and would come again if the same were tried again."""
    return _known(error) is not None


def is_compute_lost(error: BaseException) -> bool:
    """Whether the compute went away under the work, which is no fault of it: try again."""
    if is_foreseen(error):
        return False
    return any(
        any(
            cls.__module__ == "ray.exceptions" and cls.__name__ in _LOST_CLASSES
            for cls in type(cause).__mro__
        )
        # An actor whose constructor raised would raise again.
        and not getattr(cause, "actor_init_failed", False)
        for cause in _chain(error)
    )


def _known(error: BaseException) -> Failure | None:
    for cause in _chain(error):
        if isinstance(cause, ToileError):
            return Failure(cause.reason, cause.message, cause.metadata)
        if is_disk_full(cause):
            return Failure("DISK_FULL", "no space is left for the job's files")
        if _is_memory(cause):
            return Failure(
                OUT_OF_MEMORY, "the job needs more memory than there is; try a smaller batch"
            )
    return None


def _chain(error: BaseException | None) -> list[BaseException]:
    chain: list[BaseException] = []
    while error is not None and error not in chain:
        chain.append(error)
        error = error.__cause__ or error.__context__
    return chain


def is_disk_full(error: BaseException) -> bool:
    """Whether an error of the system or of safetensors says that no space is left."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    # safetensors writes files by itself, and says what went wrong as text alone.
    return type(error).__name__ == "SafetensorError" and os.strerror(errno.ENOSPC) in str(error)


def _is_memory(error: BaseException) -> bool:
    if any(cls.__name__ in _MEMORY_CLASSES for cls in type(error).__mro__):
        return True
    # torch on a CPU raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)
