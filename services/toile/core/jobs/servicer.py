"""JobService: declared once, served by every service that starts jobs."""

import asyncio
import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

import grpc
from sqlalchemy import select

from toile.core.artifacts import ArtifactStore, open_store
from toile.core.catalog.engine import Catalog
from toile.core.catalog.models import JobRow
from toile.core.catalog.paging import page
from toile.core.errors import InvalidArgumentError
from toile.core.jobs.convert import event_message, job_message, samples_message
from toile.core.jobs.costs import check_budget
from toile.core.jobs.launcher import JobLauncher, open_launcher
from toile.core.jobs.logs import JobLogs
from toile.core.jobs.records import JobStore
from toile.core.jobs.samples import JobSamples
from toile.core.jobs.states import FINAL_STATES, JobState
from toile.core.names import JobName, ProjectName
from toile.core.settings import Prices, Settings
from toile.v1 import job_pb2, job_pb2_grpc

JOB_SERVICE_NAME = job_pb2.DESCRIPTOR.services_by_name["JobService"].full_name
WATCH_INTERVAL_SECONDS = 0.2

Context = grpc.aio.ServicerContext[Any, Any]


class JobServicer(job_pb2_grpc.JobServiceServicer):
    """Answers from catalog and store, and for logs from compute, so every replica can answer."""

    def __init__(
        self, catalog: Catalog, store: ArtifactStore, launcher: JobLauncher, prices: Prices
    ) -> None:
        self._catalog = catalog
        self._store = store
        self._prices = prices
        self._jobs = JobStore(catalog)
        self._logs = JobLogs(self._jobs, launcher)

    async def GetJob(
        self, request: job_pb2.GetJobRequest, context: Context
    ) -> job_pb2.GetJobResponse:
        """Return one job."""
        row = await asyncio.to_thread(self._jobs.get, str(JobName.parse(request.name)))
        return job_pb2.GetJobResponse(job=await self._placed(row))

    async def ListJobs(
        self, request: job_pb2.ListJobsRequest, context: Context
    ) -> job_pb2.ListJobsResponse:
        """Page through the jobs of a project, newest first."""
        parent = ProjectName.parse(request.parent, "parent")

        def read() -> tuple[list[JobRow], str]:
            with self._catalog.reading() as session:
                return page(
                    session,
                    select(JobRow).where(JobRow.project == parent.project),
                    (JobRow.create_time, JobRow.name),
                    page_size=request.page_size,
                    page_token=request.page_token,
                    scope=f"ListJobs {parent}",
                    descending=True,
                )

        rows, token = await asyncio.to_thread(read)
        queued = [row.name for row in rows if row.state == JobState.QUEUED]
        places = await asyncio.to_thread(self._jobs.queue_positions, queued)
        return job_pb2.ListJobsResponse(
            jobs=[self._message(row, places.get(row.name)) for row in rows],
            next_page_token=token,
        )

    async def WatchJob(
        self, request: job_pb2.WatchJobRequest, context: Context
    ) -> AsyncIterator[job_pb2.WatchJobResponse]:
        """Replay the history after a sequence number and follow the job until it ends."""
        name = str(JobName.parse(request.name))
        sequence = request.after_sequence
        if sequence < 0:
            raise InvalidArgumentError(
                "after_sequence must not be negative", field="after_sequence"
            )
        while True:
            events, row = await asyncio.to_thread(self._jobs.events_after, name, sequence)
            for event in events:
                sequence = event.sequence
                response = job_pb2.WatchJobResponse(event=event_message(event))
                if JobState(event.state) in FINAL_STATES:
                    response.job.CopyFrom(self._message(row))
                    yield response
                    return
                yield response
            if not events and JobState(row.state) in FINAL_STATES:
                # The client had seen the end before it was cut off.
                yield job_pb2.WatchJobResponse(job=self._message(row))
                return
            await asyncio.sleep(WATCH_INTERVAL_SECONDS)

    async def CancelJob(
        self, request: job_pb2.CancelJobRequest, context: Context
    ) -> job_pb2.CancelJobResponse:
        """Ask a job to stop."""
        row = await asyncio.to_thread(self._jobs.request_cancel, str(JobName.parse(request.name)))
        return job_pb2.CancelJobResponse(job=self._message(row))

    async def PauseJob(
        self, request: job_pb2.PauseJobRequest, context: Context
    ) -> job_pb2.PauseJobResponse:
        """Ask a training to stop for now."""
        row = await asyncio.to_thread(self._jobs.request_pause, str(JobName.parse(request.name)))
        return job_pb2.PauseJobResponse(job=self._message(row))

    async def ResumeJob(
        self, request: job_pb2.ResumeJobRequest, context: Context
    ) -> job_pb2.ResumeJobResponse:
        """Queue a paused job again."""
        budget = request.budget if request.HasField("budget") else None
        check_budget(budget, self._prices)
        row = await asyncio.to_thread(
            self._jobs.resume,
            str(JobName.parse(request.name)),
            budget=budget,
            prices=self._prices,
        )
        return job_pb2.ResumeJobResponse(job=await self._placed(row))

    async def RequestJobSamples(
        self, request: job_pb2.RequestJobSamplesRequest, context: Context
    ) -> job_pb2.RequestJobSamplesResponse:
        """Ask a running training for samples."""
        row, sequence = await asyncio.to_thread(
            self._jobs.request_samples, str(JobName.parse(request.name))
        )
        return job_pb2.RequestJobSamplesResponse(job=self._message(row), after_sequence=sequence)

    async def ListJobSamples(
        self, request: job_pb2.ListJobSamplesRequest, context: Context
    ) -> job_pb2.ListJobSamplesResponse:
        """Return what a training has drawn so far."""
        row = await asyncio.to_thread(self._jobs.get, str(JobName.parse(request.name)))
        kept = await asyncio.to_thread(JobSamples(self._store, row.name).all)
        return job_pb2.ListJobSamplesResponse(samples=[samples_message(one) for one in kept])

    async def DownloadJobSample(
        self, request: job_pb2.DownloadJobSampleRequest, context: Context
    ) -> AsyncIterator[job_pb2.DownloadJobSampleResponse]:
        """Stream a sample."""
        row = await asyncio.to_thread(self._jobs.get, str(JobName.parse(request.name)))
        pieces = JobSamples(self._store, row.name).read(request.step, request.index)
        try:
            while chunk := await asyncio.to_thread(next, pieces, b""):
                yield job_pb2.DownloadJobSampleResponse(chunk=chunk)
        finally:
            # A client that goes away while a piece is being read: the thread then closes the file.
            with contextlib.suppress(ValueError):
                pieces.close()

    async def GetJobLogs(
        self, request: job_pb2.GetJobLogsRequest, context: Context
    ) -> AsyncIterator[job_pb2.GetJobLogsResponse]:
        """Send what the job's processes printed."""
        name = str(JobName.parse(request.name))
        if request.tail_lines < 0:
            raise InvalidArgumentError("tail_lines must not be negative", field="tail_lines")
        chunks = self._logs.read(name, follow=request.follow, tail_lines=request.tail_lines)
        async for attempt, text in chunks:
            yield job_pb2.GetJobLogsResponse(text=text, attempt=attempt)

    async def _placed(self, row: JobRow) -> job_pb2.Job:
        """A job with its place in the queue, if it waits in it."""
        queued = [row.name] if row.state == JobState.QUEUED else []
        places = await asyncio.to_thread(self._jobs.queue_positions, queued)
        return self._message(row, places.get(row.name))

    def _message(self, row: JobRow, queue_position: int | None = None) -> job_pb2.Job:
        return job_message(row, queue_position, self._prices)


def add_job_service(
    settings: Settings, catalog: Catalog
) -> tuple[Callable[[JobServicer, grpc.aio.Server], None], JobServicer]:
    """What a service adds to its server to answer for jobs."""
    return job_pb2_grpc.add_JobServiceServicer_to_server, JobServicer(
        catalog, open_store(settings), open_launcher(settings), settings.prices
    )
