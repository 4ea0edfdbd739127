"""The process of a training job."""

from toile.core.jobs.runtime import JobContext, run_job


def main(job: JobContext) -> None:
    """Train on Ray."""
    from toile.training.worker import launch  # late: a job that may not start needs no Ray

    launch(job)


if __name__ == "__main__":
    run_job(main)
