"""The process of a dataset build: `python -m toile.dataset.build JOB ATTEMPT`."""

from toile.core.jobs.runtime import run_job
from toile.dataset.build.job import build_version

if __name__ == "__main__":
    run_job(build_version)
