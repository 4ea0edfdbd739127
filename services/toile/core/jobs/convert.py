"""Rows of jobs to `toile.v1` messages."""

from collections.abc import Mapping
from datetime import datetime
from typing import Any

from google.protobuf.timestamp_pb2 import Timestamp

from toile.core.catalog.models import JobEventRow, JobRow
from toile.core.jobs.costs import Usage, usage_of
from toile.core.jobs.samples import KeptSamples
from toile.core.jobs.states import JobState
from toile.core.settings import Prices
from toile.v1 import job_pb2


def job_message(
    row: JobRow, queue_position: int | None = None, prices: Prices | None = None
) -> job_pb2.Job:
    """A job; its place in the queue where it has one, and its cost where prices are known."""
    message = job_pb2.Job(
        name=row.name,
        kind=job_pb2.JobKind.Value(f"JOB_KIND_{row.kind}"),
        state=state_value(row.state),
        target=row.target,
        attempt=row.attempt,
        create_time=timestamp(row.create_time),
        start_time=timestamp(row.start_time),
        end_time=timestamp(row.end_time),
        queue_position=queue_position,
        cost=cost_message(usage_of(row), prices) if prices is not None else None,
        budget=row.budget,
    )
    if row.progress:
        message.progress.CopyFrom(progress_message(row.progress))
    if row.state == JobState.FAILED:
        message.error.reason, message.error.message = row.error_reason, row.error_message
        message.error.metadata.update(row.error_metadata)
    return message


def cost_message(usage: Usage, prices: Prices) -> job_pb2.Cost:
    """Compute and its price."""
    return job_pb2.Cost(
        cpu_seconds=usage.cpu_seconds,
        gpu_seconds=usage.gpu_seconds,
        amount=usage.amount(prices),
        currency=prices.currency,
    )


def event_message(row: JobEventRow) -> job_pb2.JobEvent:
    """An entry of a job's history."""
    message = job_pb2.JobEvent(
        sequence=row.sequence, time=timestamp(row.time), state=state_value(row.state)
    )
    if row.progress:
        message.progress.CopyFrom(progress_message(row.progress))
    return message


def progress_message(progress: Mapping[str, Any]) -> job_pb2.JobProgress:
    """A report of progress; the row's keys are the message's fields."""
    return job_pb2.JobProgress(**progress)


def samples_message(kept: KeptSamples) -> job_pb2.JobSamples:
    """What a training drew after a step."""
    return job_pb2.JobSamples(
        step=kept.drawn.step,
        samples=[
            job_pb2.JobSample(
                prompt=sample.prompt,
                seed=sample.seed,
                size_bytes=file.size_bytes,
                digest=file.digest,
                scores={name: score for name, score in sample.scores.items() if score is not None},
            )
            for sample, file in zip(kept.drawn.samples, kept.files, strict=True)
        ],
    )


def state_value(state: str) -> job_pb2.JobState.ValueType:
    """A state."""
    return job_pb2.JobState.Value(f"JOB_STATE_{state}")


def timestamp(time: datetime | None) -> Timestamp | None:
    """A time; None where there is none."""
    if time is None:
        return None
    message = Timestamp()
    message.FromDatetime(time)
    return message
