"""`toile jobs …`: follow, pause and cancel long work."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from toile.cli.commands.common import Session, session
from toile.cli.errors import EXIT_INTERRUPTED
from toile.cli.names import short
from toile.cli.output import JsonFlag, duration_text

if TYPE_CHECKING:
    from toile.v1 import job_pb2

app = typer.Typer(no_args_is_help=True, help="Follow, pause and cancel builds and trainings.")
JobArgument = Annotated[str, typer.Argument(metavar="JOB", help="Id or whole name of a job.")]


@app.command("list")
def list_jobs(
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Jobs to show at most.")] = 20,
    as_json: JsonFlag = False,
) -> None:
    """List the newest jobs."""
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        request = job_pb2.ListJobsRequest(parent=s.names.project, page_size=limit)
        jobs = s.clients.jobs.ListJobs(request).jobs
        s.output.data([as_data(job) for job in jobs])
        s.output.table(
            ("job", "kind", "state", "target", "created", "took"),
            [
                (
                    short(job.name),
                    kind_text(job),
                    _state(job),
                    short(job.target),
                    f"{job.create_time.ToDatetime():%Y-%m-%d %H:%M}",
                    _took(job),
                )
                for job in jobs
            ],
        )


@app.command()
def show(job: JobArgument, as_json: JsonFlag = False) -> None:
    """Show a job."""
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        name = s.names.job(job)
        found = s.clients.jobs.GetJob(job_pb2.GetJobRequest(name=name)).job
        s.output.data(as_data(found))
        show_job(s, found)


@app.command()
def watch(job: JobArgument, as_json: JsonFlag = False) -> None:
    """Follow a job until it ends."""
    with session(as_json=as_json) as s:
        ended = follow(s, s.names.job(job))
        s.output.say(f"Job {short(ended.name)} {_state(ended)}: {short(ended.target)}")


@app.command()
def cancel(job: JobArgument, as_json: JsonFlag = False) -> None:
    """Ask a job to stop."""
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        name = s.names.job(job)
        found = s.clients.jobs.CancelJob(job_pb2.CancelJobRequest(name=name)).job
        s.output.data(as_data(found))
        s.output.say(f"Job {short(found.name)} is {state_text(found.state)}; it was told to stop.")


@app.command()
def pause(job: JobArgument, as_json: JsonFlag = False) -> None:
    """Stop a training for now; it keeps a checkpoint and gives its compute back."""
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        name = s.names.job(job)
        found = s.clients.jobs.PauseJob(job_pb2.PauseJobRequest(name=name)).job
        s.output.data(as_data(found))
        told = "" if found.state == job_pb2.JOB_STATE_PAUSED else "; it was told to pause"
        s.output.say(
            f"Job {short(found.name)} is {state_text(found.state)}{told}.\n"
            f"Go on with: toile jobs resume {short(found.name)}"
        )


@app.command()
def resume(
    job: JobArgument,
    budget: Annotated[
        float | None, typer.Option(help="What it may cost in all from now on.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Let a paused training go on from its last checkpoint."""
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        name = s.names.job(job)
        found = s.clients.jobs.ResumeJob(job_pb2.ResumeJobRequest(name=name, budget=budget)).job
        s.output.data(as_data(found))
        s.output.say(f"Job {short(found.name)} is {_state(found)}.")


@app.command()
def sample(
    job: JobArgument,
    wait: Annotated[bool, typer.Option("--wait", help="Wait until they are drawn.")] = False,
    out: Annotated[
        Path | None, typer.Option("--out", "-o", help="Folder to write them to; waits for them.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Have a running training draw its sample prompts after its current step."""
    from toile.cli.job_samples import wait_for_samples, write_samples
    from toile.cli.operations import as_data
    from toile.v1 import job_pb2

    with session(as_json=as_json) as s:
        name = s.names.job(job)
        asked = s.clients.jobs.RequestJobSamples(job_pb2.RequestJobSamplesRequest(name=name))
        if not wait and out is None:
            s.output.data(as_data(asked.job))
            s.output.say(f"Job {short(name)} was asked for samples.")
            return
        drawn = wait_for_samples(s.clients, name, asked.after_sequence)
        written = write_samples(s.clients, name, drawn, out) if out is not None else []
        s.output.data({**as_data(drawn), "files": [str(path) for path in written]})
        where = f" in {out}" if out is not None else ""
        s.output.say(f"Step {drawn.step}: {len(drawn.samples)} samples{where}")


@app.command()
def logs(
    job: JobArgument,
    follow: Annotated[
        bool, typer.Option("--follow", "-f", help="Go on until the job has ended.")
    ] = False,
    tail: Annotated[int, typer.Option(min=0, help="Last lines to begin with; 0 for all.")] = 0,
) -> None:
    """Write what a job printed, all its attempts as far as they are kept."""
    from toile.cli.operations import job_logs

    with session(as_json=False) as s:
        name, attempt = s.names.job(job), 0
        for chunk in job_logs(s.clients, name, follow=follow, tail_lines=tail):
            if attempt and chunk.attempt != attempt:
                s.output.note(f"Attempt {chunk.attempt}")
            attempt = chunk.attempt
            typer.echo(chunk.text, nl=False)


def follow(s: Session, name: str) -> "job_pb2.Job":
    """Follow a job with a bar and show how it ended. Ctrl-C stops only the watching.

    Raises:
        JobFailedError: It failed.
        CancelledError: It was cancelled.
    """
    from toile.cli.operations import as_data
    from toile.cli.watching import watch_job

    try:
        job = watch_job(s.clients, name, s.output)
    except KeyboardInterrupt:
        s.output.note(
            f"The job goes on. Follow it with: toile jobs watch {short(name)}\n"
            f"Cancel it with: toile jobs cancel {short(name)}"
        )
        raise typer.Exit(EXIT_INTERRUPTED) from None
    s.output.data(as_data(job))
    return job


def show_job(s: Session, job: "job_pb2.Job") -> None:
    """Write a job for a person."""
    from toile.cli.watching import job_figures

    rows: list[tuple[str, object]] = [
        ("job", short(job.name)),
        ("kind", kind_text(job)),
        ("state", _state(job)),
        ("makes", short(job.target)),
        ("attempt", job.attempt),
        ("took", _took(job)),
        ("cost", cost_text(job.cost)),
    ]
    if job.HasField("budget"):
        rows.append(("budget", f"{job.budget:g} {job.cost.currency}".rstrip()))
    # The last that a job told before it was done looks as if it were not.
    if job.progress.phase and _state(job) != "succeeded":
        at = f"{job.progress.phase} {job.progress.step} of {job.progress.total_steps}"
        rows.append(("progress", f"{at} {job_figures(job.progress)}"))
    if job.error.reason:
        rows.append(("error", f"{job.error.reason}: {job.error.message}"))
    s.output.table(("", ""), rows)


def state_text(state: "job_pb2.JobState.ValueType") -> str:
    """Write a job's state for a person."""
    from toile.v1 import job_pb2

    return job_pb2.JobState.Name(state).removeprefix("JOB_STATE_").lower()


def _state(job: "job_pb2.Job") -> str:
    """Write a job's state, and its turn if it waits for one."""
    state = state_text(job.state)
    return f"{state}, no. {job.queue_position}" if job.HasField("queue_position") else state


def cost_text(cost: "job_pb2.Cost") -> str:
    """Write what compute was taken, and what it costs where there are prices."""
    parts = [f"CPU {duration_text(cost.cpu_seconds)}"]
    if cost.gpu_seconds:
        parts.append(f"GPU {duration_text(cost.gpu_seconds)}")
    if cost.amount:
        parts.append(f"{cost.amount:.2f} {cost.currency}".rstrip())
    return ", ".join(parts)


def kind_text(job: "job_pb2.Job") -> str:
    """Write a job's kind for a person."""
    from toile.v1 import job_pb2

    name = job_pb2.JobKind.Name(job.kind).removeprefix("JOB_KIND_")
    return name.lower().replace("_", " ")


def _took(job: "job_pb2.Job") -> str:
    if not job.HasField("start_time") or not job.HasField("end_time"):
        return ""
    return duration_text((job.end_time.ToDatetime() - job.start_time.ToDatetime()).total_seconds())
