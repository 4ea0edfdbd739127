"""What starts the processes of jobs, wherever they run.

JobLauncher
├── RayJobs        a Ray cluster that is there already, through Ray's Jobs API
└── KubeRayJobs    a Ray cluster for each attempt, which KubeRay makes of a RayJob object
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Protocol

from toile.core.errors import FailedPreconditionError
from toile.core.settings import Settings


@dataclass(frozen=True)
class Submission:
    """What is known of one start of a job.

    Attributes:
        ended: Whether its processes are gone for good.
        message: What is said of it, for a person.
        suspended: Whether it holds no compute, and gets some later by itself.
    """

    ended: bool
    message: str
    suspended: bool = False


class JobLauncher(Protocol):
    """Submits, looks up and stops the starts of jobs. Safe to share between threads.

    Every method but `close` raises `ComputeUnavailableError` where it gets no answer.

    Attributes:
        compute: What is asked, for a person.
        forgotten: Why it may know nothing of a submission, for a person.
        poll_interval_seconds: How often it is fair to ask.
    """

    compute: ClassVar[str]
    forgotten: ClassVar[str]
    poll_interval_seconds: ClassVar[float]

    def check(self) -> None:
        """Make sure that compute answers."""

    def submit(
        self,
        submission_id: str,
        module: str,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        labels: Mapping[str, str],
    ) -> None:
        """Start `python -m module arguments…`; nothing happens when the id is already known.

        Args:
            submission_id: Lower-case letters, digits and inner dashes.
            module: That is run.
            arguments: Of the module.
            environment: Variables of its processes.
            labels: What it is for: values of at most 63 letters, digits, dashes, underscores.
        """

    def get(self, submission_id: str) -> Submission | None:
        """Look a submission up; None if it is not known, or not any more."""

    def logs(self, submission_id: str) -> str | None:
        """Return all that a submission's processes printed; None where nothing is kept."""

    def stop(self, submission_id: str) -> None:
        """End a submission's processes; nothing happens where there are none."""

    def close(self) -> None:
        """Close the connections."""


def open_launcher(settings: Settings) -> JobLauncher:
    """Return what starts jobs by the settings.

    Raises:
        FailedPreconditionError: The client of Kubernetes is not installed.
        InvalidArgumentError: A setting of it is missing or wrong.
    """
    # Late, both: they build on the names above, and the client of Kubernetes is an extra.
    if settings.job_launcher == "ray":
        from toile.core.jobs.ray_jobs import RayJobs

        return RayJobs.of(settings)
    try:
        from toile.core.jobs.kuberay import KubeRayJobs
    except ModuleNotFoundError as error:
        raise FailedPreconditionError(
            "RayJobs need the client of Kubernetes: install toile[kubernetes]",
            reason="KUBERNETES_CLIENT_MISSING",
        ) from error
    return KubeRayJobs.of(settings)
