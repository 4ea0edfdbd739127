"""Samples of a training under way, over gRPC."""

from functools import partial
from pathlib import Path

from toile.cli.operations import LONG_SECONDS, checked, write_whole
from toile.core.errors import FailedPreconditionError, NotFoundError, UnavailableError
from toile.core.rpc.client import Clients
from toile.core.rpc.streams import reading
from toile.v1 import job_pb2


def wait_for_samples(clients: Clients, name: str, after_sequence: int) -> job_pb2.JobSamples:
    """Wait for the answer to a request for samples; a pause is waited out.

    Raises:
        JobFailedError: The job failed before.
        CancelledError: It was cancelled before.
        FailedPreconditionError: It ended well before; its closing samples are in its version.
        UnavailableError: The service went away.
    """
    request = job_pb2.WatchJobRequest(name=name, after_sequence=after_sequence)
    with reading(partial(clients.jobs.WatchJob, request, timeout=LONG_SECONDS)) as answers:
        for answer in answers:
            if answer.event.progress.HasField("samples_step"):
                return _of_step(clients, name, answer.event.progress.samples_step)
            if answer.HasField("job"):
                raise FailedPreconditionError(
                    "the job ended before it drew them; "
                    f"{checked(answer.job).target} has its closing samples",
                    reason="JOB_NOT_RUNNING",
                    metadata={"job": name},
                )
    raise UnavailableError("the stream ended before the job did")


def write_samples(
    clients: Clients, name: str, drawn: job_pb2.JobSamples, folder: Path
) -> list[Path]:
    """Write samples to a folder, as `step-000100-00.png` and so on.

    Raises:
        DataLossError: What came is not what was stored.
    """
    paths: list[Path] = []
    for index, sample in enumerate(drawn.samples):
        path = folder / f"step-{drawn.step:06d}-{index:02d}.png"
        request = job_pb2.DownloadJobSampleRequest(name=name, step=drawn.step, index=index)
        with reading(partial(clients.jobs.DownloadJobSample, request)) as answers:
            write_whole(path, (answer.chunk for answer in answers), sample.digest)
        paths.append(path)
    return paths


def _of_step(clients: Clients, name: str, step: int) -> job_pb2.JobSamples:
    answer = clients.jobs.ListJobSamples(job_pb2.ListJobSamplesRequest(name=name))
    for drawn in answer.samples:
        if drawn.step == step:
            return drawn
    raise NotFoundError(f"the samples of step {step} were not kept", metadata={"job": name})
