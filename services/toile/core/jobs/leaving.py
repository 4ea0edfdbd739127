"""Leave compute before it goes: `python -m toile.core.jobs.leaving JOB ATTEMPT`.

Kubernetes runs that in each pod of a RayJob before it ends the pod, as when a node is drained:
Ray's processes in a pod that is ended are gone before a training could keep a checkpoint.
https://kubernetes.io/docs/concepts/containers/container-lifecycle-hooks/
"""

import sys
import time

from toile.core import logging as core_logging
from toile.core.catalog.engine import open_catalog
from toile.core.errors import ToileError
from toile.core.jobs.records import JobStore
from toile.core.jobs.states import JobState
from toile.core.settings import Settings

LEAVE_SECONDS = 25.0
"""What a training may take for a checkpoint when it is told to end; Kubernetes gives 30."""
_POLL_SECONDS = 0.1


def leave(jobs: JobStore, name: str, attempt: int) -> None:
    """Have an attempt keep a checkpoint, and wait until it has; the next attempt goes on from it.

    Nothing happens to one that is over, that stops anyway, or that keeps no checkpoints.

    Raises:
        NotFoundError: There is no such job.
        CatalogUnavailableError: The catalog does not answer.
    """
    deadline = time.monotonic() + LEAVE_SECONDS
    if not jobs.request_leave(name, attempt):
        return
    while time.monotonic() < deadline:
        row = jobs.get(name)
        if row.state != JobState.RUNNING or not row.leave_requested:
            break
        time.sleep(_POLL_SECONDS)


def main() -> None:
    """Leave, or say why not: Kubernetes shows that as an event of the pod."""
    settings = Settings()
    core_logging.configure(settings, "job")
    name, attempt = sys.argv[1], int(sys.argv[2])
    try:
        catalog = open_catalog(settings)
        try:
            leave(JobStore(catalog), name, attempt)
        finally:
            catalog.close()
    except ToileError as error:
        sys.exit(f"{name} is not told that its compute goes: {error.message}")


if __name__ == "__main__":
    main()
