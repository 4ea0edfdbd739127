"""What is done before a part is told to end."""

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

import structlog

from toile.core.errors import ComputeUnavailableError
from toile.core.jobs.ray_jobs import RayJobs
from toile.core.settings import Settings

Farewell = Callable[[], Awaitable[None]]
_POLL_SECONDS = 0.2

log = structlog.get_logger()


def jobs_ended(settings: Settings, patience_seconds: float) -> Farewell:
    """Stop the jobs of a Ray head, which would end them without a word.

    A training keeps a checkpoint when it is stopped, and goes on from it after the next start.

    Args:
        settings: They name the head.
        patience_seconds: What the jobs may take, before Ray kills them.
    """

    async def farewell() -> None:
        with contextlib.closing(RayJobs.of(settings)) as ray:
            try:
                async with asyncio.timeout(patience_seconds):
                    await _end_jobs(ray)
            except (ComputeUnavailableError, TimeoutError) as error:
                log.warning("jobs_not_stopped", why=str(error) or "they take too long")

    return farewell


async def _end_jobs(ray: RayJobs) -> None:
    jobs = await asyncio.to_thread(ray.unended)
    for job in jobs:
        await asyncio.to_thread(ray.stop, job)
    while await asyncio.to_thread(ray.unended):  # noqa: ASYNC110 - another process ends them
        await asyncio.sleep(_POLL_SECONDS)
    log.info("jobs_stopped", jobs=jobs)
